//! The cache of TokenReviews: each replica reviews each token once.
//!
//! Guarantees: a token is trusted no longer than until its own expiry, and at most for an hour. Concurrent requests with a new token share
//! one review. A peer that presents invalid tokens cannot make the gateway flood the API server.
//!
//! Non-goals: storing tokens, because the keys of the cache are their SHA-256; checking that the pod of a cached token still exists, which
//! [`decide`](super::decide) does for every request.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures::future::BoxFuture;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use moka::sync::Cache;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::{BoundPod, Reviewed};
use crate::{
    canonical::sha256,
    gateway::{recent::recent, refusal::Refused},
    policy::rule::Rule,
    wire::AUDIENCE,
};

/// Maximum time that a valid review is trusted, whatever the token's own expiry.
const GOOD_FOR: Duration = Duration::from_secs(3600);
/// Time that an invalid review is cached. It is short, because a token that is too new for the API server's clock becomes valid.
const BAD_FOR: Duration = Duration::from_secs(10);
/// Maximum number of cached tokens. When it is reached, the oldest half is dropped and reviewed again when needed.
const REMEMBERED: usize = 8192;
/// Maximum length of a token. A projected token has about 1,200 characters.
const LONGEST: usize = 8192;
/// Number of new tokens that one peer may present at once. A harness has one, and another after each rotation.
const BURST: f64 = 8.0;
/// Number of new tokens a second that one peer may present after that.
const RATE: f64 = 0.5;
/// Time limit for the API server.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends [`TokenReview`]s.
pub trait Review: Send + Sync {
    /// Reviews a token at the API server.
    fn review(&self, review: TokenReview) -> BoxFuture<'_, Result<TokenReviewStatus, String>>;
}

impl Review for kube::Client {
    fn review(&self, review: TokenReview) -> BoxFuture<'_, Result<TokenReviewStatus, String>> {
        let api = kube::Api::<TokenReview>::all(self.clone());
        Box::pin(async move {
            let reviewed = api.create(&kube::api::PostParams::default(), &review).await.map_err(|e| e.to_string())?;
            reviewed.status.ok_or_else(|| "the API server sent no status".to_owned())
        })
    }
}

/// The result of a review, and how long it is trusted.
#[derive(Clone)]
struct Verdict {
    user: Result<Reviewed, Refused>,
    until: Instant,
}

/// The number of new tokens that one peer may still present.
struct Allowance {
    left: f64,
    at: Instant,
}

/// The cache in front of [`Review`].
pub struct Reviews {
    api: Arc<dyn Review>,
    asked: prometheus::IntCounterVec,
    cells: Cache<[u8; 32], Arc<OnceCell<Verdict>>>,
    peers: Mutex<HashMap<IpAddr, Allowance>>,
}

impl Reviews {
    /// Returns an empty cache. `asked` counts reviews by result.
    pub fn new(api: Arc<dyn Review>, asked: prometheus::IntCounterVec) -> Self {
        Self { api, asked, cells: recent(REMEMBERED), peers: Mutex::default() }
    }

