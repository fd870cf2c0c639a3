//! The handling of one request: identify the caller, check the request, serve it.
//!
//! Guarantees: nothing of a request is read before its caller is identified. The end of each request is counted once, by channel, decision
//! and rule, and has a span. Every error response has a rule. One pod's requests are bounded, so that one agent cannot starve the others.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{CONTENT_TYPE, HOST, RETRY_AFTER},
};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, field};

use super::{
    approvals::{self, Create},
    authorize::{self, Destination, Target},
    body::{Alarm, Carried, Guarded, ReplyBody, full},
    cluster::Cluster,
    compiled::Compiled,
    credentials::{Injected, Known},
    dial::Dialer,
    forward::{self, Lent, Manner},
    identity::{Caller, HarnessIdentity, Reviewed, reviews::Reviews},
    incidents::{Incident, Incidents},
    metrics::Metrics,
    pool::Pool,
    refusal::Refused,
    state::StateStore,
    tunnel,
    usage::UsageStatus,
    witness::{IntentFacts, LogLocation, Witness},
};
use crate::{
    apart,
    api::policy_pack::Credential,
    canonical,
    evidence::{
        record::Channel,
        store::{Location, log_prefix},
    },
    policy::{approval::CallKey, commit::Salt, config::SILENCE, cost, redact, rule::Rule},
    room::{self, Room, Unread},
    wire::{self, AppendRequest, ApprovalAsk, OpenRequest, Refusal, SealRequest},
};

/// Maximum number of concurrent calls and tunnels of one pod.
const CALLS: usize = 128;
/// Maximum number of concurrent requests of one pod about its log. More would only wait for the log's lock.
const LOG_REQUESTS: usize = 8;
/// Number of replies that repeat a credential after which one pod's calls get no credentials any more, because an attacker who can make an
/// upstream repeat text could go on to guess credentials.
const REPEATED: u32 = 3;
/// Number of pods whose shares are remembered.
const PODS: usize = 8192;
/// Maximum bytes of an open request, which has two fields.
const LARGEST_OPEN: usize = 16 << 10;
/// Maximum bytes of an append request: a segment with records of many calls, or with a whole policy.
const LARGEST_APPEND: usize = 8 << 20;
/// Maximum bytes of a request for approval: the arguments, escaped as JSON.
const LARGEST_QUESTION: usize = 512 << 10;
/// Maximum number of concurrent requests for approval of one pod: the undecided ones of a harness, and as many again that its agent has
/// abandoned.
const QUESTIONS: usize = 2 * crate::policy::approval::PENDING;
/// Maximum bytes of a request to seal.
const LARGEST_SEAL: usize = 64 << 10;
/// Maximum bytes of a call and its result, from which the arguments of its compensation are made.
const LARGEST_KEEP: usize = 2 << 20;
/// Maximum bytes of a message to an MCP server or of the arguments of an HTTP tool's call. A harness accepts up to 4 MiB.
const LARGEST_MESSAGE: usize = 6 << 20;
/// Maximum bytes of bodies of one pod's forwarded requests that are in memory at a time: for short bodies, and for others. The latter has
/// room for one body of any permitted length.
const ROOM: (usize, usize) = (8 << 20, wire::LONGEST_REQUEST);
/// The same for all pods together.
const ROOM_OF_ALL: (usize, usize) = (32 << 20, 3 * wire::LONGEST_REQUEST);
/// Maximum bytes of a session message of MCP. The longest thing in one is the cursor of a list.
const LARGEST_TALK: usize = 256 << 10;
/// The header that marks a message of an MCP session.
const SESSION: &str = "mcp-session-id";
/// Maximum bytes of a model request that is read on the runtime's own threads, which takes less than a millisecond.
const SHORT_REQUEST: usize = 32 << 10;
/// Maximum number of one pod's calls that are evaluated at a time.
const JUDGED: usize = 2;
/// Time after which the intent is looked up again, because the body took longer to arrive.
const PROMPT: Duration = Duration::from_secs(1);
/// Time limit for a body to arrive.
const BODY_TIME: Duration = Duration::from_secs(20);
/// How long the gateway waits for its stores to catch up with the operator, which creates an attempt right after rendering its policy.
const LAG: Duration = Duration::from_secs(2);
/// Delay between two looks at the stores.
const LAG_STEP: Duration = Duration::from_millis(100);

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

