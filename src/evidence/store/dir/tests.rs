use super::*;

#[tokio::test]
async fn an_object_is_written_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = Dir::new(folder.path());
    assert_eq!(store.list("").await.unwrap(), Vec::<String>::new());
    store.put_new("ns/task/segments/0000000000.jsonl", Bytes::from_static(b"one"), None).await.unwrap();
    // After a lost reply, writing the same bytes again succeeds.
    store.put_new("ns/task/segments/0000000000.jsonl", Bytes::from_static(b"one"), None).await.unwrap();
    let second = store.put_new("ns/task/segments/0000000000.jsonl", Bytes::from_static(b"two"), None).await;
    assert!(matches!(second, Err(PutError::Exists)), "{second:?}");
    assert_eq!(store.get("ns/task/segments/0000000000.jsonl").await.unwrap(), "one");
    assert_eq!(store.list("ns/task/").await.unwrap(), ["ns/task/segments/0000000000.jsonl"]);
    assert_eq!(store.list("other/").await.unwrap(), Vec::<String>::new());
    let versions = store.list_versions("ns/").await.unwrap();
    assert_eq!((versions.len(), versions[0].size, versions[0].retain_until), (1, 3, None));
    assert!(matches!(store.get("ns/none").await, Err(StoreError::NotFound { .. })));
}

#[tokio::test]
async fn of_many_writers_one_wins() {
    let folder = tempfile::tempdir().unwrap();
    let store = Dir::new(folder.path());
    let writers = (0..8_u8).map(|i| {
        let store = store.clone();
        async move { store.put_new("log/segments/0000000000.jsonl", Bytes::from(vec![i; 4096]), None).await.is_ok() }
    });
    let won = futures::future::join_all(writers).await.into_iter().filter(|won| *won).count();
    assert_eq!(won, 1);
    let bytes = store.get("log/segments/0000000000.jsonl").await.unwrap();
    assert!(bytes.len() == 4096 && bytes.iter().all(|b| *b == bytes[0]));
    assert_eq!(store.list("").await.unwrap().len(), 1);
}

#[tokio::test]
async fn no_key_leads_out_of_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let store = Dir::new(folder.path().join("inner"));
    for key in ["../escape", "a/../../escape", "/etc/escape", "a//b", "", "a/", ".hidden", "a\0b"] {
        assert!(
            matches!(store.put_new(key, Bytes::new(), None).await, Err(PutError::Store(StoreError::Key(_)))),
            "{key:?}"
        );
        assert!(matches!(store.get(key).await, Err(StoreError::Key(_))), "{key:?}");
    }
}
