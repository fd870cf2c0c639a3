//! The handling of one request: identify the caller, check the request, serve it.
//!
//! Guarantees: nothing of a request is read before its caller is identified. The end of each request is counted once, by channel, decision
//! and rule, and has a span. Every error response has a rule. One pod's requests are bounded, so that one agent cannot starve the others.
//!
//! ```text
//! serve ─▶ identify ─▶ route ─┬─▶ log      open, append, approval, seal
//!                             ├─▶ state    compensations and results
//!                             ├─▶ calls    forward, call
//!                             └─▶ tunnels  CONNECT
//! ```

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use hyper::body::Incoming;
use serde::{Serialize, de::DeserializeOwned};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, field};

use super::{
    approvals::Create,
    body::{Carried, ReplyBody, full},
    cluster::Cluster,
    credentials::Known,
    dial::Dialer,
    forward,
    identity::{BoundPod, Caller, HarnessIdentity, Reviewed, reviews::Reviews},
    incidents::{Incident, Incidents},
    metrics::Metrics,
    pod_quota::PodQuotas,
    pool::Pool,
    refusal::Refused,
    state::StateStore,
    usage::UsageStatus,
    witness::Witness,
};
use crate::{
    evidence::record::Channel,
    policy::{redact, rule::Rule},
    wire::{self, Refusal},
};

/// Calls.
mod calls;
/// Requests about a task's log.
mod log;
/// Requests about data of a task's calls.
mod state;
/// Requests for tunnels.
mod tunnels;

/// Time limit for a body to arrive.
const BODY_TIME: Duration = Duration::from_secs(20);

/// The parts of a gateway.
pub struct Parts {
    /// The watched cluster.
    pub cluster: Arc<Cluster>,
    /// Cache of token reviews.
    pub reviews: Reviews,
    /// The witness.
    pub witness: Arc<Witness>,
    /// Salts, data of calls and claims of rollbacks.
    pub state: StateStore,
    /// Connects to upstreams.
    pub dialer: Dialer,
    /// Idle connections to upstreams, kept for reuse.
    pub pool: Arc<Pool>,
    /// Where ApprovalRequests are created.
    pub requests: Arc<dyn Create>,
    /// Reporter of incidents.
    pub incidents: Incidents,
    /// Writer of usage.
    pub usage: Arc<UsageStatus>,
    /// Counters.
    pub metrics: Metrics,
    /// The operator's user name: `system:serviceaccount:<system namespace>:belay-operator`.
    pub operator: String,
    /// Ends tunnels when it is cancelled.
    pub shutdown: CancellationToken,
}

/// The gateway.
pub struct Gateway {
    parts: Parts,
    known: Known,
    quotas: PodQuotas,
    tell: Option<Tell>,
}

/// The result of serving a request.
type Served = Result<Response<ReplyBody>, Refused>;

/// The subject of a request, for metrics.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    Call(Channel),
    Log,
    Other,
}

impl About {
    fn of(request: &Request<Incoming>) -> Self {
        if request.method() == Method::CONNECT {
            return Self::Call(Channel::Egress);
        }
        match request.uri().path() {
            wire::FORWARD => channel(request.headers()).map_or(Self::Other, Self::Call),
            wire::CALL => Self::Call(Channel::Tool),
            wire::LOG_OPEN | wire::LOG_APPEND | wire::LOG_SEAL | wire::APPROVAL => Self::Log,
            wire::STATE_PUT | wire::STATE_GET | wire::RESULT_PUT | wire::RESULT_GET => Self::Log,
            _ => Self::Other,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Call(channel) => channel.as_str(),
            Self::Log => "log",
            Self::Other => "other",
        }
    }
}

/// Callback for a call that was not made, with the sequence number of its intent and the reason.
pub type Tell = Box<dyn Fn(u64, &Refused) + Send + Sync>;

/// A harness's request after its caller was identified.
struct Asked {
    reviewed: Reviewed,
    principal: HarnessIdentity,
    peer: IpAddr,
}

impl Gateway {
    /// Returns a gateway of these parts.
    pub fn new(parts: Parts) -> Self {
        Self { parts, known: Known::default(), quotas: PodQuotas::new(), tell: None }
    }

