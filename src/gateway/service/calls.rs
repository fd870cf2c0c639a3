//! The requests that are calls: to a model, to an MCP server, to an HTTP tool, or the agent's own.
//!
//! Guarantees: a call leaves once for its witnessed intent, with the body that the intent commits to, after contract, pack and approvers
//! have allowed it and the class lists its destination. A credential is added last, and a reply that repeats it counts against the pod. A
//! message to an MCP server follows one redirect within the server's origin.
//!
//! Non-goals: each of these decisions ([`authorize`], [`approvals`]), and the connection ([`forward`]).
//!
//! ```text
//! forward (body as it is) ─┐
//!                          ├─▶ intent ─▶ authorize ─▶ judged ─▶ lend ─▶ send ─▶ forward::forward
//! call (from arguments) ───┘
//! ```

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::OwnedSemaphorePermit;
use tracing::Span;

use super::{Asked, BODY_TIME, Gateway, Served, channel, single};
use crate::{
    api::policy_pack::Credential,
    evidence::record::Channel,
    gateway::{
        approvals,
        authorize::{self, Destination, Target},
        body::{Alarm, Guarded, ReplyBody, full},
        compiled::Compiled,
        credentials::Injected,
        forward::{self, Lent, Manner},
        identity::HarnessIdentity,
        redirect,
        refusal::Refused,
        witness::IntentFacts,
    },
    policy::{commit::Salt, cost, rule::Rule},
    wire,
};

/// Number of replies that repeat a credential after which one pod's calls get no credentials any more, because an attacker who can make an
/// upstream repeat text could go on to guess credentials.
const REPEATED: u32 = 3;
/// Maximum bytes of a message to an MCP server or of the arguments of an HTTP tool's call. A harness accepts up to 4 MiB.
const LARGEST_MESSAGE: usize = 6 << 20;
/// Maximum bytes of a session message of MCP. The longest thing in one is the cursor of a list.
const LARGEST_TALK: usize = 256 << 10;
/// The header that marks a message of an MCP session.
const SESSION: &str = "mcp-session-id";
/// The statuses with which MCP servers reply to a request of a session that they do not know. The specification says 404. Many servers say
/// 400, which is also a status of a request that was not served.
const SESSION_LOST: [StatusCode; 2] = [StatusCode::NOT_FOUND, StatusCode::BAD_REQUEST];
/// Maximum bytes of a model request that is read on the runtime's own threads, which takes less than a millisecond.
const SHORT_REQUEST: usize = 32 << 10;
/// Time after which the intent is looked up again, because the body took longer to arrive.
const PROMPT: Duration = Duration::from_secs(1);

/// A request that may leave, with its credential.
type Ready = (Option<Lent>, Request<ReplyBody>);

impl Gateway {
    pub(super) async fn forward(self: Arc<Self>, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = &asked;
        principal.may_call()?;
        let share = self.quotas.permit(principal, |share| &share.calls)?;
        let headers = request.headers();
        let channel = channel(headers).ok_or_else(|| {
            Refused::malformed(format!("expected one header {} of model, tool, listing or egress", wire::CHANNEL))
        })?;
        let target = Target::parse(single(headers, wire::TARGET)?)?;
        let (credential, compiled, intent, salt) =
            self.authorized(principal, channel, Destination::Url(&target, request.method()), headers).await?;
        let is_message = authorize::is_message(&compiled, channel, request.method(), &intent);
        let largest = match channel {
            Channel::Listing => LARGEST_TALK,
            _ if is_message => LARGEST_MESSAGE,
            _ => wire::LONGEST_REQUEST,
        };
        let (mut parts, body) = request.into_parts();
        // Read the whole body before it is checked, because the intent commits to exactly what is sent.
        let places = self.quotas.places(principal, &body, largest, BODY_TIME).await?;
        let body = forward::whole(body, largest, BODY_TIME).await?;
        let (said, headers) = {
            let headers = parts.headers.clone();
            let (compiled, intent, body) = (compiled.clone(), intent.clone(), body.clone());
            let to = target.clone();
            // No rule that a tenant wrote is evaluated for a model request.
            let is_short = body.len() <= if channel == Channel::Model { SHORT_REQUEST } else { cost::SHORT };
            let read = move || {
                let of = (&intent, &salt);
                if is_message {
                    return Ok((authorize::parse_mcp_message(&compiled, channel, of, &body)?, None));
                }
                authorize::is_intended(channel, &intent, &salt, &body)?;
                let is_model = channel == Channel::Model;
                let reviewed = is_model.then(|| authorize::model::reviewed(&compiled, &to, of, (&headers, &body)));
                Ok::<_, Refused>((None, reviewed.transpose()?))
            };
            if is_short { read()? } else { self.quotas.apart(principal, read).await?? }
        };
        if let Some(arguments) = said {
            self.judged(principal, &compiled, &intent, (arguments, body.len())).await?;
        }
        if let Some(headers) = headers {
            parts.headers = headers;
        }
        // The body holds its room until it is sent.
        let (places, silence) = (Arc::new(places), compiled.policy.silence());
        let ready = || {
            let body = Guarded::new(full(body.clone()), silence, places.clone()).boxed_unsync();
            let lent = credential.as_ref().map(|credential| self.lend(credential, &asked)).transpose()?;
            Ok::<_, Refused>((lent, Request::from_parts(parts.clone(), body)))
        };
        let first = ready()?;
        // An MCP server may have its endpoint at another path.
        let redirected = is_message.then(&ready).transpose()?;
        self.send(channel, &target, (first, redirected), share, (compiled, intent)).await
    }

