//! The decision whether one call may leave: its destination is checked against the class's egress hosts, its intent against the log.
//!
//! Guarantees: the functions are pure and use the newest pack, contracts and log. A call goes where its witnessed intent says and nowhere
//! else, even if the harness in the pod is compromised. The contract and the pack of a tool call are evaluated again with the very
//! arguments that are sent, and the gateway itself builds the request of an HTTP tool from them.
//!
//! Denies: a destination that could be read in two ways, and a credential over a connection that is not encrypted.

/// Checks of model requests.
pub mod model;

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request as HttpRequest,
    header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, USER_AGENT},
    uri::PathAndQuery,
};
use serde_json::{Map, Value};

use super::{compiled::Compiled, refusal::Refused, witness::IntentFacts};
use crate::{
    api::policy_pack::Credential,
    canonical,
    evidence::record::Channel,
    policy::{
        access::{AccessDecision, AccessRequest},
        commit::Salt,
        config::{EgressUse, SideEffect, Tool, Upstream},
        cost,
        decide::Denial,
        egress,
        hostname::{Authority, AuthorityError, Hostname},
        json,
        model::api::Api,
        rule::Rule,
        template::Request,
    },
};

/// The `accept` header of HTTP tools' requests. The harness handles a reply by the content type that the reply has.
const ACCEPTED: HeaderValue = HeaderValue::from_static("application/json, text/*;q=0.9, image/*;q=0.5, audio/*;q=0.5");
/// The `user-agent` header of HTTP tools' requests.
const AGENT: HeaderValue = HeaderValue::from_static(concat!("belay/", env!("CARGO_PKG_VERSION")));

/// An absolute `http` or `https` URL, parsed once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Whether it uses TLS.
    pub secure: bool,
    /// Host and port.
    pub authority: Authority,
    /// Path and query, at least `/`.
    pub path: PathAndQuery,
}

impl Target {
    /// Parses an absolute URL.
    ///
    /// # Errors
    /// Returns [`Rule::Request`] if it is not such a URL, [`Rule::EgressHost`] if its host is invalid, or [`Rule::EgressPort`] if its port
    /// is invalid.
    pub fn parse(text: &str) -> Result<Self, Refused> {
        let malformed = || Refused::malformed("expected an absolute http or https URL without userinfo and fragment");
        if text.contains('#') {
            return Err(malformed());
        }
        let uri: http::Uri = text.parse().map_err(|_| malformed())?;
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(malformed()),
        };
        let authority = uri.authority().ok_or_else(malformed)?;
        let path = match uri.path_and_query() {
            // `http` keeps `?x` as it is, and does not take it for equal to `/?x`, which is what it sends.
            Some(path) if !path.as_str().starts_with('/') => path.to_string().parse().map_err(|_| malformed())?,
            Some(path) => path.clone(),
            None => PathAndQuery::from_static("/"),
        };
        Ok(Self { secure, authority: self::authority(authority.as_str(), Some(if secure { 443 } else { 80 }))?, path })
    }

    /// Returns the value of `Host`: with the port only if it is not the scheme's default.
    pub fn host_header(&self) -> String {
        match (self.secure, self.authority.port) {
            (true, 443) | (false, 80) => self.authority.host.to_string(),
            _ => self.authority.to_string(),
        }
    }
}

/// Parses `host:port`.
///
/// # Errors
/// Returns [`Rule::EgressHost`] or [`Rule::EgressPort`].
pub fn authority(text: &str, default_port: Option<u16>) -> Result<Authority, Refused> {
    Authority::parse(text, default_port).map_err(|error| match error {
        AuthorityError::Host(_) => Refused::denied(Rule::EgressHost, error.to_string()),
        AuthorityError::Port => Refused::denied(Rule::EgressPort, error.to_string()),
    })
}

/// The destination of a call.
#[derive(Clone, Copy, Debug)]
pub enum Destination<'a> {
    /// One HTTP request and its method.
    Url(&'a Target, &'a Method),
    /// A tunnel.
    Tunnel(&'a Authority),
}

impl Destination<'_> {
    /// Returns host and port.
    pub fn authority(&self) -> &Authority {
        match self {
            Self::Url(target, _) => &target.authority,
            Self::Tunnel(authority) => authority,
        }
    }
}

