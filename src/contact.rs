//! How one process stands to the API server: when it was last heard of, on which watch, and what time it is there.
//!
//! Guarantees: an answer that does not come is an error within seconds, and so is a connection that nobody serves any more; the age of each
//! watch is that of what came last on it, a bookmark or the head of a new watch as well; the time is the API server's, not this machine's;
//! a watch that failed is tried again within seconds, however long the API server was away. Non-goals: to say what an answer means.
//!
//! A watch lasts [`WATCH_SECONDS`] and is then begun anew where it stood. So each is heard of that often though nothing happens: the API server
//! sends a bookmark shortly before it ends a watch, and answers the next.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Method, Request, Response, StatusCode, header::DATE};
use hyper::body::{Body, Bytes, Frame, SizeHint};
use jiff::{SignedDuration, Timestamp, fmt::rfc2822};
use kube::{
    Client, Config,
    client::{Body as RequestBody, ClientBuilder},
    runtime::{utils::Backoff, watcher},
};
use prometheus::{
    GaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use tokio::time::{Instant, Sleep, sleep};
use tower::{BoxError, Layer, Service};

/// How long one watch lasts before it is begun anew.
pub const WATCH_SECONDS: u32 = 20;
/// A watch of which nothing was heard for so long is old: two of them should have been begun meanwhile.
pub const OLD: Duration = Duration::from_secs(45);
/// For a connection to be made.
const CONNECT: Duration = Duration::from_secs(5);
/// For the head of an answer.
const HEAD: Duration = Duration::from_secs(15);
/// For the next part of an answer; what a watch brings may take until it ends.
const PART: Duration = Duration::from_secs(15);
/// Beyond a watch's end.
const MARGIN: Duration = Duration::from_secs(10);
/// The first pause after a watch failed, and the longest, before jitter.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(3));
/// A watch that went well for so long has the first pause again.
const WELL: Duration = Duration::from_secs(30);
/// How far the clock may be ahead of an answer's date before it is set back: answers take a while, and dates have whole seconds.
const AHEAD: SignedDuration = SignedDuration::from_secs(3);

/// How the process stands to the API server.
pub struct Contact(Mutex<State>);

struct State {
    /// What time it was when.
    clock: (Timestamp, Instant),
    /// Since when every answer has come.
    since: Instant,
    /// Whether the last thing that was asked for did not come.
    broken: bool,
    /// When each kind that is watched was last heard of.
    heard: BTreeMap<String, Instant>,
    /// When the request was sent by which the Lease was last written.
    lease: Option<Instant>,
}

impl Default for Contact {
    fn default() -> Self {
        let now = Instant::now();
        let clock = (Timestamp::now(), now);
        Self(Mutex::new(State { clock, since: now, broken: false, heard: BTreeMap::new(), lease: None }))
    }
}

impl Contact {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment: a panic elsewhere leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What time it is, by the API server as far as it has told.
    pub fn now(&self) -> Timestamp {
        self.lock().now()
    }

    /// Since when the API server has answered without a break: now, while it does not.
    pub fn since(&self) -> Timestamp {
        let state = self.lock();
        let ago = if state.broken { Duration::ZERO } else { state.since.elapsed() };
        earlier(state.now(), ago)
    }

    /// When the Lease was last written, by the time at which that was asked for.
    pub fn lease(&self) -> Option<Instant> {
        self.lock().lease
    }

    /// The kinds that are watched, and how long ago each was heard of.
    pub fn ages(&self) -> Vec<(String, Duration)> {
        self.lock().heard.iter().map(|(kind, at)| (kind.clone(), at.elapsed())).collect()
    }

    /// Nothing is watched any more: what was, and is not, is not old.
    pub fn forget(&self) {
        self.lock().heard.clear();
    }

    /// Whether no watch is older than that.
    ///
    /// # Errors
    /// Which is the oldest, and how old.
    pub fn fresh(&self, oldest: Duration) -> Result<(), String> {
        match self.ages().into_iter().max_by_key(|(_, age)| *age) {
            Some((kind, age)) if age > oldest => Err(format!(
                "expected news of {kind} at least every {WATCH_SECONDS} s, found none for {} s: the API server is away, or does not let us watch them",
                age.as_secs()
            )),
            _ => Ok(()),
        }
    }

    fn failed(&self) {
        self.lock().broken = true;
    }

    fn answered(&self, date: Option<Timestamp>) {
        let mut state = self.lock();
        if state.broken {
            (state.broken, state.since) = (false, Instant::now());
        }
        let Some(date) = date else { return };
        let ahead = state.now().duration_since(date);
        if ahead.is_negative() || ahead > AHEAD {
            state.clock = (date, Instant::now());
        }
    }

    fn heard(&self, kind: &str) {
        let now = Instant::now();
        let mut state = self.lock();
        match state.heard.get_mut(kind) {
            Some(at) => *at = now,
            None => drop(state.heard.insert(kind.to_owned(), now)),
        }
    }
}

impl State {
    fn now(&self) -> Timestamp {
        let (then, at) = self.clock;
        SignedDuration::try_from(at.elapsed()).ok().and_then(|passed| then.checked_add(passed).ok()).unwrap_or(then)
    }
}

fn earlier(time: Timestamp, by: Duration) -> Timestamp {
    SignedDuration::try_from(by).ok().and_then(|by| time.checked_sub(by).ok()).unwrap_or(time)
}

/// A client of the API server that keeps this up to date.
///
/// # Errors
/// If the configuration cannot be used.
pub fn client(config: Config, contact: Arc<Contact>) -> Result<Client, kube::Error> {
    let mut config = config;
    config.connect_timeout = Some(CONNECT);
    Ok(ClientBuilder::try_from(config)?.with_layer(&Listening(contact)).build())
}

/// How everything is watched.
pub fn watching() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS)
}

