use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::evidence::store::dir::Dir;

/// A store that writes, and loses the reply of the first put.
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
