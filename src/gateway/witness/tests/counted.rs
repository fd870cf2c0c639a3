//! The counters to alert on: each rises by what it counts, and by nothing else.

use super::*;

/// Returns the appends by each result.
fn appends(witness: &Witness) -> [u64; 5] {
    ["written", "replayed", "rejected", "failed", "lost"]
        .map(|result| witness.metrics.appends.with_label_values(&[result]).get())
}

/// Returns the errors of the bucket, by each action that has any.
fn errors(witness: &Witness) -> BTreeMap<&'static str, u64> {
    ["read", "write", "list", "lock", "name", "reach"]
        .into_iter()
        .map(|action| (action, witness.metrics.store_errors.with_label_values(&[action]).get()))
        .filter(|(_, count)| *count > 0)
        .collect()
}

#[tokio::test(start_paused = true)]
async fn only_segments_by_which_calls_may_have_left_are_lost() {
    let setup = setup();
    let Setup { a, b, bucket, .. } = &setup;
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    let first = harness.next(vec![opened]);
    append(a, &first).await.unwrap();
    assert_eq!(appends(a), [1, 0, 0, 0, 0]);
    append(a, &first).await.unwrap();
    assert_eq!(appends(a), [1, 1, 0, 0, 0]);
    let mut stranger = Harness::new(1);
    let opened = stranger.opened();
    append(a, &stranger.next(vec![opened])).await.unwrap_err();
    assert_eq!(appends(a), [1, 1, 1, 0, 0], "one that never had a place loses none");

    // What waits for its bucket is not lost, whether its reply comes late or not.
    bucket.down.store(true, Ordering::SeqCst);
    let second = harness.next(vec![denied()]);
    append(a, &second).await.unwrap_err();
    assert_eq!(appends(a), [1, 1, 1, 1, 0]);
    bucket.down.store(false, Ordering::SeqCst);
    append(a, &second).await.unwrap();
    bucket.down.store(true, Ordering::SeqCst);
    append(a, &witnessed(harness.next(vec![read("1")]))).await.unwrap();
    tokio::time::sleep(Duration::from_secs(120)).await;
    bucket.down.store(false, Ordering::SeqCst);
    a.settle().await;
    assert_eq!(appends(a)[4], 0);

    // A read leaves by its intent, and then the other replica stores another record in its place.
    let (tree, usage) = (harness.tree.clone(), harness.usage);
    bucket.down.store(true, Ordering::SeqCst);
    append(a, &witnessed(harness.next(vec![read("2")]))).await.unwrap();
    assert!(a.intent(&place(), tree.size()).await.is_ok());
    bucket.down.store(false, Ordering::SeqCst);
    let mut other = Harness { tree, usage, key: harness.key, ..Harness::new(1) };
    append(b, &other.next(vec![read("3")])).await.unwrap();
    a.settle().await;
    assert_eq!(appends(a)[4], 1, "{:?}", bucket.keys());
    assert_eq!(appends(b)[4], 0, "the replica whose record is in the log lost nothing");
}

#[tokio::test(start_paused = true)]
async fn a_bucket_that_does_not_lock_is_told_from_one_that_fails() {
    let Setup { a, bucket, .. } = &setup();
    let mut harness = Harness::new(1);
    let opened = harness.opened();
    let first = harness.next(vec![opened]);
    bucket.down.store(true, Ordering::SeqCst);
    append(a, &first).await.unwrap_err();
    let down = errors(a);
    assert!(!down.is_empty() && !down.contains_key("lock"), "{down:?}");
    bucket.down.store(false, Ordering::SeqCst);

    // It takes the object and does not lock it.
    bucket.keeps_open.store(true, Ordering::SeqCst);
    for times in 1..=3 {
        append(a, &first).await.unwrap_err();
        assert_eq!(errors(a).get("lock"), Some(&times));
    }
    let unlocked: BTreeMap<_, _> = down.clone().into_iter().chain([("lock", 3)]).collect();
    assert_eq!(errors(a), unlocked, "and it fails at nothing else");

    // Mended, nothing more is counted.
    let retention = place().retention;
    bucket.objects.lock().unwrap().values_mut().for_each(|(_, lock)| *lock = retention);
    bucket.keeps_open.store(false, Ordering::SeqCst);
    append(a, &first).await.unwrap();
    append(a, &harness.next(vec![denied()])).await.unwrap();
    assert_eq!(errors(a), unlocked);
}