    /// Sets the callback that reports calls that were not made.
    #[must_use]
    pub fn telling(mut self, tell: Tell) -> Self {
        self.tell = Some(tell);
        self
    }

    /// Serves one request from a TCP peer.
    ///
    /// # Errors
    /// Never returns an error: the reply describes it.
    pub async fn serve(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: IpAddr,
    ) -> Result<Response<ReplyBody>, Infallible> {
        let about = About::of(&request);
        let span = tracing::info_span!(
            "request",
            channel = about.as_str(),
            peer = %peer,
            namespace = field::Empty,
            task = field::Empty,
            attempt = field::Empty,
            host = field::Empty,
            upstream = field::Empty,
            data = field::Empty,
            risk = field::Empty,
            rule = field::Empty,
            bytes_sent = field::Empty,
            bytes_received = field::Empty,
        );
        Ok(self.answer(request, peer, about).instrument(span).await)
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>, peer: IpAddr, about: About) -> Response<ReplyBody> {
        let is_tunnel = request.method() == Method::CONNECT;
        let version = request.version();
        let intent = self.tell.as_ref().and_then(|_| request.headers().get(wire::INTENT)?.to_str().ok()?.parse().ok());
        match self.clone().route(request, peer).await {
            // A tunnel is counted after its first bytes were checked.
            Ok(reply) if is_tunnel => reply,
            Ok(reply) => {
                self.count(about, None);
                Carried::reply(reply, version)
            }
            Err(refused) => {
                self.count(about, Some(&refused));
                if let (Some(tell), Some(intent), About::Call(_)) = (&self.tell, intent, about) {
                    tell(intent, &refused);
                }
                refusal(&refused)
            }
        }
    }

    fn count(&self, about: About, refused: Option<&Refused>) {
        let (decision, rule) = refused.map_or(("allowed", "none"), |r| (r.decision(), r.rule.as_str()));
        self.parts.metrics.requests.with_label_values(&[about.as_str(), decision, rule]).inc();
        if let Some(refused) = refused {
            Span::current().record("rule", rule);
            // Agents choose where calls go, and upstreams choose what they reply.
            let reason = match about {
                About::Call(_) => redact::plain(&refused.reason),
                About::Log | About::Other => refused.reason.clone(),
            };
            tracing::info!(rule, reason, "denied");
        }
    }

    async fn route(self: Arc<Self>, mut request: Request<Incoming>, peer: IpAddr) -> Served {
        let token = forward::take_token(request.headers_mut());
        let (caller, reviewed) = self.identify(token, peer).await?;
        let connect = request.method() == Method::CONNECT;
        let post = request.method() == Method::POST;
        let path = request.uri().path().to_owned();
        let principal = match caller {
            Caller::Operator if post && path == wire::LOG_SEAL => return self.seal(request).await,
            Caller::Operator => {
                return Err(Refused::denied(Rule::IdentityToken, "the operator may only seal logs"));
            }
            Caller::Harness(principal) => principal,
        };
        let span = Span::current();
        span.record("namespace", &principal.namespace)
            .record("task", &principal.task)
            .record("attempt", principal.attempt);
        let asked = Asked { reviewed, principal, peer };
        match path.as_str() {
            _ if connect => self.tunnel(request, asked).await,
            wire::FORWARD => self.forward(request, asked).await,
            wire::CALL if post => self.call(request, asked).await,
            wire::LOG_OPEN if post => self.open(request, asked).await,
            wire::APPROVAL if post => self.approval(request, asked).await,
            wire::STATE_PUT if post => self.put_state(request, asked).await,
            wire::STATE_GET if post => self.get_state(request, asked).await,
            wire::RESULT_PUT if post => self.put_result(request, asked).await,
            wire::RESULT_GET if post => self.get_result(request, asked).await,
            wire::LOG_APPEND if post => self.append(request, asked).await,
            wire::LOG_SEAL => Err(Refused::denied(Rule::IdentityToken, "only the operator may seal a log")),
            _ => Err(Refused {
                status: StatusCode::NOT_FOUND,
                ..Refused::malformed(
                    "expected CONNECT, /v1/forward or a POST to /v1/call, /v1/approval, /v1/{state,result}/{put,get} or /v1/log/{open,append,seal}",
                )
            }),
        }
    }