    /// Makes the call of an HTTP tool. The gateway builds the request from the arguments.
    pub(super) async fn call(self: Arc<Self>, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = &asked;
        principal.may_call()?;
        let share = self.quotas.permit(principal, |share| &share.calls)?;
        let (parts, body) = request.into_parts();
        let compiled = self.parts.cluster.compiled(principal)?;
        let mut intent = self.intent(&compiled, &parts.headers).await?;
        authorize::resolve_tool(&compiled, principal.attempt, &intent)?;
        let started = Instant::now();
        let body = forward::whole(body, LARGEST_MESSAGE, BODY_TIME).await?;
        if started.elapsed() > PROMPT {
            // The intent may have been used or closed meanwhile.
            intent = self.intent(&compiled, &parts.headers).await?;
        }
        let salt = self.parts.state.salt(&compiled.salt()).await?;
        let attempt = principal.attempt;
        let made = move |compiled: &Compiled, intent: &IntentFacts, salt: &Salt, body: &[u8]| {
            let arguments = authorize::arguments(intent, salt, body)?;
            let (target, request) = authorize::request(compiled, attempt, intent, &arguments)?;
            Ok::<_, Refused>((arguments, target, request))
        };
        let (arguments, target, request) = if body.len() <= cost::SHORT {
            made(&compiled, &intent, &salt, &body)?
        } else {
            let (compiled, intent, body) = (compiled.clone(), intent.clone(), body.clone());
            self.quotas.apart(principal, move || made(&compiled, &intent, &salt, &body)).await??
        };
        Span::current().record("host", target.authority.host.as_str());
        let to = Destination::Url(&target, request.method());
        let credential = authorize::listed(&compiled, Channel::Tool, to, |host| self.parts.dialer.stays_here(host))?;
        self.judged(principal, &compiled, &intent, (arguments, body.len())).await?;
        let request = request.map(full);
        let lent = credential.map(|credential| self.lend(&credential, &asked)).transpose()?;
        let replied = self.send(Channel::Tool, &target, ((lent, request), None), share, (compiled, intent)).await;
        replied.map(forward::as_reply_to_post)
    }

    /// Returns the witnessed intent that a request names.
    async fn intent(&self, compiled: &Compiled, headers: &HeaderMap) -> Result<IntentFacts, Refused> {
        let seq = single(headers, wire::INTENT)?;
        let seq = seq.parse().map_err(|_| {
            Refused::denied(
                Rule::IntentMissing,
                format!("expected a record's number in {}, found {seq:?}", wire::INTENT),
            )
        })?;
        self.parts.witness.intent(&compiled.place(), seq).await
    }

    /// Checks a call against the class's egress hosts and the log. Returns the credential for it, the compiled policy, the intent, and the
    /// salt of the task's commitments.
    pub(super) async fn authorized(
        &self,
        principal: &HarnessIdentity,
        channel: Channel,
        to: Destination<'_>,
        headers: &HeaderMap,
    ) -> Result<(Option<Credential>, Arc<Compiled>, IntentFacts, Salt), Refused> {
        let compiled = self.parts.cluster.compiled(principal)?;
        let credential = authorize::listed(&compiled, channel, to, |host| self.parts.dialer.stays_here(host))?;
        let intent = self.intent(&compiled, headers).await?;
        let salt = self.parts.state.salt(&compiled.salt()).await?;
        authorize::intended(&compiled, principal.attempt, channel, to, (&intent, &salt))?;
        Span::current().record("host", compiled.redactor.host(&to.authority().host, &salt));
        Ok((credential, compiled, intent, salt))
    }

