//! A token for the gateway's audience that is bound to a pod of no attempt, as a user can get from a kubelet for a pod of their own.

use super::*;

/// The request comes from the pod's own address, with a token that the API server knows.
#[rstest::rstest]
#[case::of_nobody(json!({}))]
#[case::of_somebody_else(json!({ "app": "web" }))]
#[case::of_no_attempt(json!({ names::TASK: "t", names::TASK_UID: UID }))]
#[case::of_no_task(json!({ names::ATTEMPT: "1", names::TASK_UID: UID }))]
#[case::of_no_uid(json!({ names::ATTEMPT: "1", names::TASK: "t" }))]
#[case::of_an_attempt_without_a_number(json!({ names::TASK: "t", names::TASK_UID: UID, names::ATTEMPT: "one" }))]
#[tokio::test]
async fn a_pod_that_is_no_attempts_is_nobody(#[case] labels: Value) {
    let mut world = world().await;
    world.harness(vec![testing::intent("1", Channel::Egress, "docs.world.test:80", 0)]).await;
    let mut stranger = pod(1, "127.0.0.1");
    stranger["metadata"]["labels"] = labels;
    put(&mut world.writers.pods, stranger);
    let url = "http://docs.world.test/page";
    assert_eq!(rule(&world.forward("egress", url, 1).await), Some(Rule::IdentityToken));
    assert_eq!(world.tunnel("docs.world.test:80", 1).await.err(), Some(Rule::IdentityToken));
    let open = OpenRequest { attempt: 1, policy_digest: "00".into() };
    assert_eq!(world.post("harness-1", wire::LOG_OPEN, &open).await, Err(Rule::IdentityToken));
    // The control: the same pod with the operator's labels.
    put(&mut world.writers.pods, pod(1, "127.0.0.1"));
    assert_eq!(rule(&world.forward("egress", url, 1).await), None);
}
