//! Checks and renders a contract: one tool, as it is enforced.
//!
//! Guarantees: One pass finds everything that is wrong with a contract on its own, and names it by its field. What is rendered compiles.
//!
//! Non-goals: What a class or a pack says about the tool, see [`task`](crate::render::task).

use kube::ResourceExt;

use super::{Finding, approval, condition, schema};
use crate::{
    api::{
        ToolContract,
        tool_contract::{self, ToolContractSpec},
    },
    canonical::{self, LARGEST_WHOLE},
    policy::{
        config::{
            Compensation, HttpUpstream, Idempotency, Rollback, SideEffect, Tool, ToolLimits, Upstream, VerifyRead,
        },
        hostname::Authority,
        template::Request,
    },
};

/// Checks a contract on its own, whatever names it, and returns the tool as it is enforced.
///
/// # Errors
/// Returns everything that is wrong, at once.
pub fn check_contract(contract: &ToolContract) -> Result<Tool, Vec<Finding>> {
    let (name, spec) = (contract.name_any(), &contract.spec);
    let at = |field: &str| format!("ToolContract/{name} spec.{field}");
    let mut findings = Vec::new();
    let upstream = upstream(spec, &at, &mut findings);
    for (index, condition) in spec.preconditions.iter().enumerate() {
        if let Err(error) = condition::check(&condition.cel) {
            findings.push(Finding::new(
                at(&format!("preconditions[{index}].cel")),
                format!("a CEL expression over {}", condition::VARIABLES.join(", ")),
                format!("{error} (precondition `{}`)", condition.name),
                "correct the expression",
            ));
        }
    }
    let mut judged = |field: &str, judged: Result<serde_json::Value, Vec<schema::SchemaError>>| {
        let wrong = |error: schema::SchemaError| {
            let field = at(&format!("{field}{}", error.pointer.replace('/', ".")));
            Finding::new(field, error.expected, error.found, "correct the schema")
        };
        judged.map_err(|errors| findings.extend(errors.into_iter().map(wrong))).ok()
    };
    let input = judged("input", schema::close(&spec.input));
    let output =
        spec.output.as_ref().and_then(|output| judged("output", schema::check(output).map(|()| output.clone())));
    if let (Some(Upstream::Http(http)), Some(input)) = (&upstream, &input) {
        places(http, input, &at, &mut findings);
    }
    let limits = tool_limits(spec, &at, &mut findings);
    let idempotency = spec.idempotency.as_ref().map(|of| idempotency(of, spec, &at, &mut findings));
    let verify = spec.verify.as_ref().map(|read| verify_read(read, spec, &at, &mut findings));
    let rollback = spec.rollback.as_ref().and_then(|rollback| self::rollback(rollback, spec, &at, &mut findings));
    let approval = spec.approval.as_ref().map(|approval| approval::render(approval, &at, &mut findings));
    let (Some(upstream), Some(input), true) = (upstream, input, findings.is_empty()) else { return Err(findings) };
    Ok(Tool {
        contract: name,
        name: spec.tool.clone(),
        description: spec.description.clone(),
        upstream,
        input,
        output,
        limits,
        preconditions: spec.preconditions.clone(),
        idempotency,
        verify,
        rollback,
        approval,
        side_effect: spec.side_effect,
        data: spec.data,
        redact: spec.redact.clone(),
    })
}

/// Renders which calls are duplicates.
fn idempotency(
    of: &tool_contract::Idempotency,
    spec: &ToolContractSpec,
    at: &impl Fn(&str) -> String,
    findings: &mut Vec<Finding>,
) -> Idempotency {
    /// Headers that the request itself or the gateway uses.
    const TAKEN: [&str; 12] = [
        "accept",
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "cookie",
        "host",
        "te",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    ];
    let required = spec.input.get("required").and_then(serde_json::Value::as_array);
    let requires = |name: &String| required.is_some_and(|all| all.iter().any(|one| one == name));
    if let Some(name) = of.argument.as_ref().filter(|name| !requires(name)) {
        findings.push(Finding::new(
            at("idempotency.argument"),
            "an argument that `input` requires",
            format!("`{name}`"),
            "add it to input.required, or name another",
        ));
    }
    if let Some(header) = &of.header {
        if spec.upstream.http.is_none() {
            findings.push(Finding::new(
                at("idempotency.header"),
                "none, because MCP has no headers for calls",
                format!("`{header}`"),
                "remove it; an MCP tool that deduplicates has an argument for the key",
            ));
        }
        if TAKEN.contains(&header.as_str()) || header.starts_with("belay-") || header.starts_with("proxy-") {
            findings.push(Finding::new(
                at("idempotency.header"),
                "a header that is free, such as `idempotency-key`",
                format!("`{header}`"),
                "use the one that the upstream documents",
            ));
        }
    }
    if !(1..=604_800).contains(&of.window_seconds) {
        let found = of.window_seconds.to_string();
        findings.push(Finding::new(at("idempotency.windowSeconds"), "1 to 604800", found, "correct it"));
    }
    Idempotency { argument: of.argument.clone(), header: of.header.clone(), window_seconds: of.window_seconds }
}

