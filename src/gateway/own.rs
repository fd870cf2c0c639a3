//! The cluster's own addresses, which stay closed even if an administrator opens their range.
//!
//! Guarantees: an address of a node, of an API server or of an agent's pod is recognized. The addresses of nodes and API servers are at
//! most [`FRESH`] old, and those of agents' pods are the newest that the API server has sent. If the API server does not answer, no address
//! passes for another's.
//!
//! Non-goals: addresses that no object of the API server has, such as those of the machines of a cloud's control plane.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, future::BoxFuture};
use k8s_openapi::api::{core::v1::Node, discovery::v1::EndpointSlice};
use kube::{Api, Client, api::ListParams};
use tokio::sync::Mutex;

use super::dial::Own;

/// How long the addresses of nodes and API servers are used.
const FRESH: Duration = Duration::from_secs(30);

/// Descriptions, by address.
type Known = Arc<HashMap<IpAddr, &'static str>>;

/// The addresses of one cluster.
pub struct OwnAddresses {
    client: Client,
    /// The address of the API server's Service.
    service: Option<IpAddr>,
    /// Returns whether an agent's pod has the address now.
    is_agent: Box<dyn Fn(IpAddr) -> bool + Send + Sync>,
    known: Mutex<Option<(Instant, Known)>>,
}

impl OwnAddresses {
    /// Returns the addresses of the cluster of this client. `service` is the address by which pods reach the API server. `is_agent` tells
    /// whether an agent's pod has an address now.
    pub fn new(
        client: Client,
        service: Option<IpAddr>,
        is_agent: impl Fn(IpAddr) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self { client, service, is_agent: Box::new(is_agent), known: Mutex::default() }
    }

    /// Returns the addresses of nodes and API servers. Callers that come at the same time wait for one request.
    async fn known(&self) -> Result<Known, kube::Error> {
        let mut known = self.known.lock().await;
        if let Some((since, fresh)) = &*known
            && since.elapsed() < FRESH
        {
            return Ok(fresh.clone());
        }
        let asked = Instant::now();
        let (nodes, slices) = (Api::<Node>::all(self.client.clone()), Api::namespaced(self.client.clone(), "default"));
        // `match_any` lets the API server answer from its cache.
        let any = ListParams::default().match_any();
        // API servers maintain the EndpointSlice `kubernetes` themselves.
        let (nodes, slice) = tokio::try_join!(nodes.list(&any), slices.get_opt("kubernetes"))?;
        let slice: Option<EndpointSlice> = slice;
        let nodes = nodes.items.into_iter().filter_map(|node| node.status?.addresses).flatten();
        let nodes = nodes.map(|address| (address.address, "a node of the cluster"));
        let servers = slice.into_iter().flat_map(|slice| slice.endpoints).flat_map(|endpoint| endpoint.addresses);
        let servers = servers.map(|address| (address, "the cluster's API server"));
        // Nodes also have addresses that are names.
        let parsed = nodes.chain(servers).filter_map(|(address, what)| Some((address.parse().ok()?, what)));
        let fresh = Arc::new(parsed.chain(self.service.map(|service| (service, "the cluster's API server"))).collect());
        *known = Some((asked, Arc::clone(&fresh)));
        Ok(fresh)
    }
}

impl Own for OwnAddresses {
    fn describe<'a>(&'a self, addresses: &'a [IpAddr]) -> BoxFuture<'a, Result<Vec<Option<&'static str>>, String>> {
        async move {
            let known = self.known().await.map_err(|error| error.to_string())?;
            let describe = |address: &IpAddr| {
                known.get(address).copied().or_else(|| (self.is_agent)(*address).then_some("an agent's pod"))
            };
            Ok(addresses.iter().map(describe).collect())
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests;
