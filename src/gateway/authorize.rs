//! Whether one call may leave: its target against the class's list, and its intent against the log.
//!
//! Promises: pure, and by what pack, contracts and log say now: a call goes where its witnessed intent says that it goes, and
//! nowhere else, whatever the harness in the pod has become. Refuses: a target that could be read in two ways, and
//! a credential over a connection that is not encrypted.

use http::{HeaderMap, Method, uri::PathAndQuery};
use serde_json::{Map, Value};

use super::{cluster::Compiled, refusal::Refused, witness::IntentFacts};
use crate::{
    api::policy_pack::Credential,
    canonical,
    evidence::record::Channel,
    policy::{
        config::{EgressUse, HttpUpstream, SideEffect, Upstream},
        egress,
        hostname::{Authority, AuthorityError},
        json,
        rule::Rule,
        template::Request,
    },
};

/// An absolute `http` or `https` URL, parsed once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Whether it is dialled with TLS.
    pub secure: bool,
    /// Host and port.
    pub authority: Authority,
    /// Path and query, `/` at least.
    pub path: PathAndQuery,
}

impl Target {
    /// Reads an absolute URL.
    ///
    /// # Errors
    /// [`Rule::Request`] if it is no such URL, [`Rule::EgressHost`] or [`Rule::EgressPort`] if its host or port is none.
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
        Ok(Self {
            secure,
            authority: self::authority(authority.as_str(), Some(if secure { 443 } else { 80 }))?,
            path: uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")),
        })
    }

    /// What `Host` says: the port only where it is not the scheme's own.
    pub fn host_header(&self) -> String {
        match (self.secure, self.authority.port) {
            (true, 443) | (false, 80) => self.authority.host.to_string(),
            _ => self.authority.to_string(),
        }
    }
}

/// Reads `host:port`.
///
/// # Errors
/// [`Rule::EgressHost`] or [`Rule::EgressPort`].
pub fn authority(text: &str, default_port: Option<u16>) -> Result<Authority, Refused> {
    Authority::parse(text, default_port).map_err(|error| match error {
        AuthorityError::Host(_) => Refused::denied(Rule::EgressHost, error.to_string()),
        AuthorityError::Port => Refused::denied(Rule::EgressPort, error.to_string()),
    })
}

/// Where a call goes.
#[derive(Clone, Copy, Debug)]
pub enum Destination<'a> {
    /// One HTTP request, and its method.
    Url(&'a Target, &'a Method),
    /// An opaque tunnel.
    Tunnel(&'a Authority),
}

impl Destination<'_> {
    /// Host and port.
    pub fn authority(&self) -> &Authority {
        match self {
            Self::Url(target, _) => &target.authority,
            Self::Tunnel(authority) => authority,
        }
    }
}

/// The list's entry for a call: whether the class lets it go there at all. Gives the entry's credential.
///
/// # Errors
/// See [`egress::allow`]; [`Rule::UpstreamCredential`] if the entry's credential would travel in the clear.
pub fn listed(compiled: &Compiled, channel: Channel, to: Destination<'_>) -> Result<Option<Credential>, Refused> {
    let purpose = match channel {
        Channel::Tool | Channel::Listing => EgressUse::Tools,
        Channel::Model => EgressUse::Models,
        Channel::Egress => EgressUse::Direct,
    };
    let index = egress::allow(&compiled.egress, to.authority(), purpose)?;
    // The agent's own traffic never carries a credential: the schema refuses such an entry, and so does this.
    let credential = match channel {
        Channel::Egress => None,
        _ => compiled.credentials.get(index).cloned().flatten(),
    };
    match (to, credential) {
        (_, None) => Ok(None),
        (Destination::Url(Target { secure: true, .. }, _), credential) => Ok(credential),
        _ => Err(Refused::denied(
            Rule::UpstreamCredential,
            format!("{} has a credential in the pack, which is sent over https only", to.authority()),
        )),
    }
}