/// Renders the read that shows whether a call took effect.
fn verify_read(
    read: &tool_contract::VerifyRead,
    spec: &ToolContractSpec,
    at: &impl Fn(&str) -> String,
    findings: &mut Vec<Finding>,
) -> VerifyRead {
    let mut wrong = |field: &str, expected: String, found: String, fix: &str| {
        findings.push(Finding::new(at(&format!("verify.{field}")), expected, found, fix));
    };
    if spec.side_effect == SideEffect::Read || read.tool == spec.tool {
        let expected = "the verification of a tool that changes something, by another tool".to_owned();
        wrong("tool", expected, format!("`{}` for `{}`", read.tool, spec.tool), "drop verify, or name another tool");
    }
    if let Err(error) = condition::check_among(&read.applied, &["args", "result"]) {
        wrong("applied", "a CEL expression over args, result".into(), error.to_string(), "correct the expression");
    }
    for (name, pointer) in &read.arguments {
        if !pointer.is_empty() && !pointer.starts_with('/') {
            let field = format!("arguments.{name}");
            wrong(&field, "a JSON Pointer such as `/order`".into(), format!("`{pointer}`"), "begin it with a slash");
        }
    }
    if !(1..=300).contains(&read.settle_seconds) {
        wrong("settleSeconds", "1 to 300".into(), read.settle_seconds.to_string(), "correct it");
    }
    VerifyRead {
        tool: read.tool.clone(),
        arguments: read.arguments.clone(),
        applied: read.applied.clone(),
        settle_seconds: read.settle_seconds,
    }
}

/// Renders how a call is undone.
fn rollback(
    rollback: &tool_contract::Rollback,
    spec: &ToolContractSpec,
    at: &impl Fn(&str) -> String,
    findings: &mut Vec<Finding>,
) -> Option<Rollback> {
    let mut wrong = |field: String, expected: &str, found: String, fix: &str| {
        findings.push(Finding::new(at(&field), expected, found, fix));
    };
    if spec.side_effect == SideEffect::Read {
        let expected = "the rollback of a tool that changes something";
        wrong("rollback".into(), expected, format!("one of `{}`, which reads", spec.tool), "drop rollback");
    }
    let call = match (&rollback.call, &rollback.by_hand) {
        (Some(call), None) => call,
        (None, Some(how)) => return Some(Rollback::ByHand(how.clone())),
        (call, _) => {
            let found = if call.is_some() { "both" } else { "neither" };
            wrong("rollback".into(), "exactly one of call and byHand", found.into(), "set one of them");
            return None;
        }
    };
    for (name, cel) in &call.arguments {
        if let Err(error) = condition::check_among(cel, &["args", "result"]) {
            let field = format!("rollback.call.arguments.{name}");
            wrong(field, "a CEL expression over args, result", error.to_string(), "correct the expression");
        }
    }
    if let Some(seconds) = call.within_seconds.filter(|seconds| !(1..=31_536_000).contains(seconds)) {
        wrong("rollback.call.withinSeconds".into(), "1 to 31536000", seconds.to_string(), "correct it");
    }
    Some(Rollback::Call(Compensation {
        contract: call.contract.clone(),
        arguments: call.arguments.clone(),
        within_seconds: call.within_seconds,
    }))
}

/// Returns the host and port of a contract's upstream, if the upstream is well formed.
pub fn authority_of(upstream: &tool_contract::Upstream) -> Option<Authority> {
    // A new kind must be here, too: hosts without an authority are not checked against the class's egress.
    let tool_contract::Upstream { mcp, http } = upstream;
    match (mcp, http) {
        (Some(mcp), None) => authority(&mcp.url).ok(),
        // The template's host is literal. Its path is not a URL yet.
        (None, Some(http)) => Request::parse(http).ok().map(|request| request.authority().clone()),
        _ => None,
    }
}

/// Renders the contract's one upstream, if it is well formed.
fn upstream(spec: &ToolContractSpec, at: &impl Fn(&str) -> String, findings: &mut Vec<Finding>) -> Option<Upstream> {
    match (&spec.upstream.mcp, &spec.upstream.http) {
        (Some(mcp), None) => {
            if let Some(digest) = mcp.digest.as_ref().filter(|digest| !canonical::is_digest(digest)) {
                findings.push(Finding::new(
                    at("upstream.mcp.digest"),
                    "64 lower-case hexadecimal digits",
                    format!("`{digest}`"),
                    "take the digest from a denial by tool.changed or from an intent in the evidence",
                ));
            }
            if let Err(reason) = authority(&mcp.url) {
                findings.push(Finding::new(
                    at("upstream.mcp.url"),
                    "the URL of an MCP server",
                    format!("`{}`: {reason}", mcp.url),
                    "correct it",
                ));
            }
            Some(Upstream::Mcp(mcp.clone()))
        }
        (None, Some(http)) => {
            if let Err(error) = Request::parse(http) {
                findings.push(Finding::new(
                    at("upstream.http.url"),
                    "a URL with `{name}` in segments of its path only",
                    format!("`{}`: {error}", http.url),
                    "correct the template",
                ));
                return None;
            }
            Some(Upstream::Http(http.clone()))
        }
        (mcp, _) => {
            findings.push(Finding::new(
                at("upstream"),
                "exactly one of mcp and http",
                if mcp.is_some() { "both" } else { "neither" },
                "set one of them",
            ));
            None
        }
    }
}

