//! Tests against a real store: `BELAY_TEST_S3=http://127.0.0.1:7070 cargo test --lib s3:: -- --ignored`, with the store's root identity in
//! `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.

use aws_sdk_s3::types::{BucketVersioningStatus, VersioningConfiguration};

use super::*;
use crate::{
    evidence::log::Log,
    verify::{self, Check, Expected, Verdict, tests::script::Script},
};

async fn bucket() -> S3 {
    let endpoint = std::env::var("BELAY_TEST_S3").expect("BELAY_TEST_S3 is the endpoint of a store to test against");
    let bucket = format!("belay-test-{}", Timestamp::now().as_nanosecond());
    let store = S3::connect(Options { bucket, endpoint: Some(endpoint), path_style: true, ..Options::default() })
        .await
        .unwrap();
    store.client.create_bucket().bucket(&store.bucket).object_lock_enabled_for_bucket(true).send().await.unwrap();
    let on = VersioningConfiguration::builder().status(BucketVersioningStatus::Enabled).build();
    store.client.put_bucket_versioning().bucket(&store.bucket).versioning_configuration(on).send().await.unwrap();
    store
}

const KEY: &str = "prod/team/task/uid/segments/0000000000.jsonl";
const LOCK: Retention = Retention { mode: Mode::Compliance, days: 1 };

#[tokio::test]
#[ignore = "needs an S3 store, see above"]
async fn an_object_is_written_once_and_locked() {
    let store = bucket().await;
    let written = store.put_new(KEY, Bytes::from_static(b"one"), Some(&LOCK)).await.unwrap();
    // After a lost reply, writing the same bytes again gives the same object.
    assert_eq!(store.put_new(KEY, Bytes::from_static(b"one"), Some(&LOCK)).await.unwrap(), written);
    let second = store.put_new(KEY, Bytes::from_static(b"two"), Some(&LOCK)).await;
    assert!(matches!(second, Err(PutError::Exists)), "{second:?}");
    assert_eq!(store.get(KEY).await.unwrap(), "one");
    assert_eq!(store.list("prod/team/").await.unwrap(), [KEY]);
    assert_eq!(store.list("prod/other/").await.unwrap(), Vec::<String>::new());
    let versions = store.list_versions("prod/").await.unwrap();
    assert_eq!(versions.len(), 1);
    let object = &versions[0];
    assert_eq!((object.key.as_str(), object.size, object.mode), (KEY, 3, Some(Mode::Compliance)));
    assert_eq!((object.is_latest, object.delete_marker, &object.version_id), (true, false, &written));
    let kept = object.retain_until.unwrap().duration_since(object.written.unwrap()).as_secs();
    assert!((86_390..86_410).contains(&kept), "{kept} s");
}

#[tokio::test]
#[ignore = "needs an S3 store, see above"]
async fn of_many_writers_one_wins() {
    let store = bucket().await;
    let writers = (0..8_u8).map(|i| {
        let store = store.clone();
        async move { store.put_new(KEY, Bytes::from(vec![i; 4096]), Some(&LOCK)).await.is_ok() }
    });
    let won = futures::future::join_all(writers).await.into_iter().filter(|won| *won).count();
    assert_eq!((won, store.list_versions("").await.unwrap().len()), (1, 1));
}

#[tokio::test]
#[ignore = "needs an S3 store, see above"]
async fn what_somebody_hid_is_seen() {
    let store = bucket().await;
    store.put_new(KEY, Bytes::from_static(b"one"), Some(&LOCK)).await.unwrap();
    store.client.delete_object().bucket(&store.bucket).key(KEY).send().await.unwrap();
    assert!(matches!(store.get(KEY).await, Err(StoreError::NotFound { .. })));
    let versions = store.list_versions("").await.unwrap();
    assert_eq!(versions.iter().map(|v| v.delete_marker).filter(|marker| *marker).count(), 1);
    assert!(versions.iter().any(|v| !v.delete_marker && !v.is_latest && v.size == 3), "{versions:?}");
}

#[tokio::test]
#[ignore = "needs an S3 store, see above"]
async fn pages_are_all_read() {
    let store = bucket().await;
    let keys: Vec<String> = (0..1100).map(|i| format!("log/segments/{i:010}.jsonl")).collect();
    futures::stream::iter(&keys)
        .map(|key| store.create(key, Bytes::from_static(b"x"), None))
        .buffer_unordered(16)
        .try_collect::<Vec<_>>()
        .await
        .unwrap();
    assert_eq!(store.list("log/").await.unwrap(), keys);
    assert_eq!(store.list_versions("log/").await.unwrap().into_iter().map(|v| v.key).collect::<Vec<_>>(), keys);
}

#[tokio::test]
#[ignore = "needs an S3 store, see above"]
async fn a_log_in_a_bucket_is_verified_with_its_locks() {
    let store = bucket().await;
    let script = Script::good();
    for (key, bytes) in script.write().objects() {
        store.put_new(&format!("prod/{key}"), bytes.clone(), Some(&LOCK)).await.unwrap();
    }
    let verdict = async || {
        let log = Log::read(&store, "prod/", true).await.unwrap();
        verify::verify(&log, &script.witness.verifier(), &Expected::Anything)
    };
    let report = verdict().await;
    assert_eq!(report.verdict, Verdict::Valid, "{:?}", report.findings);
    let locks = report.summary.locks.unwrap();
    assert!(locks.mode == Some(Mode::Compliance) && locks.until.is_some());
    // The object is hidden, not removed: a plain listing would show a shorter log.
    store.client.delete_object().bucket(&store.bucket).key("prod/segments/0000000012.jsonl").send().await.unwrap();
    let report = verdict().await;
    assert_eq!(report.verdict, Verdict::Invalid);
    assert!(report.findings.iter().any(|f| f.rule == Check::StoreDeleted), "{:?}", report.findings);
}

#[tokio::test]
async fn a_store_that_is_not_there_is_named_in_bounded_time() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let credentials = aws_sdk_s3::config::Credentials::new("id", "secret", None, None, "test");
    let options = Options {
        bucket: "evidence".to_owned(),
        endpoint: Some(format!("http://{closed}")),
        path_style: true,
        ..Options::default()
    };
    let mut store = S3::connect(options).await.unwrap();
    let config = store.client.config().to_builder().credentials_provider(credentials).build();
    store.client = Client::from_conf(config);
    let error = store.get("key").await.unwrap_err();
    assert!(matches!(&error, StoreError::Unavailable { action: "read", .. }), "{error:?}");
    assert!(error.to_string().contains("s3://evidence"), "{error}");
}
