//! The status of the objects that tasks refer to: contracts and packs.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The condition of every kind that says that the object is valid, or that the task has succeeded.
pub const READY: &str = "Ready";
/// The condition of every kind that says that only a person can resolve the problem. It is absent if it is not true.
pub const STALLED: &str = "Stalled";

/// Whether tasks can use this object, as far as the object itself shows. The operator makes the checks of `belay lint` and writes this
/// status.
///
/// Until the operator has checked the object, `observedGeneration` is -1. `kubectl wait`, Flux and Argo CD wait for a later one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("default" = { "observedGeneration": -1 }))]
pub struct Readiness {
    /// The generation that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Standard conditions. `Ready` says whether tasks can use this object. If they cannot, its message says what to correct. `Stalled` is
    /// present while the object is not ready, because only a correction helps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