/// The share of one pod: its bounds, and what counts against it.
struct Share {
    calls: Arc<Semaphore>,
    log: Arc<Semaphore>,
    questions: Arc<Semaphore>,
    judged: Arc<Semaphore>,
    room: Arc<Room>,
    /// Number of replies that repeated a credential.
    repeated: Arc<AtomicU32>,
}

impl Share {
    /// Returns whether the share must be kept: it is in use, or it counts against the pod.
    fn matters(&self) -> bool {
        let semaphores = [&self.calls, &self.log, &self.questions, &self.judged];
        // The holder of a permit holds its semaphore, too.
        semaphores.into_iter().any(|of| Arc::strong_count(of) > 1)
            || Arc::strong_count(&self.repeated) > 1
            || Arc::strong_count(&self.room) > 1
            || self.repeated.load(Ordering::Relaxed) > 0
    }
}

/// The gateway.
pub struct Gateway {
    parts: Parts,
    known: Known,
    shares: Mutex<HashMap<String, Share>>,
    room: Room,
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
            wire::STATE_KEEP | wire::STATE_GET | wire::RESULT_KEEP | wire::RESULT_GET => Self::Log,
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
        let room = Room::new(ROOM_OF_ALL.0, ROOM_OF_ALL.1);
        Self { parts, known: Known::default(), shares: Mutex::default(), room, tell: None }
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
            tracing::info!(rule, reason, "refused");
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
                return Err(Refused::denied(Rule::IdentityToken, "the operator may seal logs, and nothing else"));
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
            wire::STATE_KEEP if post => self.keep(request, asked).await,
            wire::STATE_GET if post => self.kept(request, asked).await,
            wire::RESULT_KEEP if post => self.keep_result(request, asked).await,
            wire::RESULT_GET if post => self.kept_result(request, asked).await,
            wire::LOG_APPEND if post => self.append(request, asked).await,
            wire::LOG_SEAL => Err(Refused::denied(Rule::IdentityToken, "only the operator may seal a log")),
            _ => Err(Refused {
                status: StatusCode::NOT_FOUND,
                ..Refused::malformed(
                    "expected CONNECT, /v1/forward or a POST to /v1/call, /v1/approval, /v1/{state,result}/{keep,get} or /v1/log/{open,append,seal}",
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
    fn incident(&self, bound: Option<&super::identity::BoundPod>, peer: IpAddr, refused: &Refused) {
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
        let refused = Refused::malformed(format!("expected a request over TLS, found what is none: {found}"));
        self.count(About::Other, Some(&refused));
        self.incident(None, peer, &refused);
    }

    /// Runs work for a pod on a thread of its own, when the pod's turn comes.
    async fn apart<T: Send + 'static>(
        &self,
        principal: &HarnessIdentity,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Refused> {
        let places = self.shared(principal, |share| &share.judged);
        apart::judge(&places, apart::LONGEST, work)
            .await
            .map_err(|unjudged| Refused::retry(Rule::Busy, unjudged.to_string()))
    }

    /// Takes a permit from the pod's share.
    fn share(
        &self,
        principal: &HarnessIdentity,
        of: fn(&Share) -> &Arc<Semaphore>,
    ) -> Result<OwnedSemaphorePermit, Refused> {
        self.shared(principal, of).try_acquire_owned().map_err(|_| Refused {
            status: StatusCode::TOO_MANY_REQUESTS,
            rule: Rule::Busy,
            reason: "the pod has as many requests under way as it may; wait for one of them to end".to_owned(),
        })
    }

    fn shared<T>(&self, principal: &HarnessIdentity, of: fn(&Share) -> &Arc<T>) -> Arc<T> {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        if shares.len() >= PODS {
            shares.retain(|_, share| share.matters());
        }
        let share = shares.entry(principal.pod_uid.clone()).or_insert_with(|| Share {
            calls: Arc::new(Semaphore::new(CALLS)),
            log: Arc::new(Semaphore::new(LOG_REQUESTS)),
            questions: Arc::new(Semaphore::new(QUESTIONS)),
            judged: Arc::new(Semaphore::new(JUDGED)),
            room: Arc::new(Room::new(ROOM.0, ROOM.1)),
            repeated: Arc::default(),
        });
        of(share).clone()
    }

    async fn open(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = asked;
        let _share = self.share(&principal, |share| &share.log)?;
        let body: OpenRequest = json(request, LARGEST_OPEN).await?;
        let compiled = self.compiled_as(&principal, &body.policy_digest).await?;
        let (place, of) = (compiled.place(), compiled.rollback_target_log());
        let kept = (self.parts.state.salt(&compiled.salt()).await?, compiled.results().is_some());
        reply(&self.parts.witness.open(&place, &principal, &body, &compiled.digest, of.as_ref(), kept).await?)
    }

    /// Returns the compiled policy, after waiting up to [`LAG`] for it to have the digest of the harness's policy.
    async fn compiled_as(&self, principal: &HarnessIdentity, digest: &str) -> Result<Arc<Compiled>, Refused> {
        let started = Instant::now();
        loop {
            let compiled = self.parts.cluster.compiled(principal);
            match &compiled {
                Ok(compiled) if compiled.digest == digest => {}
                _ if started.elapsed() < LAG => {
                    tokio::time::sleep(LAG_STEP).await;
                    continue;
                }
                _ => {}
            }
            return compiled;
        }
    }

    async fn append(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = asked;
        let _share = self.share(&principal, |share| &share.log)?;
        let body: AppendRequest = json(request, LARGEST_APPEND).await?;
        let HarnessIdentity { namespace, task, task_uid, .. } = &principal;
        // Accept records of what happened even while no policy can be compiled. Only a new attempt needs one.
        let compiled = self.parts.cluster.compiled(&principal);
        let place = match &compiled {
            Ok(compiled) => compiled.place(),
            Err(unready) => self.parts.cluster.place(namespace, task, task_uid).ok_or_else(|| unready.clone())?,
        };
        let digest = compiled.as_ref().map(|compiled| compiled.digest.as_str()).map_err(Clone::clone);
        let of = compiled.as_ref().ok().and_then(|compiled| compiled.rollback_target_log());
        let (appended, usage) = self.parts.witness.append(&place, &principal, &body, digest, of.as_ref()).await?;
        if let Some(task) = self.parts.cluster.task(&principal.namespace, &principal.task, &principal.task_uid) {
            let status = self.parts.usage.clone();
            tokio::spawn(async move { status.running(&task, usage).await });
        }
        reply(&appended)
    }

    async fn approval(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = asked;
        principal.may_call()?;
        let _share = self.share(&principal, |share| &share.questions)?;
        let body: ApprovalAsk = json(request, LARGEST_QUESTION).await?;
        let Parts { cluster, requests, witness, state, .. } = &self.parts;
        let compiled = cluster.compiled(&principal)?;
        let call = CallKey { by: body.by, tool: body.tool.clone(), digest: body.request_digest.clone() };
        let before = witness.before(&compiled.place(), &call).await?;
        let salt = state.salt(&compiled.salt()).await?;
        let places = self.shared(&principal, |share| &share.judged);
        let asking = (&principal, &places);
        reply(&approvals::ask(cluster, requests.as_ref(), &compiled, asking, (&body, &salt), before).await?)
    }

    /// Returns where data of a task's calls is stored.
    fn state(
        &self,
        principal: &HarnessIdentity,
        of: fn(&Compiled) -> Option<Location>,
        rule: Rule,
    ) -> Result<(Arc<Compiled>, Location), Refused> {
        principal.may_call()?;
        let compiled = self.parts.cluster.compiled(principal)?;
        let state = of(&compiled)
            .ok_or_else(|| Refused::denied(rule, "expected a state bucket in the pack, found none: nothing is kept"))?;
        Ok((compiled, state))
    }

    /// Stores the result of an idempotent call. The harness is trusted for the result, as it is for the record.
    async fn keep_result(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = &asked;
        let (compiled, at) = self.state(principal, Compiled::results, Rule::ToolIdempotency)?;
        let _share = self.share(principal, |share| &share.log)?;
        let wire::KeepResult { intent, result } = json(request, LARGEST_KEEP).await?;
        let refused = |reason: String| Refused::denied(Rule::ToolIdempotency, reason);
        if result.len() > wire::LONGEST_RESULT {
            let (most, found) = (wire::LONGEST_RESULT, result.len());
            return Err(refused(format!("expected a result of at most {most} bytes, found {found}")));
        }
        let intent = self.parts.witness.intent(&compiled.place(), intent).await?;
        authorize::resolve_tool(&compiled, principal.attempt, &intent)?;
        if intent.key.is_none() {
            return Err(refused(format!("expected a call under an idempotency key, found {} without", intent.call)));
        }
        let digest = self.parts.state.salt(&compiled.salt()).await?.bytes(result.as_bytes());
        self.parts.state.keep(&at, &intent.call, &digest, result.into()).await?;
        reply(&wire::Kept { digest })
    }

    /// Returns a stored result. The log names the result's commitment, which the caller checks.
    async fn kept_result(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let (_, at) = self.state(&asked.principal, Compiled::results, Rule::ToolIdempotency)?;
        let _share = self.share(&asked.principal, |share| &share.log)?;
        let of = json(request, LARGEST_OPEN).await?;
        reply(&wire::KeptResult { result: self.text(&at, &of, Rule::ToolIdempotency).await? })
    }

    async fn text(&self, at: &Location, of: &wire::StateRef, rule: Rule) -> Result<String, Refused> {
        let text = self.parts.state.kept(at, &of.call, &of.digest).await?.ok_or_else(|| {
            Refused::denied(rule, format!("expected what belongs to {} in {at}, found nothing", of.call))
        })?;
        String::from_utf8(text).map_err(|e| Refused::malformed(e.to_string()))
    }

    /// Makes the arguments of a call's compensation, by its contract and from the very arguments of the call, and stores them. The harness
    /// is trusted for the call's result.
    async fn keep(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = &asked;
        let (compiled, at) = self.state(principal, Compiled::compensation_location, Rule::ToolRollback)?;
        let _share = self.share(principal, |share| &share.log)?;
        let wire::PutState { intent, arguments, result } = json(request, LARGEST_KEEP).await?;
        let intent = self.parts.witness.intent(&compiled.place(), intent).await?;
        authorize::resolve_tool(&compiled, principal.attempt, &intent)?;
        if compiled.policy.task.rollback_of.is_some() {
            return Err(Refused::denied(Rule::ToolRollback, "expected an agent's task: a rollback is not undone"));
        }
        let salt = self.parts.state.salt(&compiled.salt()).await?;
        authorize::are_intended(&intent, &salt, &arguments)?;
        // Tenants write these expressions, so evaluate them on a thread of their own, as calls are.
        let target = intent.target.clone();
        let made = self.apart(principal, move || {
            let undo = compiled.contracts.undo(&target, &arguments, &result)?;
            let undo = serde_json::Value::Object(undo);
            let made = canonical::to_bytes(&undo).and_then(|bytes| Ok((salt.value(&undo)?, bytes)));
            made.map_err(|error| error.to_string())
        });
        let (digest, made) = made.await?.map_err(|reason| Refused::denied(Rule::ToolRollback, reason))?;
        self.parts.state.keep(&at, &intent.call, &digest, made).await?;
        reply(&wire::Kept { digest })
    }

    async fn kept(&self, request: Request<Incoming>, asked: Asked) -> Served {
        let (compiled, at) = self.state(&asked.principal, Compiled::compensation_location, Rule::ToolRollback)?;
        let _share = self.share(&asked.principal, |share| &share.log)?;
        let of = json(request, LARGEST_OPEN).await?;
        if compiled.rollback_target_log().is_none() {
            return Err(Refused::denied(Rule::ToolRollback, "expected a rollback, found another task"));
        }
        reply(&wire::Undo { arguments: self.text(&at, &of, Rule::ToolRollback).await? })
    }

    async fn seal(&self, request: Request<Incoming>) -> Served {
        let body: SealRequest = json(request, LARGEST_SEAL).await?;
        let SealRequest { namespace, name, uid, bucket, prefix, .. } = &body;
        let plain = |part: &str| !part.is_empty() && !part.contains('/') && !part.chars().any(char::is_control);
        if ![namespace, name, uid, bucket].into_iter().all(|part| plain(part)) {
            return Err(Refused::malformed("expected namespace, name, uid and bucket without slashes"));
        }
        let place = LogLocation {
            location: Location {
                bucket: bucket.clone(),
                prefix: log_prefix(Some(prefix.trim_matches('/')), namespace, name, uid),
            },
            task_uid: uid.clone(),
            retention: self.parts.cluster.retention(namespace, bucket),
        };
        let sealed = self.parts.witness.seal(&place, &body).await?;
        if let Some(task) = self.parts.cluster.task(namespace, name, uid) {
            // Before the reply, because the operator may delete the task after it.
            self.parts.usage.ended(&task, sealed.usage).await;
        }
        reply(&sealed)
    }

    async fn forward(self: Arc<Self>, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = &asked;
        principal.may_call()?;
        let share = self.share(principal, |share| &share.calls)?;
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
        let places = self.places(principal, &body, largest).await?;
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
            if is_short { read()? } else { self.apart(principal, read).await?? }
        };
        if let Some(arguments) = said {
            self.judged(principal, &compiled, &intent, (arguments, body.len())).await?;
        }
        if let Some(headers) = headers {
            parts.headers = headers;
        }
        // The body holds its room until it is sent.
        let body = Guarded::new(full(body), compiled.policy.silence(), places).boxed_unsync();
        let request = Request::from_parts(parts, body);
        let lent = credential.map(|credential| self.lend(&credential, &asked)).transpose()?;
        self.send(channel, &target, lent, request, share, (compiled, intent)).await
    }

    /// Waits for room for a body, in the pod's share and in the room of all pods.
    async fn places(
        &self,
        principal: &HarnessIdentity,
        body: &Incoming,
        most: usize,
    ) -> Result<(room::Place, room::Place), Refused> {
        let own = self.shared(principal, |share| &share.room);
        let both = async {
            let own = own.place(body, most).await?;
            Ok::<_, Unread>((own, self.room.place(body, most).await?))
        };
        match tokio::time::timeout(BODY_TIME, both).await {
            Ok(places) => places.map_err(|unread| Refused::malformed(unread.to_string())),
            Err(_) => Err(Refused::retry(Rule::Busy, "there is no room for so long a body now: others are under way")),
        }
    }

    /// Makes the call of an HTTP tool. The gateway builds the request from the arguments.
    async fn call(self: Arc<Self>, request: Request<Incoming>, asked: Asked) -> Served {
        let Asked { principal, .. } = &asked;
        principal.may_call()?;
        let share = self.share(principal, |share| &share.calls)?;
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
            self.apart(principal, move || made(&compiled, &intent, &salt, &body)).await??
        };
        Span::current().record("host", target.authority.host.as_str());
        let to = Destination::Url(&target, request.method());
        let credential = authorize::listed(&compiled, Channel::Tool, to, |host| self.parts.dialer.stays_here(host))?;
        self.judged(principal, &compiled, &intent, (arguments, body.len())).await?;
        let request = request.map(full);
        let lent = credential.map(|credential| self.lend(&credential, &asked)).transpose()?;
        let replied = self.send(Channel::Tool, &target, lent, request, share, (compiled, intent)).await;
        replied.map(forward::as_reply_to_post)
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
            let judged = self.apart(principal, move || {
                authorize::judge(&judge, &facts, &arguments).map(|needed| (needed, arguments))
            });
            judged.await??
        };
        let find = |name: &str| self.parts.cluster.approval(&principal.namespace, name);
        approvals::approved(compiled, intent, &arguments, &needed, find)
    }