/// The pauses of one watch that fails: short ones, since each asks little, and a person waits for what it brings.
pub fn pauses() -> impl Backoff + 'static {
    Pauses { failures: 0, last: None }
}

struct Pauses {
    failures: u32,
    last: Option<Instant>,
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.last.is_none_or(|last| last.elapsed() > WELL) {
            self.failures = 0;
        }
        let (first, longest) = PAUSES;
        let pause = first.saturating_mul(2_u32.saturating_pow(self.failures)).min(longest);
        (self.failures, self.last) = (self.failures.saturating_add(1), Some(Instant::now()));
        Some(pause + pause.mul_f64(jitter() / 2.0))
    }
}

impl Backoff for Pauses {
    /// Of no effect: that a list has begun resets it too, so that one that fails each time would never wait long. Time resets it.
    fn reset(&mut self) {}
}

/// From 0 to 1.
fn jitter() -> f64 {
    use std::hash::{BuildHasher, RandomState};
    // A fresh hasher's keys are the standard library's own source of randomness.
    let random = RandomState::new().hash_one(0_u8) % 1000;
    f64::from(u32::try_from(random).unwrap_or_default()) / 1000.0
}

/// Hears what goes through a client.
#[derive(Clone)]
pub struct Listening(pub Arc<Contact>);

impl<S> Layer<S> for Listening {
    type Service = Listener<S>;

    fn layer(&self, inner: S) -> Listener<S> {
        Listener { inner, contact: self.0.clone() }
    }
}

/// A client's service that is heard.
#[derive(Clone)]
pub struct Listener<S> {
    inner: S,
    contact: Arc<Contact>,
}

/// What a request is for, as far as it is told apart.
struct Asked {
    /// The kind that is to be watched.
    watched: Option<String>,
    /// The Lease is written.
    lease: bool,
    reads: bool,
}

impl Asked {
    fn by<B>(request: &Request<B>) -> Self {
        let (uri, reads) = (request.uri(), request.method() == Method::GET);
        let watch =
            uri.query().is_some_and(|query| query.split('&').any(|one| matches!(one, "watch=true" | "watch=1")));
        let watched = uri.path().rsplit('/').next().filter(|_| watch).map(str::to_owned);
        let lease = !reads && uri.path().contains("/leases");
        Self { watched, lease, reads }
    }
}

impl<S, B> Service<Request<RequestBody>> for Listener<S>
where
    S: Service<Request<RequestBody>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Heard<B>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<RequestBody>) -> Self::Future {
        let (asked, sent, contact) = (Asked::by(&request), Instant::now(), self.contact.clone());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = match tokio::time::timeout(HEAD, answer).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(error)) => {
                    contact.failed();
                    return Err(error.into());
                }
                Err(_) => {
                    contact.failed();
                    return Err(silence("an answer", HEAD));
                }
            };
            let date = answer.headers().get(DATE).and_then(|date| date.to_str().ok());
            let date = date.and_then(|date| rfc2822::parse(date).ok()).map(|date| date.timestamp());
            match answer.status() {
                // Its own words, or those of what stands before it, that it is not there.
                StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
                    if asked.reads =>
                {
                    contact.failed();
                }
                status => {
                    contact.answered(date);
                    if let Some(kind) = asked.watched.as_ref().filter(|_| status.is_success()) {
                        contact.heard(kind);
                    }
                    if asked.lease && status.is_success() {
                        contact.lock().lease = Some(sent);
                    }
                }
            }
            let watch = Duration::from_secs(WATCH_SECONDS.into()).saturating_add(MARGIN);
            let patience = if asked.watched.is_some() { watch } else { PART };
            let silence = Box::pin(sleep(patience));
            // What says that there is no watch is no news of one.
            let watched = asked.watched.filter(|_| answer.status().is_success());
            Ok(answer.map(|inner| Heard { inner, contact, watched, patience, silence }))
        })
    }
}

fn silence(of: &str, patience: Duration) -> BoxError {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("expected {of} of the API server within {} s, found none", patience.as_secs()),
    )
    .into()
}

/// The body of an answer that is heard.
pub struct Heard<B> {
    inner: B,
    contact: Arc<Contact>,
    watched: Option<String>,
    patience: Duration,
    silence: Pin<Box<Sleep>>,
}

impl<B: fmt::Debug> fmt::Debug for Heard<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl<B> Body for Heard<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(kind) = &this.watched {
                    this.contact.heard(kind);
                }
                this.silence.as_mut().reset(Instant::now() + this.patience);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.contact.failed();
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                ready!(this.silence.as_mut().poll(context));
                this.contact.failed();
                Poll::Ready(Some(Err(silence("more", this.patience))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The ages of watches, told when they are asked for.
pub struct WatchAges {
    contact: Arc<Contact>,
    gauge: GaugeVec,
}

impl WatchAges {
    /// Under this name.
    ///
    /// # Errors
    /// If the name is none for a metric.
    pub fn new(name: &str, contact: Arc<Contact>) -> Result<Self, prometheus::Error> {
        let help = "Seconds since the newest event, bookmark or beginning of the watch of a kind.";
        Ok(Self { contact, gauge: GaugeVec::new(Opts::new(name, help), &["kind"])? })
    }
}

impl Collector for WatchAges {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.gauge.reset();
        for (kind, age) in self.contact.ages() {
            self.gauge.with_label_values(&[&kind]).set(age.as_secs_f64());
        }
        self.gauge.collect()
    }
}

#[cfg(test)]
mod tests;
