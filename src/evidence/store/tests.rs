use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::evidence::store::dir::Dir;

/// A store that writes, but loses the reply of the first put.
struct LostReply {
    inner: Dir,
    puts: AtomicU32,
}

impl Store for LostReply {
    fn create<'a>(
        &'a self,
        key: &'a str,
        body: Bytes,
        retention: Option<&'a Retention>,
    ) -> BoxFuture<'a, Result<String, PutError>> {
        Box::pin(async move {
            let version = self.inner.create(key, body, retention).await?;
            if self.puts.fetch_add(1, Ordering::SeqCst) == 0 {
                let (key, place, detail) = (key.to_owned(), "test".to_owned(), "connection reset".to_owned());
                return Err(StoreError::Unavailable { action: "write", key, place, detail }.into());
            }
            Ok(version)
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        self.inner.get(key)
    }

    fn list_versions<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<StoredObject>, StoreError>> {
        self.inner.list_versions(prefix)
    }

    fn lock<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<StoredObject>, StoreError>> {
        self.inner.lock(key)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StoreError>> {
        self.inner.list(prefix)
    }
}

#[tokio::test]
async fn a_lost_reply_is_no_conflict_and_a_foreign_object_is() {
    let folder = tempfile::tempdir().unwrap();
    let store = LostReply { inner: Dir::new(folder.path()), puts: AtomicU32::new(0) };
    let body = Bytes::from_static(b"ours");
    let first = store.put_new("log/segments/0000000000.jsonl", body.clone(), None).await;
    assert!(matches!(first, Err(PutError::Store(StoreError::Unavailable { .. }))), "{first:?}");
    store.put_new("log/segments/0000000000.jsonl", body, None).await.unwrap();
    let theirs = store.put_new("log/segments/0000000000.jsonl", Bytes::from_static(b"theirs"), None).await;
    assert!(matches!(theirs, Err(PutError::Exists)), "{theirs:?}");
}

#[rstest::rstest]
#[case::none(None, None, false)]
#[case::as_asked(Some(Mode::Governance), Some(30), true)]
#[case::harder(Some(Mode::Compliance), Some(31), true)]
#[case::shorter(Some(Mode::Compliance), Some(29), false)]
fn a_lock_is_held_against_what_was_asked_for(
    #[case] mode: Option<Mode>,
    #[case] days: Option<i64>,
    #[case] holds: bool,
) {
    let asked = Retention { mode: Mode::Governance, days: 30 };
    let written: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    let object = StoredObject {
        key: "k".into(),
        version_id: "v".into(),
        size: 1,
        written: Some(written),
        retain_until: days.map(|days| written + jiff::SignedDuration::from_hours(24 * days)),
        mode,
        is_latest: true,
        delete_marker: false,
    };
    assert_eq!(asked.holds(&object), holds);
    let strict = Retention { mode: Mode::Compliance, ..asked };
    assert_eq!(strict.holds(&object), holds && mode == Some(Mode::Compliance));
}

#[test]
fn locations_and_prefixes() {
    let location: Location = "s3://evidence/prod/team/task/uid".parse().unwrap();
    assert_eq!(location, Location { bucket: "evidence".to_owned(), prefix: "prod/team/task/uid/".to_owned() });
    assert_eq!(location.to_string().parse(), Ok(location));
    assert_eq!("s3://evidence".parse(), Ok(Location { bucket: "evidence".to_owned(), prefix: String::new() }));
    for text in ["evidence/prod", "s3:///prod", "https://evidence/prod", ""] {
        assert!(text.parse::<Location>().is_err(), "{text}");
    }
    assert_eq!(log_prefix(Some("prod/a"), "team", "task", "uid"), "prod/a/team/task/uid/");
    assert_eq!(log_prefix(None, "team", "task", "uid"), "team/task/uid/");
    assert_eq!(log_prefix(Some(""), "team", "task", "uid"), "team/task/uid/");
}
