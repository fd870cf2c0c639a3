use rstest::rstest;
use serde_json::{Value, json};

use super::*;

const PEER: &str = "10.244.0.7";

fn reviewed() -> Reviewed {
    Reviewed {
        username: "system:serviceaccount:team:default".into(),
        pod: Some(BoundPod { namespace: "team".into(), name: "t-2".into(), uid: "pod-uid".into() }),
    }
}

fn pod() -> PodFacts {
    PodFacts {
        namespace: "team".into(),
        name: "t-2".into(),
        uid: "pod-uid".into(),
        addresses: vec![PEER.parse().unwrap(), "fd00::7".parse().unwrap()],
        task: "t".into(),
        task_uid: "task-uid".into(),
        attempt: 2,
        ending: false,
        finished: false,
        altered: None,
    }
}

fn task() -> TaskFacts {
    TaskFacts { uid: "task-uid".into(), ending: false, finished: false, newest_attempt: 2 }
}

/// One change to the valid case.
type Change = fn(&mut Reviewed, &mut Option<PodFacts>, &mut Option<TaskFacts>);

fn decided(peer: &str, change: Change) -> Result<Standing, Rule> {
    let (mut reviewed, mut pod, mut task) = (reviewed(), Some(pod()), Some(task()));
    change(&mut reviewed, &mut pod, &mut task);
    decide(&reviewed, peer.parse().unwrap(), pod.as_ref(), task.as_ref())
        .map(|principal| principal.standing)
        .map_err(|refused| refused.rule)
}

#[test]
fn table() {
    let cases: &[(&str, Change, Result<Standing, Rule>)] = &[
        ("good", |_, _, _| (), Ok(Standing::Live)),
        ("unbound token", |r, _, _| r.pod = None, Err(Rule::IdentityToken)),
        ("pod gone", |_, p, _| *p = None, Err(Rule::IdentityToken)),
        ("pod recreated", |_, p, _| p.as_mut().unwrap().uid = "other".into(), Err(Rule::IdentityToken)),
        ("pod of another name", |_, p, _| p.as_mut().unwrap().name = "other".into(), Err(Rule::IdentityToken)),
        (
            "pod of another namespace",
            |r, _, _| r.pod.as_mut().unwrap().namespace = "other".into(),
            Err(Rule::IdentityToken),
        ),
        ("pod finished", |_, p, _| p.as_mut().unwrap().finished = true, Err(Rule::IdentityToken)),
        ("pod without address", |_, p, _| p.as_mut().unwrap().addresses.clear(), Err(Rule::IdentitySource)),
        ("pod altered", |_, p, _| p.as_mut().unwrap().altered = Some("more".into()), Err(Rule::IdentityToken)),
        ("pod ending", |_, p, _| p.as_mut().unwrap().ending = true, Ok(Standing::Ending)),
        ("task gone", |_, _, t| *t = None, Err(Rule::IdentityAttempt)),
        ("task recreated", |_, _, t| t.as_mut().unwrap().uid = "other".into(), Err(Rule::IdentityAttempt)),
        ("task ending", |_, _, t| t.as_mut().unwrap().ending = true, Ok(Standing::Ending)),
        ("task finished", |_, _, t| t.as_mut().unwrap().finished = true, Err(Rule::TaskClosed)),
        ("older attempt", |_, p, _| p.as_mut().unwrap().attempt = 1, Err(Rule::IdentityAttempt)),
        ("status lags", |_, _, t| t.as_mut().unwrap().newest_attempt = 1, Ok(Standing::Live)),
    ];
    for (name, change, expected) in cases {
        assert_eq!(decided(PEER, *change), *expected, "{name}");
    }
}

#[rstest]
#[case::own(PEER, Ok(Standing::Live))]
#[case::own_mapped("::ffff:10.244.0.7", Ok(Standing::Live))]
#[case::own_v6("fd00::7", Ok(Standing::Live))]
#[case::a45_another_pod("10.244.0.8", Err(Rule::IdentitySource))]
#[case::a45_node("10.200.0.10", Err(Rule::IdentitySource))]
#[case::loopback("127.0.0.1", Err(Rule::IdentitySource))]
fn a_token_speaks_from_its_pods_address_only(#[case] peer: &str, #[case] expected: Result<Standing, Rule>) {
    assert_eq!(decided(peer, |_, _, _| ()), expected);
}

#[test]
fn an_ending_pod_makes_no_calls() {
    let mut principal = decide(&reviewed(), PEER.parse().unwrap(), Some(&pod()), Some(&task())).unwrap();
    assert_eq!(principal.may_call(), Ok(()));
    principal.standing = Standing::Ending;
    assert_eq!(principal.may_call().unwrap_err().rule, Rule::IdentityAttempt);
}

/// Returns an attempt's pod as the API server sends it.
fn object() -> Value {
    json!({
        "metadata": {
            "namespace": "team", "name": "t-1", "uid": "pod-1",
            "labels": { names::TASK: "t", names::TASK_UID: "task-uid", names::ATTEMPT: "1" },
        },
        "status": { "phase": "Running", "podIP": "10.0.0.7" },
    })
}

#[test]
fn a_pod_without_our_labels_is_none_of_ours() {
    assert!(pod_facts(&serde_json::from_value(object()).unwrap()).is_some());
    for label in [names::TASK, names::TASK_UID, names::ATTEMPT] {
        let mut without = object();
        without["metadata"]["labels"].as_object_mut().unwrap().remove(label);
        assert_eq!(pod_facts(&serde_json::from_value(without).unwrap()), None, "{label}");
    }
    for attempt in ["0", "-1", "x", "1e3"] {
        let mut other = object();
        other["metadata"]["labels"][names::ATTEMPT] = json!(attempt);
        assert_eq!(pod_facts(&serde_json::from_value(other).unwrap()), None, "{attempt}");
    }
}
