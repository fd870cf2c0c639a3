//! Keeps the certificate authority in `caBundle` of the webhook's configuration, so that the API server trusts the webhook.
//!
//! Guarantees: `caBundle` is the authority of the webhook's certificate soon after the configuration is applied, and again after another
//! client changed it.
//!
//! Non-goals: To create a configuration, or to write any other field of it. The chart does that.

use std::{convert::Infallible, pin::pin, time::Duration};

use futures::StreamExt;
use k8s_openapi::{ByteString, api::admissionregistration::v1::ValidatingWebhookConfiguration};
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt, watcher},
};
use serde_json::{Value, json};

use crate::render::names::{FIELD_MANAGER, WEBHOOK};

/// The pause before a failed write is retried.
const PAUSE: Duration = Duration::from_secs(10);

/// Keeps `caBundle` at this authority, in PEM, forever. Only the leader runs it.
pub async fn keep(client: Client, authority: String) -> Infallible {
    let configurations = Api::<ValidatingWebhookConfiguration>::all(client);
    let ours = watcher::Config::default().fields(&format!("metadata.name={WEBHOOK}"));
    let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    loop {
        let mut events = pin!(watcher(configurations.clone(), ours.clone()).default_backoff());
        while let Some(event) = events.next().await {
            let configuration = match event {
                Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => object,
                Ok(_) => continue,
                Err(error) => {
                    tracing::warn!(%error, "the watch of the webhook's configuration was interrupted and is started again");
                    continue;
                }
            };
            let Some(patch) = patch(&configuration, &authority) else { continue };
            match configurations.patch(WEBHOOK, &parameters, &Patch::Strategic(patch)).await {
                Ok(_) => tracing::info!(configuration = WEBHOOK, "the API server trusts the webhook"),
                Err(error) => {
                    tracing::warn!(configuration = WEBHOOK, %error, "caBundle is not set yet; tried again");
                    break;
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Returns the necessary change, if any: a strategic merge patch of the version that was read. Webhooks are identified by name in it.
pub(super) fn patch(configuration: &ValidatingWebhookConfiguration, authority: &str) -> Option<Value> {
    let bundle = ByteString(authority.as_bytes().to_vec());
    let stale =
        configuration.webhooks.iter().flatten().filter(|one| one.client_config.ca_bundle.as_ref() != Some(&bundle));
    let webhooks: Vec<_> =
        stale.map(|one| json!({ "name": one.name, "clientConfig": { "caBundle": bundle } })).collect();
    let version = configuration.resource_version();
    (!webhooks.is_empty()).then(|| json!({ "metadata": { "resourceVersion": version }, "webhooks": webhooks }))
}