/// Checks that the class has an egress host for a call, and returns the credential of that entry.
///
/// # Errors
/// See [`egress::allow`]. Returns [`Rule::UpstreamCredential`] if the entry's credential would be sent in the clear. `stays_here` returns
/// whether data sent to a host never leaves this machine ([`Dialer::stays_here`](super::dial::Dialer::stays_here)).
pub fn listed(
    compiled: &Compiled,
    channel: Channel,
    to: Destination<'_>,
    stays_here: impl FnOnce(&Hostname) -> bool,
) -> Result<Option<Credential>, Refused> {
    let purpose = match channel {
        Channel::Tool | Channel::Listing => EgressUse::Tools,
        Channel::Model => EgressUse::Models,
        Channel::Egress => EgressUse::Direct,
    };
    let index = egress::allow(&compiled.policy.egress, to.authority(), purpose)?;
    // The agent's own traffic never carries a credential. The schema rejects such an entry, and this code uses no credential of one.
    let credential = match channel {
        Channel::Egress => None,
        _ => compiled.credentials.get(index).cloned().flatten(),
    };
    match (to, credential) {
        (_, None) => Ok(None),
        (Destination::Url(Target { secure: true, .. }, _), credential) => Ok(credential),
        (Destination::Url(..), credential) if stays_here(&to.authority().host) => Ok(credential),
        _ => Err(Refused::denied(
            Rule::UpstreamCredential,
            format!(
                "{} has a credential in the pack, which the gateway sends over https only; write https:// in its URL, or remove the credential",
                to.authority()
            ),
        )),
    }
}

/// Checks that the witnessed intent is for this very call, and that the contracts as they are now still allow it.
///
/// # Errors
/// Returns [`Rule::IntentMissing`] if the intent is for something else, or a tool or model rule if the policy has changed.
pub fn intended(
    compiled: &Compiled,
    attempt: i64,
    channel: Channel,
    to: Destination<'_>,
    (intent, salt): (&IntentFacts, &Salt),
) -> Result<(), Refused> {
    let missing = |reason: String| Err(Refused::denied(Rule::IntentMissing, reason));
    if intent.attempt != attempt || intent.channel != channel {
        return missing(format!(
            "expected an intent of attempt {attempt} for the {} channel, found one of attempt {} for {}",
            channel.as_str(),
            intent.attempt,
            intent.channel.as_str()
        ));
    }
    let elsewhere = || missing(format!("the intent is for {}, not for {}", intent.target, to.authority()));
    match (channel, to) {
        (Channel::Egress, _) if intent.target == compiled.redactor.authority(to.authority(), salt) => is_open(intent),
        (Channel::Egress, _) => elsewhere(),
        (Channel::Tool, Destination::Url(target, method)) => {
            let tool = resolve_tool(compiled, attempt, intent)?;
            let Upstream::Mcp(mcp) = &tool.upstream else {
                return missing(format!(
                    "expected a call of {} at {}, where the gateway makes its request, found a request",
                    tool.name,
                    crate::wire::CALL
                ));
            };
            if Target::parse(&mcp.url).as_ref() != Ok(target) || *method != Method::POST {
                return elsewhere();
            }
            if intent.definition.is_none()
                || mcp.digest.as_ref().is_some_and(|pin| intent.definition.as_ref() != Some(pin))
            {
                return Err(Refused::denied(
                    Rule::ToolChanged,
                    format!(
                        "expected an intent with the definition {} of {}, found {}",
                        mcp.digest.as_deref().unwrap_or("that was listed"),
                        tool.name,
                        intent.definition.as_deref().unwrap_or("none")
                    ),
                ));
            }
            Ok(())
        }
        (Channel::Listing, Destination::Url(target, method)) => {
            if ![Method::POST, Method::GET, Method::DELETE].contains(method) {
                return missing(format!("expected POST, GET or DELETE to an MCP server, found {method}"));
            }
            let upstream = compiled.policy.tool(&intent.target).map(|tool| &tool.upstream);
            // A session outlives the listing that opened it, but `says` allows no calls by the listing's intent.
            match upstream {
                Some(Upstream::Mcp(mcp)) if Target::parse(&mcp.url).as_ref() == Ok(target) => Ok(()),
                _ => elsewhere(),
            }
        }
        (Channel::Model, Destination::Url(target, method)) => {
            is_open(intent)?;
            let path = intent.target.split_once('?').map_or(intent.target.as_str(), |(path, _)| path);
            let expected = Api::of_path(path).map_or("POST", Api::method);
            if method.as_str() != expected {
                return missing(format!("expected {expected} to a model endpoint, found {method}"));
            }
            let urls = compiled.policy.models.urls(&intent.target);
            if urls.iter().any(|url| Target::parse(url).as_ref() == Ok(target)) {
                return Ok(());
            }
            Err(Refused::denied(
                Rule::ModelEndpoint,
                format!("{} is not {} at one of the pack's model endpoints", to.authority(), intent.target),
            ))
        }
        (_, Destination::Tunnel(_)) => Err(Refused::denied(
            Rule::EgressDirect,
            "a tunnel is for the agent's own traffic (channel egress) only".to_owned(),
        )),
    }
}