    /// Identifies the caller. Reports a denied caller as an incident if the task that it concerns is known.
    async fn identify(&self, token: Result<String, Refused>, peer: IpAddr) -> Result<(Caller, Reviewed), Refused> {
        let reviewed = match token {
            Ok(token) => self.parts.reviews.user(&token, peer).await,
            Err(refused) => Err(refused),
        };
        let identified = match &reviewed {
            Ok(user) if user.username == self.parts.operator => return Ok((Caller::Operator, user.clone())),
            Ok(user) => self.parts.cluster.identify(user, peer).await.map(|p| (Caller::Harness(p), user.clone())),
            Err(refused) => Err(refused.clone()),
        };
        if let Err(refused) = &identified
            && !refused.is_retryable()
        {
            let bound = reviewed.ok().and_then(|user| user.pod);
            self.incident(bound.as_ref(), peer, refused);
        }
        identified
    }

    /// Reports a denial as an incident of the pod that the token is bound to, or else of the pod at the peer's address.
    fn incident(&self, bound: Option<&BoundPod>, peer: IpAddr, refused: &Refused) {
        let cluster = &self.parts.cluster;
        let pod = match bound {
            Some(bound) => cluster.pod_of(bound),
            None => cluster.pod_at(peer),
        };
        let Some(pod) = pod.filter(|pod| self.parts.incidents.is_new(&pod.uid, refused.rule)) else { return };
        let Some(place) = cluster.place(&pod.namespace, &pod.task, &pod.task_uid) else { return };
        let incident = Incident::now(&pod, peer, refused.rule, &refused.reason);
        self.parts.incidents.tell(place, incident);
    }

    /// Counts and reports what the HTTP library rejected before there was a request.
    pub fn misheard(&self, peer: IpAddr, found: &str) {
        let refused = Refused::malformed(format!("expected a request over TLS, found none: {found}"));
        self.count(About::Other, Some(&refused));
        self.incident(None, peer, &refused);
    }
}

/// Returns the channel that a request names, if it names exactly one.
fn channel(headers: &HeaderMap) -> Option<Channel> {
    match single(headers, wire::CHANNEL).ok()? {
        "tool" => Some(Channel::Tool),
        "listing" => Some(Channel::Listing),
        "model" => Some(Channel::Model),
        "egress" => Some(Channel::Egress),
        _ => None,
    }
}

/// Returns the value of a header that must occur exactly once.
fn single<'a>(headers: &'a HeaderMap, name: &str) -> Result<&'a str, Refused> {
    let mut values = headers.get_all(name).iter();
    match (values.next().map(HeaderValue::to_str), values.next()) {
        (Some(Ok(value)), None) => Ok(value),
        _ if name == wire::INTENT => {
            Err(Refused::denied(Rule::IntentMissing, format!("expected exactly one header {name}")))
        }
        _ => Err(Refused::malformed(format!("expected exactly one header {name}"))),
    }
}

async fn json<T: DeserializeOwned>(request: Request<Incoming>, most: usize) -> Result<T, Refused> {
    let body = forward::whole(request.into_body(), most, BODY_TIME).await?;
    serde_json::from_slice(&body).map_err(|e| Refused::malformed(format!("the body is not what was expected: {e}")))
}

fn reply<T: Serialize>(body: &T) -> Served {
    let body = serde_json::to_vec(body).map_err(|e| Refused::malformed(e.to_string()))?;
    let mut reply = Response::new(full(body));
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(reply)
}

/// Returns the error response for the caller.
fn refusal(refused: &Refused) -> Response<ReplyBody> {
    let Refused { status, rule, reason } = refused;
    let body = serde_json::to_vec(&Refusal { rule: *rule, reason: reason.clone() }).unwrap_or_default();
    let mut reply = Response::new(full(body));
    *reply.status_mut() = *status;
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(wire::RULE, HeaderValue::from_static(rule.as_str()));
    if refused.is_retryable() {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    reply
}

#[cfg(test)]
mod tests;