    /// Reads a credential for one request. A reply that repeats it counts against the pod and is reported as an incident.
    fn lend(self: &Arc<Self>, credential: &Credential, asked: &Asked) -> Result<Lent, Refused> {
        let repeated = self.shared(&asked.principal, |share| &share.repeated);
        let found = repeated.load(Ordering::Relaxed);
        if found >= REPEATED {
            return Err(Refused::denied(
                Rule::UpstreamCredential,
                format!(
                    "{found} replies to this pod's calls have repeated a credential: its calls are made with none any more"
                ),
            ));
        }
        let injected = Injected::read(&self.parts.cluster, &self.known, credential)?;
        let (gateway, pod, peer) = (self.clone(), asked.reviewed.pod.clone(), asked.peer);
        let secret = credential.secret.clone();
        let alarm: Alarm = Box::new(move || {
            repeated.fetch_add(1, Ordering::Relaxed);
            let reason =
                format!("a reply repeats the credential of Secret {secret}: replace it, and see to its upstream");
            tracing::warn!(rule = Rule::UpstreamSecret.as_str(), reason, "withheld");
            gateway.incident(pod.as_ref(), peer, &Refused::denied(Rule::UpstreamSecret, reason));
        });
        Ok(Lent { credential: injected, alarm })
    }