/// Returns the tool that a witnessed intent is to call, if its contract and class as they are now still allow it, whatever the arguments.
///
/// # Errors
/// Returns [`Rule::IntentMissing`] if the intent is for something else or has its outcome, or a tool rule if the policy has changed.
pub fn resolve_tool<'c>(compiled: &'c Compiled, attempt: i64, intent: &IntentFacts) -> Result<&'c Tool, Refused> {
    let missing = |reason: String| Err(Refused::denied(Rule::IntentMissing, reason));
    if intent.attempt != attempt || intent.channel != Channel::Tool {
        return missing(format!(
            "expected an intent of attempt {attempt} for a tool, found one of attempt {} for {}",
            intent.attempt,
            intent.channel.as_str()
        ));
    }
    let Some(tool) = compiled.policy.tool(&intent.target) else {
        return Err(Refused::denied(
            Rule::ToolUnknown,
            format!("no contract of the task is for the tool {:?} any more", intent.target),
        ));
    };
    let effect = tool.side_effect;
    // What an MCP server says about its tool can only turn a read into a write.
    let is_tightened = matches!(tool.upstream, Upstream::Mcp(_))
        && (effect, intent.side_effect) == (SideEffect::Read, Some(SideEffect::Write));
    let allowed = |effect| compiled.policy.allowed_effects.contains(effect);
    let tight = intent.side_effect.filter(|found| *found == effect || is_tightened);
    if !tight.as_ref().is_some_and(allowed) || !allowed(&effect) {
        return Err(Refused::denied(
            Rule::ToolEffect,
            format!(
                "the tool {} has side effect {}; the intent names another side effect, or the class does not allow it",
                tool.name,
                effect.as_str()
            ),
        ));
    }
    if tool.idempotency.is_some() != intent.key.is_some() {
        return Err(Refused::denied(
            Rule::ToolIdempotency,
            format!(
                "expected an intent of {} with an idempotency key if, and only if, its contract has idempotency",
                tool.name
            ),
        ));
    }
    is_open(intent)?;
    Ok(tool)
}

/// Checks that a call has no outcome yet. After the outcome is in the log, a request could be a repetition of the call.
fn is_open(intent: &IntentFacts) -> Result<(), Refused> {
    if intent.open {
        return Ok(());
    }
    Err(Refused::denied(Rule::IntentMissing, format!("the call {:?} has its outcome already", intent.call)))
}

/// Builds the request of an HTTP tool's call from its arguments by the contract as it is now, without a credential.
///
/// # Errors
/// Returns [`Rule::IntentMissing`] if the intent is for something else, [`Rule::ToolUrl`] if no request can be built from the arguments, or
/// another rule of the tool.
pub fn request(
    compiled: &Compiled,
    attempt: i64,
    intent: &IntentFacts,
    arguments: &Value,
) -> Result<(Target, HttpRequest<Bytes>), Refused> {
    let tool = resolve_tool(compiled, attempt, intent)?;
    let Upstream::Http(http) = &tool.upstream else {
        let reason = format!("expected an HTTP tool, found {}, whose calls go to an MCP server", tool.name);
        return Err(Refused::denied(Rule::IntentMissing, reason));
    };
    // The evidence of the attempt says where calls go, by the contract as it was when the attempt began.
    if intent.http.as_deref() != Some(http) {
        let reason = format!("the contract of {} has another request than when the attempt began", tool.name);
        return Err(Refused::denied(Rule::IntentMissing, reason));
    }
    if intent.definition.is_some() {
        let reason = format!("expected an intent of {} without a definition, as HTTP tools have none", tool.name);
        return Err(Refused::denied(Rule::ToolChanged, reason));
    }
    let arguments = arguments.as_object().ok_or_else(|| Refused::malformed("expected arguments as a JSON object"))?;
    let malformed = |e: &dyn std::fmt::Display| Refused::malformed(e.to_string());
    let rendered = Request::parse(http).map_err(|e| malformed(&e))?.render(arguments);
    let rendered = rendered.map_err(|denial| Refused::denied(denial.rule, denial.reason))?;
    let body = match &rendered.body {
        Some(body) => serde_json::to_vec(body).map_err(|e| malformed(&e))?,
        None => Vec::new(),
    };
    let mut request = HttpRequest::new(Bytes::from(body));
    *request.method_mut() = rendered.method.as_str().parse().map_err(|e| malformed(&e))?;
    let headers = request.headers_mut();
    headers.insert(ACCEPT, ACCEPTED);
    // The gateway passes bytes on unchanged, and the harness does not decompress them.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers.insert(USER_AGENT, AGENT);
    if rendered.body.is_some() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    let header = tool.idempotency.as_ref().and_then(|of| of.header.as_deref());
    if let Some((header, key)) = header.zip(intent.key.as_deref()) {
        let name = http::HeaderName::try_from(header).map_err(|e| malformed(&e))?;
        headers.insert(name, HeaderValue::from_str(key).map_err(|e| malformed(&e))?);
    }
    Ok((Target::parse(&rendered.url)?, request))
}

