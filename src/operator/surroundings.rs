//! Finds the settings of the cluster that are the same for every task: the gateway's address, and the addresses that an agent must not
//! reach.

use futures::{Stream, StreamExt};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, ResourceExt,
    api::ListParams,
    runtime::{WatchStreamExt, watcher},
};
use tokio::sync::watch;

use super::Settings;
use crate::contact;
use crate::render::{
    names,
    validated::{Installation, authority},
};

/// Returns the addresses of the API server: the address of its Service, which every pod gets, and the first endpoint behind it. The
/// endpoint matters because a NetworkPolicy is evaluated after the Service's address is translated.
///
/// # Errors
/// Returns an error if the EndpointSlice `kubernetes` cannot be read.
pub async fn api_servers(client: &Client, cluster_url: &http::Uri) -> Result<Vec<String>, kube::Error> {
    let env = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let port = env("KUBERNETES_SERVICE_PORT").and_then(|port| port.parse().ok()).unwrap_or(443);
    let mut addresses: Vec<_> = env("KUBERNETES_SERVICE_HOST").map(|host| authority(&host, port)).into_iter().collect();
    // API servers maintain this EndpointSlice themselves.
    let slice = Api::<EndpointSlice>::namespaced(client.clone(), "default").get_opt("kubernetes").await?;
    let real = slice.and_then(|slice| {
        let port = slice.ports.iter().flatten().find_map(|port| port.port)?;
        let address = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).next()?;
        Some(authority(address, u16::try_from(port).ok()?))
    });
    addresses.extend(real);
    if addresses.is_empty() {
        // Outside a cluster: the address by which this process reaches the API server.
        let port = cluster_url.port_u16().unwrap_or(443);
        addresses.extend(cluster_url.host().map(|host| authority(host.trim_matches(['[', ']']), port)));
    }
    addresses.dedup();
    Ok(addresses)
}

/// Returns the current `address:port` of the gateway's Service.
///
/// # Errors
/// Returns an error if Services cannot be listed.
pub async fn gateway(client: &Client, namespace: &str) -> Result<Option<String>, kube::Error> {
    let only = ListParams::default().fields(&format!("metadata.name={}", names::GATEWAY));
    let services = Api::<Service>::namespaced(client.clone(), namespace).list(&only).await?;
    Ok(services.items.first().and_then(address).map(|address| authority(&address, names::GATEWAY_PORT)))
}

/// Watches the gateway's Service. Each item of the stream says that the settings in the channel have changed.
pub fn follow(
    client: &Client,
    settings: &Settings,
    gateway_ca: String,
    api_servers: Vec<String>,
) -> (watch::Receiver<Option<Installation>>, impl Stream<Item = ()> + Send + 'static + use<>) {
    let (sender, receiver) = watch::channel(None);
    let (namespace, image) = (settings.system_namespace.clone(), settings.image.clone());
    let (cpu, memory) = (settings.harness_cpu.clone(), settings.harness_memory.clone());
    let services = Api::<Service>::namespaced(client.clone(), &namespace);
    let config = contact::watching().fields(&format!("metadata.name={}", names::GATEWAY));
    let changes = watcher(services, config).backoff(contact::pauses()).filter_map(move |event| {
        let address = match event {
            Ok(watcher::Event::Apply(service) | watcher::Event::InitApply(service)) => Some(address(&service)),
            Ok(watcher::Event::Delete(_)) => Some(None),
            Ok(watcher::Event::Init | watcher::Event::InitDone) => None,
            Err(error) => {
                tracing::warn!(%error, "the watch of the gateway's Service was interrupted and is started again");
                None
            }
        };
        let changed = address.is_some_and(|address| {
            let next = address.map(|gateway| Installation {
                system_namespace: namespace.clone(),
                image: image.clone(),
                gateway,
                gateway_ca: gateway_ca.clone(),
                api_servers: api_servers.clone(),
                harness_cpu: cpu.clone(),
                harness_memory: memory.clone(),
            });
            sender.send_if_modified(|current| {
                let differs = *current != next;
                *current = next;
                differs
            })
        });
        std::future::ready(changed.then_some(()))
    });
    (receiver, changes)
}

/// Returns the Service's cluster address. A headless Service has none, and agent pods have no DNS to find its pods.
fn address(service: &Service) -> Option<String> {
    let address = service.spec.as_ref()?.cluster_ip.clone().filter(|address| !matches!(address.as_str(), "" | "None"));
    if address.is_none() {
        tracing::warn!(
            service = service.name_any(),
            "expected the gateway's Service to have a cluster address, found none"
        );
    }
    address
}
