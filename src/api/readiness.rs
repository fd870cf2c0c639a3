//! The status of what tasks refer to: contracts and packs.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Condition of every kind: it is in order, or has succeeded.
pub const READY: &str = "Ready";
/// Condition of every kind, there while it is true: nothing but a person helps.
pub const STALLED: &str = "Stalled";

/// Whether tasks can use it, as far as it is known by itself: what `belay lint` would say of it. The operator writes it.
///
/// Until the operator has looked, its generation is −1, by which `kubectl wait`, Flux and Argo CD know that it has not.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("default" = { "observedGeneration": -1 }))]
pub struct Readiness {
    /// The generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Standard conditions: `Ready`, whose message says what is to be corrected, and `Stalled` while it is not ready: only a correction
    /// helps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
