//! `ToolContract`: one tool that an agent may call, and under which terms.

use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::policy::config::SideEffect;

/// One tool, as the agent sees it, where it really is, and what must hold before a call leaves.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "belay.dev",
    version = "v1alpha1",
    kind = "ToolContract",
    namespaced,
    shortname = "tc",
    category = "belay",
    derive = "PartialEq",
    doc = "One tool that an agent may call, and under which terms.",
    printcolumn(name = "Tool", type_ = "string", json_path = ".spec.tool"),
    printcolumn(name = "Effect", type_ = "string", json_path = ".spec.sideEffect"),
    printcolumn(name = "Upstream", type_ = "string", json_path = ".spec.upstream.mcp.url"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ToolContractSpec {
    /// The name under which the agent calls the tool.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9_.-]+$"))]
    pub tool: String,
    /// What the agent is told about the tool. It comes from here, never from the upstream.
    #[schemars(length(min = 1, max = 4096))]
    pub description: String,
    /// Where the tool really is.
    pub upstream: Upstream,
    /// JSON Schema (draft 2020-12) of the arguments. Unknown properties are refused unless it says otherwise.
    #[schemars(schema_with = "json_schema_object")]
    pub input: serde_json::Value,
    /// Conditions that must all be true before a call leaves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub preconditions: Vec<Precondition>,
    /// What a call may change.
    pub side_effect: SideEffect,
}

/// Where a tool is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Upstream {
    /// A tool of an MCP server.
    pub mcp: McpUpstream,
}

/// A tool of an MCP server that speaks streamable HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct McpUpstream {
    /// The server's endpoint.
    #[schemars(length(min = 8, max = 2048), regex(pattern = r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[^\s#]*)?$"))]
    pub url: String,
    /// The tool's name there.
    #[schemars(length(min = 1, max = 128))]
    pub tool: String,
}

/// A CEL expression over `args`, `task`, `principal`, `usage` and `results` that must be `true`.
///
/// `results` maps the name of a tool to what its last successful call in this attempt answered: its structured content, or
/// else its only block of text, as JSON where it is JSON. Results longer than 16 KiB are absent, and so are all once the
/// harness has restarted: a condition that needs one then denies, until the tool is called again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Precondition {
    /// Names the condition in denials and in evidence.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?$"))]
    pub name: String,
    /// The expression. An error or anything but `true` denies.
    #[schemars(length(min = 1, max = 4096))]
    pub cel: String,
    /// What the agent is told when it does not hold.
    #[schemars(length(min = 1, max = 1024))]
    pub message: String,
}

/// A JSON Schema inside a structural schema: an object whose inside the API server keeps but does not judge.
fn json_schema_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true, "maxProperties": 64 })
}