/// Whether the witnessed intent is for this very call, and the contracts as they are now still allow it.
///
/// # Errors
/// [`Rule::IntentMissing`] if the intent is for something else; tool and model rules if the policy has changed.
pub fn intended(
    compiled: &Compiled,
    attempt: i64,
    channel: Channel,
    to: Destination<'_>,
    intent: &IntentFacts,
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
        (Channel::Egress, _) => match Authority::parse(&intent.target, None) {
            Ok(target) if target == *to.authority() => Ok(()),
            _ => elsewhere(),
        },
        (Channel::Tool, Destination::Url(target, method)) => {
            let Some(tool) = compiled.policy.tool(&intent.target) else {
                return Err(Refused::denied(
                    Rule::ToolKnown,
                    format!("no contract of the task is for the tool {:?} any more", intent.target),
                ));
            };
            let effect = tool.side_effect;
            let tighter = intent.effect.filter(|found| *found >= effect);
            let allowed = |effect| compiled.policy.allowed_effects.contains(effect);
            if !tighter.as_ref().is_some_and(allowed) || !allowed(&effect) {
                return Err(Refused::denied(
                    Rule::ToolEffect,
                    format!(
                        "the tool {} has effect {}; the intent names none that is as tight, or the class does not allow it",
                        tool.name,
                        effect.as_str()
                    ),
                ));
            }
            match &tool.upstream {
                Upstream::Mcp(mcp) => {
                    if Target::parse(&mcp.url).as_ref() != Ok(target) || *method != Method::POST {
                        return elsewhere();
                    }
                    if intent.definition.is_none()
                        || mcp.digest.as_ref().is_some_and(|pin| intent.definition.as_ref() != Some(pin))
                    {
                        return Err(Refused::denied(
                            Rule::ToolChanged,
                            format!(
                                "expected an intent by the definition {} of {}, found {}",
                                mcp.digest.as_deref().unwrap_or("that was listed"),
                                tool.name,
                                intent.definition.as_deref().unwrap_or("none")
                            ),
                        ));
                    }
                }
                Upstream::Http(http) => {
                    let request = Request::parse(http).map_err(|e| Refused::malformed(e.to_string()))?;
                    let (path, query) = (target.path.path(), target.path.query());
                    if !request.is_instance(method.as_str(), target.secure, &target.authority, path, query) {
                        return missing(format!(
                            "the intent is for {}, whose request is {} {}; this is none by that template",
                            intent.target,
                            http.method.as_str(),
                            http.url
                        ));
                    }
                }
            }
            if tool.idempotency.is_some() != intent.key.is_some() {
                return Err(Refused::denied(
                    Rule::ToolIdempotency,
                    format!("expected an intent of {} by its contract's idempotency, found another", tool.name),
                ));
            }
            // Once its outcome is in the log the call is over. What comes could be the call again, which for a read is no harm.
            if !intent.open && intent.effect != Some(SideEffect::Read) {
                return missing(format!("the call {:?} has its outcome already", intent.call));
            }
            Ok(())
        }
        (Channel::Listing, Destination::Url(target, method)) => {
            if ![Method::POST, Method::GET, Method::DELETE].contains(method) {
                return missing(format!("expected POST, GET or DELETE to an MCP server, found {method}"));
            }
            let upstream = compiled.policy.tool(&intent.target).map(|tool| &tool.upstream);
            // The session that a listing opened outlives it: see `says`, by which it carries no calls.
            match upstream {
                Some(Upstream::Mcp(mcp)) if Target::parse(&mcp.url).as_ref() == Ok(target) => Ok(()),
                _ => elsewhere(),
            }
        }
        (Channel::Model, Destination::Url(target, _)) => {
            let models = &compiled.policy.models;
            let path = intent.target.split('?').next().unwrap_or_default();
            let is_endpoint = |base: &String| {
                Target::parse(base).is_ok_and(|base| {
                    (base.secure, &base.authority) == (target.secure, &target.authority)
                        && target.path.path() == format!("{}{path}", base.path.path().trim_end_matches('/'))
                })
            };
            if models.openai.iter().chain(&models.anthropic).any(is_endpoint) {
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

/// Whether a request's body says what it is: a message to an MCP server, or a call that people saw. [`content`] judges it then.
pub fn is_judged(compiled: &Compiled, channel: Channel, method: &Method, intent: &IntentFacts) -> bool {
    is_message(compiled, channel, method, intent) || intent.approval.is_some()
}

/// Whether what is sent is what the intent is for, and `approved`, the arguments that people saw, where they did.
///
/// # Errors
/// [`Rule::IntentMissing`] for a message to an MCP server that is something else, [`Rule::Request`] for none, [`Rule::ToolApproval`] for
/// a request that is not the approved one.
pub fn content(
    compiled: &Compiled,
    channel: Channel,
    to: (&Target, &Method),
    intent: &IntentFacts,
    approved: Option<&Value>,
    body: &[u8],
) -> Result<(), Refused> {
    let (target, method) = to;
    if is_message(compiled, channel, method, intent) {
        return says(compiled, channel, intent, body);
    }
    match (compiled.policy.tool(&intent.target).map(|tool| &tool.upstream), approved) {
        (Some(Upstream::Http(http)), Some(args)) => as_approved(http, target, args, body),
        _ => Ok(()),
    }
}

/// Whether a request is the one that the contract's template makes of the arguments that people approved.
///
/// # Errors
/// [`Rule::ToolApproval`] if it is another.
fn as_approved(http: &HttpUpstream, target: &Target, args: &Value, body: &[u8]) -> Result<(), Refused> {
    let denied = |reason: String| Refused::denied(Rule::ToolApproval, reason);
    let args = args.as_object().ok_or_else(|| denied("expected approved arguments to be an object".into()))?;
    let request = Request::parse(http).map_err(|e| denied(e.to_string()))?;
    let made = request.render(args).map_err(|e| denied(e.reason))?;
    let found = (!body.is_empty()).then(|| json::parse(body)).transpose().map_err(|e| denied(e.to_string()))?;
    if Target::parse(&made.url).as_ref() != Ok(target) || found != made.body.map(Value::Object) {
        return Err(denied(format!("expected the request that was approved, found another to {}", target.authority)));
    }
    Ok(())
}

/// Whether a request carries the idempotency key of its intent, where its contract sends one.
///
/// # Errors
/// [`Rule::ToolIdempotency`] if it does not.
pub fn carries_key(compiled: &Compiled, intent: &IntentFacts, headers: &HeaderMap) -> Result<(), Refused> {
    let tool = compiled.policy.tool(&intent.target);
    let Some(header) = tool.and_then(|tool| tool.idempotency.as_ref()?.header.as_ref()) else { return Ok(()) };
    let mut found = headers.get_all(header).into_iter();
    match (found.next(), found.next(), &intent.key) {
        (Some(one), None, Some(key)) if one.as_bytes() == key.as_bytes() => Ok(()),
        _ => Err(Refused::denied(
            Rule::ToolIdempotency,
            format!("expected the header {header} with the key of the intent, once; found another or none"),
        )),
    }
}

/// Whether a request is a message to an MCP server, which [`says`] judges.
fn is_message(compiled: &Compiled, channel: Channel, method: &Method, intent: &IntentFacts) -> bool {
    let tool = compiled.policy.tool(&intent.target);
    let is_mcp = tool.is_some_and(|tool| matches!(tool.upstream, Upstream::Mcp(_)));
    let talks = channel == Channel::Listing || (channel == Channel::Tool && is_mcp);
    talks && method == Method::POST
}

/// Whether a message to an MCP server is what its channel is for: a call of the intent's tool, or the session's own talk.
///
/// # Errors
/// [`Rule::IntentMissing`] if it is something else, [`Rule::Request`] if it is no message.
fn says(compiled: &Compiled, channel: Channel, intent: &IntentFacts, body: &[u8]) -> Result<(), Refused> {
    let malformed =
        |e: &dyn std::fmt::Display| Refused::malformed(format!("expected one JSON-RPC message to an MCP server: {e}"));
    // Read as strictly as the harness reads what the agent writes: two readers of it cannot disagree.
    let message = json::parse(body).map_err(|e| malformed(&e))?;
    let message: Said = serde_json::from_value(message).map_err(|e| malformed(&e))?;
    let tool = compiled.policy.tool(&intent.target);
    let (named, arguments) = message.params.map(|params| (params.name, params.arguments)).unwrap_or_default();
    if channel == Channel::Tool {
        let arguments = arguments.unwrap_or_else(|| Value::Object(Map::new()));
        let digest = canonical::digest(&arguments).map(hex::encode).map_err(|e| malformed(&e))?;
        if intent.request_digest.as_ref() != Some(&digest) {
            return Err(Refused::denied(
                Rule::IntentMissing,
                format!(
                    "expected the arguments of digest {} that the intent names, found others of {digest}",
                    intent.request_digest.as_deref().unwrap_or("none")
                ),
            ));
        }
    }
    let fits = match (channel, message.method.as_deref()) {
        (Channel::Tool, Some("tools/call")) => {
            matches!(tool.map(|tool| &tool.upstream), Some(Upstream::Mcp(mcp)) if named.as_ref() == Some(&mcp.tool))
        }
        // A message without a method answers the server.
        (Channel::Listing, Some("initialize" | "server/discover" | "tools/list" | "ping") | None) => true,
        (Channel::Listing, Some(method)) => method.starts_with("notifications/"),
        _ => false,
    };
    if fits {
        return Ok(());
    }
    Err(Refused::denied(
        Rule::IntentMissing,
        format!(
            "expected a message that the {} intent for {} is for, found {:?} of {:?}",
            channel.as_str(),
            intent.target,
            message.method.unwrap_or_default(),
            named.unwrap_or_default()
        ),
    ))
}

/// What of a JSON-RPC message says what it does.
#[derive(serde::Deserialize)]
struct Said {
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    params: Option<SaidOf>,
}

#[derive(serde::Deserialize)]
struct SaidOf {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    arguments: Option<Value>,
}

#[cfg(test)]
mod tests;