/// Parses the arguments of a call and checks that they are those of its intent.
///
/// # Errors
/// Returns [`Rule::Request`] if the arguments could be read in two ways, or [`Rule::IntentMissing`] if they are others.
pub fn arguments(intent: &IntentFacts, salt: &Salt, body: &[u8]) -> Result<Value, Refused> {
    // Parse as strictly as the harness parses what the agent writes, so that the two cannot disagree.
    let arguments = json::parse(body).map_err(|e| Refused::malformed(format!("expected arguments as JSON: {e}")))?;
    let arguments = json::whole(arguments);
    are_intended(intent, salt, &arguments)?;
    Ok(arguments)
}

/// Checks that arguments are those of an intent.
///
/// # Errors
/// Returns [`Rule::IntentMissing`] if they are others.
pub fn are_intended(intent: &IntentFacts, salt: &Salt, arguments: &Value) -> Result<(), Refused> {
    let digest = salt.value(arguments).map_err(|e| Refused::malformed(e.to_string()))?;
    if intent.request_commitment.as_ref() == Some(&digest) {
        return Ok(());
    }
    Err(Refused::denied(
        Rule::IntentMissing,
        format!(
            "expected arguments with the digest {} of the intent, found arguments with {digest}",
            intent.request_commitment.as_deref().unwrap_or("none")
        ),
    ))
}

/// Checks that a body is the one that its intent commits to. It is a model request's or the agent's own, which are not parsed here. A
/// request that closes an MCP session has no body.
///
/// # Errors
/// Returns [`Rule::IntentMissing`] if it is another body.
pub fn is_intended(channel: Channel, intent: &IntentFacts, salt: &Salt, body: &[u8]) -> Result<(), Refused> {
    let missing = |reason: String| Err(Refused::denied(Rule::IntentMissing, reason));
    if channel == Channel::Listing {
        return match body.len() {
            0 => Ok(()),
            found => missing(format!("expected no body, found one of {found} bytes")),
        };
    }
    let digest = salt.bytes(body);
    if intent.request_commitment.as_ref() == Some(&digest) {
        return Ok(());
    }
    missing(format!(
        "expected a body with the digest {} of the intent, found a body with {digest}",
        intent.request_commitment.as_deref().unwrap_or("none")
    ))
}

/// Which approvals a call needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needed {
    /// Whether the contract requires approval.
    pub by_contract: bool,
    /// The reasons for which the pack requires approval, empty if it does not.
    pub reasons: Vec<String>,
}

/// Checks that contract and pack allow a call with these arguments. The harness has checked the same before.
///
/// # Errors
/// Returns the first rule that the call violates.
pub fn judge(compiled: &Compiled, intent: &IntentFacts, arguments: &Value) -> Result<Needed, Refused> {
    let denied = |denial: Denial| Refused::denied(denial.rule, denial.reason);
    let (Some(tool), Some(side_effect)) = (compiled.policy.tool(&intent.target), intent.side_effect) else {
        return Err(Refused::denied(Rule::ToolUnknown, format!("no contract is for {:?} any more", intent.target)));
    };
    let length = canonical::to_bytes(arguments).map_err(|e| Refused::malformed(e.to_string()))?.len();
    compiled.contracts.is_short(&intent.target, length).map_err(denied)?;
    let by_contract = compiled.contracts.check_stateless(&intent.target, arguments).map_err(denied)?;
    let asked = AccessRequest { tool, side_effect, usage: intent.usage, seen: intent.seen };
    let AccessDecision { assessment, reasons } = compiled.guard.judge(asked, arguments).map_err(denied)?;
    // If the pack has changed since the attempt began, the assessments may differ, and the newest pack decides.
    if *intent.policy == *compiled.digest && assessment != intent.assessment {
        return Err(Refused::denied(
            Rule::AccessRule,
            format!("expected an intent with the assessment {assessment:?}, found {:?}", intent.assessment),
        ));
    }
    Ok(Needed { by_contract, reasons })
}