    /// Sends an authorized request, unless a request has left by its intent already.
    async fn send(
        &self,
        channel: Channel,
        target: &Target,
        lent: Option<Lent>,
        request: Request<ReplyBody>,
        share: OwnedSemaphorePermit,
        (compiled, intent): (Arc<Compiled>, IntentFacts),
    ) -> Served {
        let witness = &self.parts.witness;
        if let Some((of, undoes)) = compiled.rollback_target_log().zip(intent.undoes.as_ref()) {
            let log = |task: &_| compiled.place_of(task);
            self.parts.state.undo(&of, undoes, &compiled.as_rollback(), log).await?;
        }
        witness.claim(&compiled.place(), &intent)?;
        let in_session = request.headers().contains_key(SESSION);
        let started = Instant::now();
        // The agent's own requests may bind a connection to their sender, as some logins do, so they use no pooled connection.
        let pool = (channel != Channel::Egress).then_some(&self.parts.pool);
        // The harness reads these replies and asked for no compression. The agent's own traffic is passed on unchanged.
        let manner = Manner { silence: compiled.policy.silence(), unpacks: channel != Channel::Egress };
        let replied = forward::forward(&self.parts.dialer, pool, target, lent, request, (manner, share)).await;
        self.parts.metrics.upstream_took(channel.as_str(), started.elapsed());
        let replied = replied.inspect_err(|refused| {
            // No request has left if the error says that it may be retried.
            if refused.is_retryable() {
                witness.release(&compiled.place(), &intent);
            }
        })?;
        if channel == Channel::Tool && in_session && replied.status() == StatusCode::NOT_FOUND {
            // An MCP server replies so if it has forgotten the session. It has done nothing, and the call is sent again over a new session.
            witness.again(&compiled.place(), &intent);
        }
        if let Some(address) = replied.headers().get(wire::UPSTREAM).and_then(|a| a.to_str().ok()) {
            Span::current().record("upstream", address);
        }
        Ok(replied)
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
    async fn authorized(
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

    async fn tunnel(self: Arc<Self>, mut request: Request<Incoming>, asked: Asked) -> Served {
        asked.principal.may_call()?;
        let share = self.share(&asked.principal, |share| &share.calls)?;
        let headers = request.headers();
        if channel(headers) != Some(Channel::Egress) {
            return Err(Refused::denied(
                Rule::EgressDirect,
                format!("a tunnel is for the agent's own traffic: expected {}: egress", wire::CHANNEL),
            ));
        }
        let uri = request.uri();
        let bare = uri.scheme().is_none() && uri.path_and_query().is_none();
        let to = uri.authority().filter(|_| bare).ok_or_else(|| Refused::malformed("expected CONNECT host:port"))?;
        let to = authorize::authority(to.as_str(), None)?;
        if !to.fits(headers.get_all(HOST).iter().map(HeaderValue::as_bytes)) {
            let reason = format!("expected Host to be {to}, as CONNECT asks for");
            return Err(Refused::denied(Rule::EgressHost, reason));
        }
        let tells = headers.contains_key(wire::OPENING) && tunnel::is_looked_at(&to);
        let (_, compiled, intent, _) =
            self.authorized(&asked.principal, Channel::Egress, Destination::Tunnel(&to), headers).await?;
        self.parts.witness.claim(&compiled.place(), &intent)?;
        let started = Instant::now();
        let dialled = self.parts.dialer.dial(&to).await;
        self.parts.metrics.upstream_took(Channel::Egress.as_str(), started.elapsed());
        let (upstream, address) = dialled?;
        Span::current().record("upstream", field::display(address));

        let upgrade = hyper::upgrade::on(&mut request);
        let gateway = self.clone();
        let run = async move {
            let Ok(agent) = upgrade.await else { return };
            gateway.relay((TokioIo::new(agent), tells), upstream, &to, &asked).await;
            drop(share);
        };
        tokio::spawn(run.instrument(Span::current()));
        let mut reply = Response::new(full(""));
        if let Ok(address) = HeaderValue::try_from(address.to_string()) {
            reply.headers_mut().insert(wire::UPSTREAM, address);
        }
        if tells {
            reply.headers_mut().insert(wire::OPENING, HeaderValue::from_static(wire::TOLD));
        }
        Ok(reply)
    }

    /// Runs a tunnel after the reply `200`. `tells` is whether the agent's side is told that the tunnel was allowed or denied.
    async fn relay(
        &self,
        (mut agent, tells): (TokioIo<hyper::upgrade::Upgraded>, bool),
        mut upstream: tokio::net::TcpStream,
        to: &crate::policy::hostname::Authority,
        asked: &Asked,
    ) {
        use tokio::io::AsyncWriteExt;
        let Parts { metrics, cluster, shutdown, .. } = &self.parts;
        let about = About::Call(Channel::Egress);
        let opening = match tunnel::opening(&mut agent, to).await {
            Ok(opening) => opening,
            Err(refused) => {
                self.count(about, Some(&refused));
                self.incident(asked.reviewed.pod.as_ref(), asked.peer, &refused);
                if tells {
                    let _ = tunnel::tell(&mut agent, Some(&refused)).await;
                }
                return;
            }
        };
        self.count(about, None);
        if tunnel::is_looked_at(to) && opening.is_empty() {
            return;
        }
        if tells && tunnel::tell(&mut agent, None).await.is_err() {
            return;
        }
        if upstream.write_all(&opening).await.is_err() {
            return;
        }
        let traffic = tunnel::Traffic::default();
        let silence = cluster.compiled(&asked.principal).map_or(SILENCE, |compiled| compiled.policy.silence());
        traffic.sent.fetch_add(u64::try_from(opening.len()).unwrap_or_default(), Ordering::Relaxed);
        let still = || {
            cluster.recheck_caller(&asked.reviewed, asked.peer)?;
            let compiled = cluster.compiled(&asked.principal)?;
            authorize::listed(&compiled, Channel::Egress, Destination::Tunnel(to), |_| false).map(|_| ())
        };
        metrics.tunnels.inc();
        let started = Instant::now();
        let end = tokio::select! {
            end = tunnel::relay(agent, upstream, (&traffic, silence), still) => format!("{end:?}"),
            () = shutdown.cancelled() => "the gateway stops".to_owned(),
        };
        metrics.tunnels.dec();
        let (sent, received) = (traffic.sent.load(Ordering::Relaxed), traffic.received.load(Ordering::Relaxed));
        Span::current().record("bytes_sent", sent).record("bytes_received", received);
        tracing::info!(sent, received, seconds = started.elapsed().as_secs_f64(), end, "a tunnel has ended");
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
