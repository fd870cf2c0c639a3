//! Tracks how a process stands to the API server: when the last answer came, on which watch, and what time it is there.
//!
//! Guarantees: a missing answer is an error within seconds, and so is a connection that is no longer served. The age of each watch is that
//! of the last thing that came on it, including a bookmark and the response headers of a new watch. Before the first, it is that of the first
//! request. The time is the API server's, not this machine's. A failed watch is retried within seconds, however long the API server was
//! unreachable.
//!
//! Non-goals: interpreting answers.
//!
//! A watch lasts [`WATCH_SECONDS`] and is then started again where it stopped. So each watch brings something that often, even if nothing
//! happens: the API server sends a bookmark shortly before it ends a watch, and answers the next request.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
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
use parking_lot::{Mutex, MutexGuard};
use prometheus::{
    GaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use tokio::time::{Instant, Sleep, sleep};
use tower::{BoxError, Layer, Service};

/// The duration of one watch in seconds, before it is started again.
pub const WATCH_SECONDS: u32 = 20;
/// The age at which a watch is old: two new watches should have started meanwhile.
pub const OLD: Duration = Duration::from_secs(45);
/// The time to connect.
const CONNECT: Duration = Duration::from_secs(5);
/// The time to the headers of an answer.
const HEAD: Duration = Duration::from_secs(15);
/// The time to the next part of an answer. On a watch, that time lasts until the watch ends.
const PART: Duration = Duration::from_secs(15);
/// The time beyond the end of a watch.
const MARGIN: Duration = Duration::from_secs(10);
/// The first pause after a watch failed, and the longest, both before jitter.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(3));
/// A watch that worked for this long starts with the first pause again.
const WELL: Duration = Duration::from_secs(30);
/// How far the clock may be ahead of an answer's date before it is set back: answers take time, and dates have whole seconds.
const AHEAD: SignedDuration = SignedDuration::from_secs(3);

/// The state of the contact with the API server.
pub struct Contact(Mutex<State>);

struct State {
    /// A time of the API server, and when it was read.
    clock: (Timestamp, Instant),
    /// The time since which every answer has come.
    since: Instant,
    /// Whether the answer to the last request did not come.
    broken: bool,
    /// When something last came on the watch of each kind, or when it was first requested.
    heard: BTreeMap<String, Instant>,
    /// When the request was sent that last wrote the Lease.
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
        // Every change is one assignment, so a panic elsewhere leaves no partial state.
        self.0.lock()
    }

    /// Returns the current time, by the API server's clock as far as it is known.
    pub fn now(&self) -> Timestamp {
        self.lock().now()
    }

    /// Returns the time since which the API server has answered without a break. If it does not answer, that is now.
    pub fn since(&self) -> Timestamp {
        let state = self.lock();
        let ago = if state.broken { Duration::ZERO } else { state.since.elapsed() };
        earlier(state.now(), ago)
    }

    /// Returns when the Lease was last written, by the time at which the request was sent.
    pub fn lease(&self) -> Option<Instant> {
        self.lock().lease
    }

    /// Returns the watched kinds with the age of each watch.
    pub fn ages(&self) -> Vec<(String, Duration)> {
        self.lock().heard.iter().map(|(kind, at)| (kind.clone(), at.elapsed())).collect()
    }

    /// Forgets all watches: a watch that has been stopped is not old.
    pub fn forget(&self) {
        self.lock().heard.clear();
    }

    /// Checks that no watch is older than `oldest`.
    ///
    /// # Errors
    /// Returns an error that names the oldest watch and its age.
    pub fn fresh(&self, oldest: Duration) -> Result<(), String> {
        match self.ages().into_iter().max_by_key(|(_, age)| *age) {
            Some((kind, age)) if age > oldest => Err(format!(
                "expected news of {kind} at least every {WATCH_SECONDS} s, found none for {} s: the API server is away, or does not let us watch them",
                age.as_secs()
            )),
            _ => Ok(()),
        }
    }

    /// Starts the age of a watch that was not known: one that never begins must become old, too.
    fn watching(&self, kind: &str) {
        let mut state = self.lock();
        if !state.heard.contains_key(kind) {
            state.heard.insert(kind.to_owned(), Instant::now());
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

/// Returns a client of the API server that keeps the contact up to date.
///
/// # Errors
/// Returns an error if the configuration cannot be used.
pub fn client(config: Config, contact: Arc<Contact>) -> Result<Client, kube::Error> {
    let mut config = config;
    config.connect_timeout = Some(CONNECT);
    Ok(ClientBuilder::try_from(config)?.with_layer(&Listening(contact)).build())
}

/// Returns the configuration of every watch.
pub fn watching() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS)
}

/// Returns the pauses of one failing watch. They are short, because each retry costs little and a user waits for what it brings.
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
    /// Does nothing. The runtime also resets when a list has started, so a watch that fails each time would never wait long. Time resets it
    /// instead.
    fn reset(&mut self) {}
}

/// Returns a random number from 0 to 1.
fn jitter() -> f64 {
    use std::hash::{BuildHasher, RandomState};
    // The keys of a new hasher come from the standard library's source of randomness.
    let random = RandomState::new().hash_one(0_u8) % 1000;
    f64::from(u32::try_from(random).unwrap_or_default()) / 1000.0
}

/// A layer that observes the requests and answers of a client.
#[derive(Clone)]
pub struct Listening(pub Arc<Contact>);

impl<S> Layer<S> for Listening {
    type Service = Listener<S>;

    fn layer(&self, inner: S) -> Listener<S> {
        Listener { inner, contact: self.0.clone() }
    }
}

/// A client's service that is observed.
#[derive(Clone)]
pub struct Listener<S> {
    inner: S,
    contact: Arc<Contact>,
}

/// What a request is for, as far as that matters here.
struct Asked {
    /// The kind to watch.
    watched: Option<String>,
    /// Whether it writes the Lease.
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
        if let Some(kind) = &asked.watched {
            contact.watching(kind);
        }
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
                // The API server, or a proxy in front of it, says that it is unavailable.
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
            // An answer that says that there is no watch is not an event of one.
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

/// The body of an observed answer.
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

/// A collector that reports the ages of watches when it is scraped.
pub struct WatchAges {
    contact: Arc<Contact>,
    gauge: GaugeVec,
}

impl WatchAges {
    /// Creates the collector of a metric of this name.
    ///
    /// # Errors
    /// Returns an error if the name is not valid for a metric.
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