/// Returns whether [`judge`] takes microseconds for arguments whose encoding has `length` bytes.
pub fn is_bounded_cost(compiled: &Compiled, intent: &IntentFacts, length: usize) -> bool {
    length <= cost::SHORT && compiled.contracts.is_bounded_cost(&intent.target) && compiled.guard.is_bounded_cost()
}

/// Returns whether a request is a message to an MCP server, which [`parse_mcp_message`] checks.
pub fn is_message(compiled: &Compiled, channel: Channel, method: &Method, intent: &IntentFacts) -> bool {
    let tool = compiled.policy.tool(&intent.target);
    let is_mcp = tool.is_some_and(|tool| matches!(tool.upstream, Upstream::Mcp(_)));
    let talks = channel == Channel::Listing || (channel == Channel::Tool && is_mcp);
    talks && method == Method::POST
}

/// Parses a message to an MCP server and checks it against the channel and the intent. Returns the arguments of a tool call, or `None` for
/// a session message.
///
/// # Errors
/// Returns [`Rule::IntentMissing`] if the message is something else, or [`Rule::Request`] if it is not a message.
pub fn parse_mcp_message(
    compiled: &Compiled,
    channel: Channel,
    (intent, salt): (&IntentFacts, &Salt),
    body: &[u8],
) -> Result<Option<Value>, Refused> {
    let malformed =
        |e: &dyn std::fmt::Display| Refused::malformed(format!("expected one JSON-RPC message to an MCP server: {e}"));
    let message = json::parse(body).map_err(|e| malformed(&e))?;
    if channel == Channel::Tool && has_more(&message) {
        return Err(malformed(&"a call has only name, arguments and _meta"));
    }
    let message: Said = serde_json::from_value(message).map_err(|e| malformed(&e))?;
    let tool = compiled.policy.tool(&intent.target);
    let (named, arguments) = message.params.map(|params| (params.name, params.arguments)).unwrap_or_default();
    let arguments = match channel {
        Channel::Tool => {
            let arguments = json::whole(arguments.unwrap_or_else(|| Value::Object(Map::new())));
            are_intended(intent, salt, &arguments)?;
            Some(arguments)
        }
        _ => None,
    };
    let fits = match (channel, message.method.as_deref()) {
        (Channel::Tool, Some("tools/call")) => {
            matches!(tool.map(|tool| &tool.upstream), Some(Upstream::Mcp(mcp)) if named.as_ref() == Some(&mcp.tool))
        }
        // A message without a method is a response to the server.
        (Channel::Listing, Some("initialize" | "server/discover" | "tools/list" | "ping") | None) => true,
        (Channel::Listing, Some(method)) => method.starts_with("notifications/"),
        _ => false,
    };
    // A session outlives the listing that opened it, but only an open listing may list tools.
    if fits && message.method.as_deref() == Some("tools/list") {
        is_open(intent)?;
    }
    if fits {
        return Ok(arguments);
    }
    Err(Refused::denied(
        Rule::IntentMissing,
        format!(
            "expected a message that the {} intent for {} allows, found {:?} of {:?}",
            channel.as_str(),
            intent.target,
            message.method.unwrap_or_default(),
            named.unwrap_or_default()
        ),
    ))
}

/// The members that a call may have. No others are allowed, because a server that compares names loosely could read `Arguments` in place of
/// `arguments`.
const CALL_MEMBERS: [&str; 4] = ["jsonrpc", "id", "method", "params"];
const CALL_PARAMS: [&str; 3] = ["name", "arguments", "_meta"];

/// Returns whether a message has members that a call does not have.
fn has_more(message: &Value) -> bool {
    let only = |value: Option<&Value>, names: &[&str]| {
        value.and_then(Value::as_object).is_none_or(|members| members.keys().all(|name| names.contains(&name.as_str())))
    };
    !only(Some(message), &CALL_MEMBERS) || !only(message.get("params"), &CALL_PARAMS)
}

/// The members of a JSON-RPC message that say what it does.
#[derive(serde::Deserialize)]
struct Said {
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    params: Option<JsonRpcParams>,
}

#[derive(serde::Deserialize)]
struct JsonRpcParams {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    arguments: Option<Value>,
}

#[cfg(test)]
mod tests;