    /// Returns the user of a token.
    ///
    /// # Errors
    /// Returns [`Rule::IdentityToken`]. The error may be retried if the API server does not answer or the peer has presented too many
    /// tokens; it is final if the token is not valid.
    pub async fn user(&self, token: &str, peer: IpAddr) -> Result<Reviewed, Refused> {
        if token.is_empty() || token.len() > LONGEST || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Refused::denied(Rule::IdentityToken, "expected a ServiceAccount token, found something else"));
        }
        let now = Instant::now();
        let cell = self.cell(sha256(token.as_bytes()), now);
        // Only the request that starts a review spends the peer's allowance, also when it repeats a failed review.
        let ask = || async {
            self.spend(peer, now)?;
            self.ask(token).await
        };
        cell.get_or_try_init(ask).await.cloned()?.user
    }

    /// Returns the token's cell, which may be filled, in progress or new.
    fn cell(&self, key: [u8; 32], now: Instant) -> Arc<OnceCell<Verdict>> {
        let valid = |verdict: &Arc<OnceCell<Verdict>>| verdict.get().is_none_or(|verdict| verdict.until > now);
        let cell = self.cells.entry(key).or_insert_with_if(Arc::default, |verdict| !valid(verdict));
        cell.into_value()
    }

    /// Spends one review of the peer's allowance.
    fn spend(&self, peer: IpAddr, now: Instant) -> Result<(), Refused> {
        let mut peers = self.peers.lock();
        if peers.len() >= REMEMBERED {
            let full = Duration::from_secs_f64(BURST / RATE);
            peers.retain(|_, allowance| now.duration_since(allowance.at) < full);
        }
        let allowance = peers.entry(peer).or_insert(Allowance { left: BURST, at: now });
        allowance.left = (allowance.left + now.duration_since(allowance.at).as_secs_f64() * RATE).min(BURST);
        allowance.at = now;
        if allowance.left < 1.0 {
            self.asked.with_label_values(&["throttled"]).inc();
            return Err(Refused::retry(
                Rule::IdentityToken,
                format!("{peer} presents new tokens faster than the gateway can check them; wait some seconds"),
            ));
        }
        allowance.left -= 1.0;
        Ok(())
    }

    async fn ask(&self, token: &str) -> Result<Verdict, Refused> {
        let review = TokenReview {
            spec: TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![AUDIENCE.to_owned()]) },
            ..TokenReview::default()
        };
        let status = match tokio::time::timeout(TIMEOUT, self.api.review(review)).await {
            Ok(Ok(status)) => status,
            Ok(Err(cause)) => return Err(self.unavailable(&cause)),
            Err(_) => return Err(self.unavailable("no answer in 5 s")),
        };
        let user = user_of(status);
        let good = user.is_ok();
        self.asked.with_label_values(&[if good { "valid" } else { "invalid" }]).inc();
        let lifetime = if good { lifetime(token, SystemTime::now()) } else { BAD_FOR };
        Ok(Verdict { user, until: Instant::now() + lifetime })
    }

    fn unavailable(&self, cause: &str) -> Refused {
        self.asked.with_label_values(&["failed"]).inc();
        tracing::warn!(cause, "a token cannot be reviewed");
        Refused::retry(Rule::IdentityToken, "the API server cannot check the token; try again")
    }
}

/// Returns the user of a review's status, if it is authenticated for the gateway's audience.
fn user_of(status: TokenReviewStatus) -> Result<Reviewed, Refused> {
    let refused = |reason: &str| Err(Refused::denied(Rule::IdentityToken, reason));
    if status.authenticated != Some(true) {
        return refused("the token is not valid for audience belay-gateway, has expired, or its pod is gone");
    }
    // An API server that does not support audiences leaves the list empty, so the token may be for another audience.
    if !status.audiences.unwrap_or_default().iter().any(|a| a == AUDIENCE) {
        return refused("the token is valid, but not for audience belay-gateway");
    }
    let user = status.user.unwrap_or_default();
    let Some(username) = user.username.filter(|name| !name.is_empty()) else {
        return refused("the token's review names no user");
    };
    let extra = user.extra.unwrap_or_default();
    let single = |key: &str| match extra.get(key).map(Vec::as_slice) {
        Some([value]) => Some(value.clone()),
        _ => None,
    };
    let namespace =
        username.strip_prefix("system:serviceaccount:").and_then(|u| u.split_once(':')).map(|(ns, _)| ns.to_owned());
    let (name, uid) = (single("authentication.kubernetes.io/pod-name"), single("authentication.kubernetes.io/pod-uid"));
    let pod = match (namespace, name, uid) {
        (Some(namespace), Some(name), Some(uid)) => Some(BoundPod { namespace, name, uid }),
        _ => None,
    };
    Ok(Reviewed { username, pod })
}

/// Returns how long a valid token is trusted: until the `exp` that it claims, and at most for [`GOOD_FOR`]. The claims are not verified
/// here, because the API server has just done so.
fn lifetime(token: &str, now: SystemTime) -> Duration {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: u64,
    }
    let exp = token
        .split('.')
        .nth(1)
        .and_then(|claims| URL_SAFE_NO_PAD.decode(claims).ok())
        .and_then(|claims| serde_json::from_slice::<Claims>(&claims).ok())
        .map(|claims| claims.exp);
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    // A token without a readable expiry is reviewed again soon.
    exp.map_or(BAD_FOR, |exp| Duration::from_secs(exp).saturating_sub(now)).min(GOOD_FOR)
}

#[cfg(test)]
mod tests;
