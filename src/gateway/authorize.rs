//! Whether one call may leave: its target against the class's list, and its intent against the log.
//!
//! Promises: pure, and by what pack, contracts and log say now: a call goes where its witnessed intent says that it goes, and
//! nowhere else, whatever the harness in the pod has become. Refuses: a target that could be read in two ways, and
//! a credential over a connection that is not encrypted.

use http::{Method, uri::PathAndQuery};

use super::{cluster::Compiled, refusal::Refused, witness::IntentFacts};
use crate::{
    api::policy_pack::Credential,
    evidence::record::Channel,
    policy::{
        config::{EgressUse, SideEffect},
        egress,
        hostname::{Authority, AuthorityError},
        rule::Rule,
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
        Channel::Tool => EgressUse::Tools,
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
            let Some(tool) = compiled.policy.tools.iter().find(|tool| tool.name == intent.target) else {
                return Err(Refused::denied(
                    Rule::ToolKnown,
                    format!("no contract of the task is for the tool {:?} any more", intent.target),
                ));
            };
            if Target::parse(&tool.url).as_ref() != Ok(target) {
                return elsewhere();
            }
            let effect = tool.side_effect;
            if intent.effect != Some(effect) || !compiled.policy.allowed_effects.contains(&effect) {
                return Err(Refused::denied(
                    Rule::ToolEffect,
                    format!(
                        "the tool {} has effect {}, which the intent does not name or the class does not allow",
                        tool.name,
                        effect.as_str()
                    ),
                ));
            }
            // Once its outcome is in the log the call is over. What goes on is the MCP session that it opened: GET listens to
            // it, DELETE ends it. A POST could be the call again, which for a read is no harm.
            let session = method == Method::GET || method == Method::DELETE;
            if !intent.open && effect != SideEffect::Read && !session {
                return missing(format!("the call {:?} has its outcome already", intent.call));
            }
            Ok(())
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

#[cfg(test)]
mod tests;
