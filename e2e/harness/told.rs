//! What an agent is told about a denied call, and what the log says about it: the same, and in words.

use super::*;

/// Returns the reasons of all recorded denials.
fn reasons(records: &[Record]) -> Vec<String> {
    let reason = |record: &Record| match &record.event {
        Event::Denied(denied) => Some(denied.reason.clone()),
        _ => None,
    };
    records.iter().filter_map(reason).collect()
}

#[tokio::test]
async fn a_tool_without_arguments_says_that_it_takes_none() {
    let mut policy = policy(LIMITS);
    // The operator renders a contract's `input: {type: object}` like this.
    let input = json!({"type": "object", "additionalProperties": false});
    policy.tools.push(Tool { input, ..tool("ping", over_mcp("echo"), SideEffect::Read) });
    let harness = harness_of(policy, vec![]).await;
    for (name, arguments, expected) in [
        ("ping", json!({"host": "a"}), r#"the arguments: found "host", expected no arguments: leave it out"#),
        ("say", json!({"text": "a", "to": "b"}), r#"found "to", expected only the arguments "text": leave it out"#),
        ("say", json!({}), r#"expected the argument "text", found none"#),
        ("say", json!({"text": 7}), "/text: expected text, found a number"),
    ] {
        let (error, text) = harness.tool(name, arguments).await;
        assert!(error && text.contains(expected), "{text}");
        assert!(!text.contains("schema does not allow"), "{text}");
        let reasons = reasons(&harness.records().await);
        assert!(reasons.last().unwrap().contains(expected), "{reasons:?}");
    }
    let (error, text) = harness.tool("say", json!({"text": "a"})).await;
    assert!(!error, "the control: {text}");
}

#[tokio::test]
async fn a_number_that_is_too_large_is_refused_by_a_bound_that_the_log_shows() {
    let harness = harness().await;
    for number in ["9007199254740993", "-9007199254740992", "-0.0"] {
        let call = format!(
            r#"{{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{{"name":"say","arguments":{{"text":{number}}}}}}}"#
        );
        let (_, reply) = harness.post_text("/mcp", call).await;
        assert!(reply.to_string().contains("2^53 - 1 (9007199254740991)"), "{number}: {reply}");
    }
    let reasons = reasons(&harness.stored(4).await);
    assert!(reasons.len() == 3 && reasons.iter().all(|reason| reason.contains("(9007199254740991)")), "{reasons:?}");
    assert!(!reasons.concat().contains("redacted"), "{reasons:?}");
}