    /// Checks that contract, pack and approvers allow a call with these arguments, whose encoding has `length` bytes.
    async fn judged(
        &self,
        principal: &HarnessIdentity,
        compiled: &Arc<Compiled>,
        intent: &IntentFacts,
        (arguments, length): (serde_json::Value, usize),
    ) -> Result<(), Refused> {
        if let Some(assessment) = &intent.assessment {
            let span = Span::current();
            span.record("data", assessment.arguments.as_str());
            span.record("risk", assessment.risk.as_ref().map(|risk| risk.score));
        }
        let (needed, arguments) = if authorize::is_bounded_cost(compiled, intent, length) {
            (authorize::judge(compiled, intent, &arguments)?, arguments)
        } else {
            // Tenants write contracts, whose expressions may take long, so do not evaluate them on the runtime's own threads.
            let (judge, facts) = (compiled.clone(), intent.clone());
            let judged = self.quotas.apart(principal, move || {
                authorize::judge(&judge, &facts, &arguments).map(|needed| (needed, arguments))
            });
            judged.await??
        };
        let find = |name: &str| self.parts.cluster.approval(&principal.namespace, name);
        approvals::approved(compiled, intent, &arguments, &needed, find)
    }

    /// Reads a credential for one request. A reply that repeats it counts against the pod and is reported as an incident.
    fn lend(self: &Arc<Self>, credential: &Credential, asked: &Asked) -> Result<Lent, Refused> {
        let repeated = self.quotas.of(&asked.principal, |share| &share.repeated);
        let found = repeated.load(Ordering::Relaxed);
        if found >= REPEATED {
            return Err(Refused::denied(
                Rule::UpstreamCredential,
                format!(
                    "{found} replies to this pod's calls have repeated a credential: its calls get no credentials any more"
                ),
            ));
        }
        let injected = Injected::read(&self.parts.cluster, &self.known, credential)?;
        let (gateway, pod, peer) = (self.clone(), asked.reviewed.pod.clone(), asked.peer);
        let secret = credential.secret.clone();
        let alarm: Alarm = Box::new(move || {
            repeated.fetch_add(1, Ordering::Relaxed);
            let reason = format!(
                "a reply repeats the credential of Secret {secret}: replace the credential, and check its upstream"
            );
            tracing::warn!(rule = Rule::UpstreamSecret.as_str(), reason, "withheld");
            gateway.incident(pod.as_ref(), peer, &Refused::denied(Rule::UpstreamSecret, reason));
        });
        Ok(Lent { credential: injected, alarm })
    }

    /// Sends an authorized request, unless a request has left by its intent already. A request that is given twice follows one redirect.
    async fn send(
        &self,
        channel: Channel,
        target: &Target,
        ((lent, request), redirected): (Ready, Option<Ready>),
        share: OwnedSemaphorePermit,
        (compiled, intent): (Arc<Compiled>, IntentFacts),
    ) -> Served {
        let witness = &self.parts.witness;
        if let Some((of, compensates)) = compiled.rollback_target_log().zip(intent.compensates.as_ref()) {
            let log = |task: &_| compiled.place_of(task);
            self.parts.state.undo(&of, compensates, &compiled.as_rollback(), log).await?;
        }
        witness.claim(&compiled.place(), &intent)?;
        let (in_session, share) = (request.headers().contains_key(SESSION), Arc::new(share));
        let started = Instant::now();
        // The agent's own requests may bind a connection to their sender, as some logins do, so they use no pooled connection.
        let pool = (channel != Channel::Egress).then_some(&self.parts.pool);
        // The harness reads these replies and asked for no compression. The agent's own traffic is passed on unchanged.
        let manner = Manner { silence: compiled.policy.silence(), unpacks: channel != Channel::Egress };
        let (dialer, keep) = (&self.parts.dialer, share.clone());
        let mut replied = forward::forward(dialer, pool, target, lent, request, (manner, keep)).await;
        let to = replied.as_ref().ok().and_then(|reply| redirect::followed(target, reply));
        if let Some(((lent, request), to)) = redirected.zip(to) {
            replied = forward::forward(dialer, pool, &to, lent, request, (manner, share)).await;
        }
        self.parts.metrics.upstream_took(channel.as_str(), started.elapsed());
        let replied = replied.inspect_err(|refused| {
            // No request has left if the error says that it may be retried.
            if refused.is_retryable() {
                witness.release(&compiled.place(), &intent);
            }
        })?;
        if channel == Channel::Tool && in_session && SESSION_LOST.contains(&replied.status()) {
            // An MCP server replies so if it has forgotten the session. It has done nothing, and the call is sent again over a new session.
            witness.again(&compiled.place(), &intent);
        }
        if let Some(address) = replied.headers().get(wire::UPSTREAM).and_then(|a| a.to_str().ok()) {
            Span::current().record("upstream", address);
        }
        Ok(replied)
    }
}
