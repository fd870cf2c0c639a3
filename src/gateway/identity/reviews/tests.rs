use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
};

use k8s_openapi::api::authentication::v1::UserInfo;

use super::*;

/// An API server that accepts tokens that start with `good`.
#[derive(Default)]
struct Api {
    asked: AtomicUsize,
    down: bool,
}

impl Review for Api {
    fn review(&self, review: TokenReview) -> BoxFuture<'_, Result<TokenReviewStatus, String>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let good = review.spec.token.unwrap().starts_with("good");
        let down = self.down;
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            if down { Err("down".into()) } else { Ok(status(good)) }
        })
    }
}

fn status(authenticated: bool) -> TokenReviewStatus {
    let extra = BTreeMap::from([
        ("authentication.kubernetes.io/pod-name".to_owned(), vec!["t-1".to_owned()]),
        ("authentication.kubernetes.io/pod-uid".to_owned(), vec!["pod-uid".to_owned()]),
    ]);
    TokenReviewStatus {
        authenticated: Some(authenticated),
        audiences: Some(vec![AUDIENCE.to_owned()]),
        user: Some(UserInfo {
            username: Some("system:serviceaccount:team:default".into()),
            extra: Some(extra),
            ..UserInfo::default()
        }),
        error: None,
    }
}

fn reviews(api: &Arc<Api>) -> Reviews {
    let asked = prometheus::IntCounterVec::new(prometheus::Opts::new("x", "x"), &["result"]).unwrap();
    Reviews::new(api.clone(), asked)
}

fn token(exp: u64) -> String {
    format!("good.{}.signature", URL_SAFE_NO_PAD.encode(format!("{{\"exp\":{exp}}}")))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

#[tokio::test]
async fn a_token_is_reviewed_once_even_by_concurrent_requests() {
    let api = Arc::new(Api::default());
    let reviews = reviews(&api);
    let token = token(now() + 600);
    let users = futures::future::join_all((0..20).map(|_| reviews.user(&token, PEER))).await;
    assert!(users.iter().all(|u| u.as_ref().unwrap().pod.as_ref().unwrap().uid == "pod-uid"));
    reviews.user(&token, PEER).await.unwrap();
    assert_eq!(api.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_expired_verdict_is_asked_for_again() {
    let api = Arc::new(Api::default());
    let reviews = reviews(&api);
    let token = token(now());
    reviews.user(&token, PEER).await.unwrap();
    reviews.user(&token, PEER).await.unwrap();
    assert_eq!(api.asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_bad_token_is_remembered_and_a_flood_of_them_throttled() {
    let api = Arc::new(Api::default());
    let reviews = reviews(&api);
    for _ in 0..10 {
        let refused = reviews.user("bad", PEER).await.unwrap_err();
        assert_eq!((refused.rule, refused.is_retryable()), (Rule::IdentityToken, false));
    }
    assert_eq!(api.asked.load(Ordering::SeqCst), 1);
    for i in 0..1000 {
        assert!(reviews.user(&format!("bad{i}"), PEER).await.is_err());
    }
    assert!(api.asked.load(Ordering::SeqCst) <= 12, "{}", api.asked.load(Ordering::SeqCst));
    // Another peer is not affected.
    assert!(reviews.user(&token(now() + 600), "10.0.0.2".parse().unwrap()).await.is_ok());
}

#[tokio::test]
async fn an_api_server_that_is_down_denies_for_now_and_is_not_flooded() {
    let api = Arc::new(Api { down: true, ..Api::default() });
    let reviews = reviews(&api);
    let token = token(now() + 600);
    for _ in 0..100 {
        assert!(reviews.user(&token, PEER).await.unwrap_err().is_retryable());
    }
    assert!(api.asked.load(Ordering::SeqCst) <= 9);
}

#[tokio::test]
async fn what_is_no_token_is_not_reviewed() {
    let api = Arc::new(Api::default());
    let reviews = reviews(&api);
    for text in ["", "two words", "line\nbreak", &"x".repeat(LONGEST + 1)] {
        assert_eq!(reviews.user(text, PEER).await.unwrap_err().rule, Rule::IdentityToken);
    }
    assert_eq!(api.asked.load(Ordering::SeqCst), 0);
}

#[test]
fn another_audience_is_refused() {
    for audiences in [None, Some(vec![]), Some(vec!["https://kubernetes.default.svc".to_owned()])] {
        let status = TokenReviewStatus { audiences, ..status(true) };
        assert_eq!(user_of(status).unwrap_err().rule, Rule::IdentityToken);
    }
    assert_eq!(user_of(status(false)).unwrap_err().rule, Rule::IdentityToken);
}

#[test]
fn lifetimes() {
    let at = UNIX_EPOCH + Duration::from_secs(1_000_000);
    assert_eq!(lifetime(&token(1_000_060), at), Duration::from_secs(60));
    assert_eq!(lifetime(&token(999_999), at), Duration::ZERO);
    assert_eq!(lifetime(&token(9_000_000), at), GOOD_FOR);
    assert_eq!(lifetime("opaque", at), BAD_FOR);
    assert_eq!(lifetime("a.b.c", at), BAD_FOR);
}
