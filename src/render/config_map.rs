//! The ConfigMap that carries an attempt's configuration to its harness.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;

use super::validated::Attempt;

/// The key of the configuration in the ConfigMap, and the file's name.
pub const KEY: &str = "config.json";

/// Builds the ConfigMap. It is immutable, so that a restarted harness reads the same configuration.
pub fn build(attempt: &Attempt<'_>) -> ConfigMap {
    ConfigMap {
        metadata: attempt.task.owner.metadata(attempt.number),
        data: Some(BTreeMap::from([(KEY.to_owned(), attempt.config.clone())])),
        immutable: Some(true),
        binary_data: None,
    }
}