/// Checks whether every argument that the schema allows has a place in the request, and every place has an argument.
fn places(http: &HttpUpstream, input: &serde_json::Value, at: &impl Fn(&str) -> String, findings: &mut Vec<Finding>) {
    let Ok(request) = Request::parse(http) else { return };
    let properties = input.get("properties").and_then(|properties| properties.as_object());
    let required: Vec<_> = input
        .get("required")
        .and_then(|names| names.as_array())
        .into_iter()
        .flatten()
        .filter_map(|n| n.as_str())
        .collect();
    let in_path: Vec<_> = request.path_arguments().collect();
    for name in in_path.iter().copied().chain(request.query_arguments()) {
        let kind =
            properties.and_then(|all| all.get(name)).and_then(|one| one.get("type")).and_then(|kind| kind.as_str());
        if !matches!(kind, Some("string" | "integer" | "boolean")) {
            findings.push(Finding::new(
                at(&format!("input.properties.{name}.type")),
                "\"string\", \"integer\" or \"boolean\", because the argument goes into the URL",
                kind.map_or_else(|| "nothing".to_owned(), |kind| format!("\"{kind}\"")),
                "describe the argument, or take it out of the URL",
            ));
        }
        if in_path.contains(&name) && !required.contains(&name) {
            findings.push(Finding::new(
                at("input.required"),
                format!("`{name}`, because the path needs it"),
                "a list without it",
                "require the argument",
            ));
        }
    }
    if http.method.has_body() {
        return;
    }
    let placed = |name: &str| in_path.contains(&name) || request.query_arguments().any(|other| other == name);
    for name in properties.into_iter().flat_map(|all| all.keys()).filter(|name| !placed(name)) {
        findings.push(Finding::new(
            at(&format!("input.properties.{name}")),
            format!("an argument that has a place in the URL, because {} has no body", http.method.as_str()),
            "one that has none",
            "list it in upstream.http.query, put it into the path, or drop it",
        ));
    }
    if input.get("additionalProperties") != Some(&serde_json::Value::Bool(false))
        || input.get("patternProperties").is_some()
    {
        findings.push(Finding::new(
            at("input.additionalProperties"),
            format!("false and no patternProperties, because {} has no body for more arguments", http.method.as_str()),
            "a schema that allows more",
            "set it to false; with allOf, anyOf, oneOf or $ref it has to be written out",
        ));
    }
}

fn tool_limits(spec: &ToolContractSpec, at: &impl Fn(&str) -> String, findings: &mut Vec<Finding>) -> ToolLimits {
    let asked = &spec.limits;
    let bounds = [
        ("calls", asked.calls, 0, 1_000_000),
        ("perMinute", asked.per_minute, 1, 60_000),
        ("timeoutSeconds", asked.timeout_seconds, 1, 300),
        ("requestBytes", asked.request_bytes, 2, 4 << 20),
        ("responseBytes", asked.response_bytes, 1, 16 << 20),
    ];
    for (field, asked, least, most) in bounds {
        if let Some(asked) = asked.filter(|asked| !(least..=most).contains(asked)) {
            findings.push(Finding::new(
                at(&format!("limits.{field}")),
                format!("{least} to {most}"),
                asked.to_string(),
                "correct the contract",
            ));
        }
    }
    ToolLimits {
        calls: asked.calls.map(countable),
        per_minute: asked.per_minute.map(countable),
        timeout_seconds: asked.timeout_seconds.map(countable),
        request_bytes: asked.request_bytes.map(countable),
        response_bytes: asked.response_bytes.map(countable),
    }
}

/// Caps a limit at the largest number that records can count to. No count reaches it, and readers of the policy may parse a larger number
/// differently.
pub(super) fn countable(limit: i64) -> i64 {
    limit.min(LARGEST_WHOLE)
}

/// Parses the host and port of a URL.
pub(super) fn authority(url: &str) -> Result<Authority, String> {
    let uri: http::Uri = url.parse().map_err(|error| format!("not a URL ({error})"))?;
    let default_port = match uri.scheme_str() {
        Some("https") => 443,
        Some("http") => 80,
        _ => return Err("neither http nor https".to_owned()),
    };
    let authority = uri.authority().ok_or("no host")?;
    Authority::parse(authority.as_str(), Some(default_port)).map_err(|error| error.to_string())
}
