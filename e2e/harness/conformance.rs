//! The conformance table: each field of a contract, allowed, denied and at its edge, over MCP and over HTTP. Real clients (rmcp, the
//! official Python and TypeScript SDKs) make the calls through the harness and the gateway's own steps. Real servers answer them
//! (`server-everything` and `server-filesystem` over MCP, an HTTP API on loopback). The test compares what the agent sees and what the
//! evidence says with each row.
//!
//! [`every_field_has_its_rows`] fails if the contract's schema has a field that the table does not have.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use belay::{
    api::{ApprovalRequest, ToolContract},
    evidence::record::{CallOutcome, Intent, Outcome},
    policy::{
        approval::Answer,
        config::{
            AccessRule, Approval, Compensation, DataClass, Idempotency, Rollback, RuleDecision, Sensitivity, VerifyRead,
        },
    },
};
use kube::{CustomResourceExt, ResourceExt};
use rstest::rstest;

use super::{
    peers::{Everything, Files, client, client_of},
    *,
};

/// Which side of a field a row is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Allowed,
    Denied,
    Edge,
}

/// How the tool is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Over {
    Mcp,
    Http,
}

use Over::{Http, Mcp};
use Side::{Allowed, Denied, Edge};

/// What the agent sees.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// A result that contains this text.
    Text(&'static str),
    /// A denial by this rule.
    Refused(Rule),
    /// A message that approvers have not decided yet.
    Pending,
}

/// What the evidence says last about the row's tool.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Told {
    Denied(Rule),
    Made(CallOutcome, Option<Rule>),
    /// The call was made, its outcome was unknown, and a read resolved it.
    Resolved(CallOutcome),
    Replayed,
    Asked,
}

/// The evidence of a row after its call.
struct Evidence {
    intent: Option<Intent>,
    outcome: Option<Outcome>,
    request: Option<ApprovalRequest>,
}

struct Row {
    field: &'static str,
    side: Side,
    over: Over,
    tool: Tool,
    /// The name that is called, if it is not the tool's name.
    called: Option<String>,
    /// Earlier calls of the same tool. Their results do not matter.
    before: Vec<Value>,
    args: Value,
    /// The decision of the approver, if the row has one.
    people: Option<Answer>,
    seen: Seen,
    told: Told,
    also: fn(&Evidence) -> bool,
}

impl Row {
    fn name(&self) -> String {
        self.called.clone().unwrap_or_else(|| self.tool.name.clone())
    }
}

const APPLIED: Told = Told::Made(CallOutcome::Applied, None);

fn everything(tool: &str) -> Upstream {
    Upstream::Mcp(McpUpstream { url: "http://everything.test/mcp".into(), tool: tool.into(), digest: None })
}

fn files(tool: &str) -> Upstream {
    Upstream::Mcp(McpUpstream { url: "http://files.test/mcp".into(), tool: tool.into(), digest: None })
}

/// Returns a row with defaults: the tool answers with the message that it gets.
fn row(field: &'static str, side: Side, over: Over) -> Row {
    let upstream = match over {
        Mcp => everything("echo"),
        Http => over_http(HttpMethod::Post, "/items", &[]),
    };
    let name = format!("{field}.{side:?}.{over:?}").to_lowercase();
    Row {
        field,
        side,
        over,
        tool: tool(&name, upstream, SideEffect::Write),
        called: None,
        before: vec![],
        args: json!({"message": "hi"}),
        people: None,
        seen: Seen::Text("hi"),
        told: APPLIED,
        also: |_| true,
    }
}

fn refused(row: Row, rule: Rule) -> Row {
    Row { seen: Seen::Refused(rule), told: Told::Denied(rule), ..row }
}

fn limited(limits: ToolLimits, row: Row) -> Row {
    Row { tool: Tool { limits, ..row.tool }, ..row }
}

/// Returns an upstream whose call takes `milliseconds`, with its arguments.
fn slow(over: Over, milliseconds: u64) -> (Upstream, Value) {
    match over {
        Mcp => (
            everything("trigger-long-running-operation"),
            json!({"duration": milliseconds as f64 / 1000.0, "steps": 1}),
        ),
        Http => (over_http(HttpMethod::Post, "/slow/{ms}", &[]), json!({"ms": milliseconds})),
    }
}

/// Returns an upstream with a structured result, with its arguments.
fn structured(over: Over) -> (Upstream, Value) {
    match over {
        Mcp => (everything("get-structured-content"), json!({"location": "Chicago"})),
        Http => (over_http(HttpMethod::Post, "/weather", &[]), json!({"is": {"temperature": 7, "conditions": "rain"}})),
    }
}

fn with(row: Row, (upstream, args): (Upstream, Value)) -> Row {
    Row { tool: Tool { upstream, ..row.tool }, args, ..row }
}

fn numbers(required: &str) -> Option<Value> {
    Some(json!({"type": "object", "properties": {required: {"type": "number"}}, "required": [required]}))
}

fn approval(hold_seconds: i64) -> Option<Approval> {
    Some(approvals::approval_held(hold_seconds))
}

/// Returns whether the approval request hides the message.
fn redacted(evidence: &Evidence) -> bool {
    let shown = evidence.request.as_ref().map(|request| request.spec.arguments.as_str());
    shown == Some(r#"{"message":"[redacted]"}"#)
}

/// Returns the table. `echo` is the digest of `server-everything`'s own definition of that tool.
fn table(echo: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    for over in [Mcp, Http] {
        let row = |field, side| row(field, side, over);
        let mut add = |row: Row| rows.push(row);

        add(row("tool", Allowed));
        add(refused(Row { called: Some(format!("TOOL.DENIED.{over:?}")), ..row("tool", Denied) }, Rule::ToolUnknown));
        // Cyrillic letters where the contract has Latin letters.
        let alike = format!("t\u{43e}\u{43e}l.edge.{over:?}").to_lowercase();
        add(refused(Row { called: Some(alike), ..row("tool", Edge) }, Rule::ToolUnknown));

        match over {
            Mcp => {
                let pinned = |digest: &str| {
                    Upstream::Mcp(McpUpstream {
                        url: "http://everything.test/mcp".into(),
                        tool: "echo".into(),
                        digest: Some(digest.into()),
                    })
                };
                let read = |row| with(row, (files("read_text_file"), json!({"path": "notes.txt"})));
                add(Row { seen: Seen::Text("remember the milk"), ..read(row("upstream", Allowed)) });
                let hi = || json!({"message": "hi"});
                add(refused(with(row("upstream", Denied), (pinned(&"ab".repeat(32)), hi())), Rule::ToolChanged));
                add(with(row("upstream", Edge), (pinned(echo), hi())));
            }
            Http => {
                let item = || over_http(HttpMethod::Get, "/items/{id}", &[]);
                add(Row { seen: Seen::Text("/items/7"), ..with(row("upstream", Allowed), (item(), json!({"id": 7}))) });
                add(refused(with(row("upstream", Denied), (item(), json!({"id": "../admin"}))), Rule::ToolUrl));
                let within = with(row("upstream", Edge), (item(), json!({"id": "a&b 5%"})));
                add(Row { seen: Seen::Text("/items/a%26b%205%25"), ..within });
            }
        }

        let short = json!({
            "type": "object", "properties": {"message": {"type": "string", "maxLength": 5}}, "additionalProperties": false,
        });
        let typed = |row: Row, message: Value| Row {
            tool: Tool { input: short.clone(), ..row.tool },
            args: json!({"message": message}),
            ..row
        };
        add(typed(row("input", Allowed), json!("hi")));
        add(refused(typed(row("input", Denied), json!(7)), Rule::ToolSchema));
        add(typed(row("input", Edge), json!("hi-5!")));

        let shaped = |row: Row, output| {
            let row = with(row, structured(over));
            Row { tool: Tool { output, ..row.tool }, seen: Seen::Text("temperature"), ..row }
        };
        add(shaped(row("output", Allowed), numbers("temperature")));
        let misfit = shaped(row("output", Denied), numbers("colour"));
        add(Row {
            seen: Seen::Refused(Rule::ToolOutput),
            told: Told::Made(CallOutcome::Applied, Some(Rule::ToolOutput)),
            ..misfit
        });
        add(shaped(row("output", Edge), Some(json!({"type": "object"}))));

        let calls = |calls| ToolLimits { calls: Some(calls), ..ToolLimits::default() };
        let hello = || json!({"message": "hello"});
        add(limited(calls(1), row("limits.calls", Allowed)));
        let second = |row: Row| Row { before: vec![hello()], ..row };
        // The call limit comes before the rate, because no wait helps against it.
        let both = ToolLimits { per_minute: Some(1), ..calls(1) };
        add(refused(second(limited(both, row("limits.calls", Denied))), Rule::ToolLimitCalls));
        add(second(limited(calls(2), row("limits.calls", Edge))));

        let rate = |rate| ToolLimits { per_minute: Some(rate), ..ToolLimits::default() };
        add(limited(rate(1), row("limits.perMinute", Allowed)));
        add(refused(second(limited(rate(1), row("limits.perMinute", Denied))), Rule::ToolRate));
        add(second(limited(rate(2), row("limits.perMinute", Edge))));

        let timed = |seconds, row: Row, takes| {
            let limits = ToolLimits { timeout_seconds: Some(seconds), ..ToolLimits::default() };
            Row { seen: Seen::Text(""), ..limited(limits, with(row, slow(over, takes))) }
        };
        add(timed(5, row("limits.timeoutSeconds", Allowed), 10));
        add(Row {
            seen: Seen::Refused(Rule::ToolTimeout),
            told: Told::Made(CallOutcome::Unknown, Some(Rule::ToolTimeout)),
            ..timed(1, row("limits.timeoutSeconds", Denied), 20_000)
        });
        add(timed(2, row("limits.timeoutSeconds", Edge), 1_000));

        let taken = |bytes| ToolLimits { request_bytes: Some(bytes), ..ToolLimits::default() };
        add(limited(taken(100), row("limits.requestBytes", Allowed)));
        add(refused(limited(taken(15), row("limits.requestBytes", Denied)), Rule::ToolRequestBytes));
        // `{"message":"hi"}` has 16 bytes.
        add(limited(taken(16), row("limits.requestBytes", Edge)));

        let given = |bytes| ToolLimits { response_bytes: Some(bytes), ..ToolLimits::default() };
        let long = |row: Row| Row { args: json!({"message": format!("hi{}", "x".repeat(3_000))}), ..row };
        add(limited(given(100_000), long(row("limits.responseBytes", Allowed))));
        add(Row {
            seen: Seen::Refused(Rule::ToolResponseBytes),
            told: Told::Made(
                if over == Mcp { CallOutcome::Unknown } else { CallOutcome::Applied },
                Some(Rule::ToolResponseBytes),
            ),
            ..limited(given(2_000), long(row("limits.responseBytes", Denied)))
        });
        add(limited(given(4_000), long(row("limits.responseBytes", Edge))));

        let polite = |cel: &str, row: Row| {
            let condition = Precondition { name: "polite".into(), cel: cel.into(), message: "be polite".into() };
            Row { tool: Tool { preconditions: vec![condition], ..row.tool }, ..row }
        };
        add(polite("args.message != 'rude'", row("preconditions", Allowed)));
        add(refused(polite("args.message == 'please'", row("preconditions", Denied)), Rule::ToolPrecondition));
        // A precondition that cannot be evaluated is not true.
        add(refused(polite("args.tone == 'soft'", row("preconditions", Edge)), Rule::ToolPrecondition));

        let once = |row: Row, first: Value| {
            let of = Idempotency { argument: Some("order".into()), header: None, window_seconds: 600 };
            let input = json!({"type": "object", "required": ["order"]});
            let before = if first.is_null() { vec![] } else { vec![first] };
            let args = json!({"message": "hi", "order": 1});
            Row { tool: Tool { idempotency: Some(of), input, ..row.tool }, before, args, ..row }
        };
        let keyed =
            |evidence: &Evidence| evidence.intent.as_ref().is_some_and(|intent| intent.idempotency_key.is_some());
        add(Row { also: keyed, ..once(row("idempotency", Allowed), Value::Null) });
        let other = json!({"message": "something else", "order": 1});
        add(refused(once(row("idempotency", Denied), other), Rule::ToolIdempotency));
        let twin = json!({"message": "hi", "order": 1});
        add(Row { told: Told::Replayed, ..once(row("idempotency", Edge), twin) });

        // The upstream of the read returns its arguments. If `truth` is neither `done` nor `not`, the expression is neither true nor false.
        let lost = |row: Row, truth: &str| {
            let said = if over == Mcp { "result" } else { "result.body" };
            let verify = VerifyRead {
                tool: format!("look.{over:?}").to_lowercase(),
                arguments: BTreeMap::from([("message".to_owned(), "/truth".to_owned())]),
                applied: format!("{said}.contains('done') || !{said}.contains('not') && 'perhaps'"),
                settle_seconds: 2,
            };
            let mut row = timed(1, row, 20_000);
            row.args["truth"] = truth.into();
            Row { tool: Tool { verify: Some(verify), ..row.tool }, seen: Seen::Refused(Rule::ToolTimeout), ..row }
        };
        add(Row { told: Told::Resolved(CallOutcome::Applied), ..lost(row("verify", Allowed), "done") });
        add(Row { told: Told::Resolved(CallOutcome::NotApplied), ..lost(row("verify", Denied), "not") });
        let unknown = Told::Made(CallOutcome::Unknown, Some(Rule::ToolTimeout));
        add(Row { told: unknown, ..lost(row("verify", Edge), "perhaps") });

        // The call itself is made in every row. In the row `Denied`, the arguments of its compensation cannot be evaluated.
        let undone = |row: Row, how| Row { tool: Tool { rollback: Some(how), ..row.tool }, ..row };
        let by_call = |text: &str| {
            let arguments = BTreeMap::from([("text".to_owned(), text.to_owned())]);
            Rollback::Call(Compensation { contract: "unsay".into(), arguments, within_seconds: None })
        };
        let of_hi = |evidence: &Evidence| {
            let digest = evidence.outcome.as_ref().and_then(|outcome| outcome.compensation_commitment.clone());
            digest == Some(gateway::salt().value(&json!({"text": "undo hi"})).unwrap())
        };
        let of_nothing = |evidence: &Evidence| {
            evidence.outcome.as_ref().is_some_and(|outcome| outcome.compensation_commitment.is_none())
        };
        add(Row { also: of_hi, ..undone(row("rollback", Allowed), by_call("'undo ' + args.message")) });
        add(Row { also: of_nothing, ..undone(row("rollback", Denied), by_call("result.nowhere.at")) });
        add(Row { also: of_nothing, ..undone(row("rollback", Edge), Rollback::ByHand("say sorry".into())) });

        let asking =
            |row: Row, hold, people| Row { tool: Tool { approval: approval(hold), ..row.tool }, people, ..row };
        let by_one = |evidence: &Evidence| evidence.intent.as_ref().is_some_and(|intent| intent.approvals.len() == 1);
        add(Row { also: by_one, ..asking(row("approval", Allowed), 20, Some(Answer::Approve)) });
        add(refused(asking(row("approval", Denied), 20, Some(Answer::Deny)), Rule::ToolApproval));
        add(Row { seen: Seen::Pending, told: Told::Asked, ..asking(row("approval", Edge), 0, None) });

        add(row("sideEffect", Allowed));
        let outside = row("sideEffect", Denied);
        let outside = Row { tool: Tool { side_effect: SideEffect::External, ..outside.tool }, ..outside };
        add(refused(outside, Rule::ToolEffect));
        let edge = row("sideEffect", Edge);
        add(match over {
            // The contract says read, and the server itself says that the tool writes. The server's statement counts.
            Mcp => {
                let args = json!({"path": "written.txt", "content": "by the edge"});
                let read = Tool { side_effect: SideEffect::Read, upstream: files("write_file"), ..edge.tool };
                let also = |evidence: &Evidence| {
                    evidence.intent.as_ref().is_some_and(|intent| intent.side_effect == Some(SideEffect::Write))
                };
                Row { tool: read, args, seen: Seen::Text("written.txt"), also, ..edge }
            }
            // Only its contract says what an HTTP tool changes.
            Http => {
                let also = |evidence: &Evidence| {
                    evidence.intent.as_ref().is_some_and(|intent| intent.side_effect == Some(SideEffect::Read))
                };
                Row { tool: Tool { side_effect: SideEffect::Read, ..edge.tool }, also, ..edge }
            }
        });

        let classed = |row: Row, arguments, result| Row {
            tool: Tool { data: DataClass { arguments, result }, ..row.tool },
            ..row
        };
        let answered = |evidence: &Evidence| {
            evidence.outcome.as_ref().is_some_and(|outcome| outcome.sensitivity == Sensitivity::Internal)
        };
        let given = |evidence: &Evidence| {
            let assessed = evidence.intent.as_ref().and_then(|intent| intent.assessment.as_ref());
            assessed.is_some_and(|assessed| assessed.arguments == Sensitivity::Confidential)
        };
        let none = Sensitivity::Unclassified;
        add(Row { also: answered, ..classed(row("data", Allowed), none, Sensitivity::Internal) });
        add(refused(classed(row("data", Denied), Sensitivity::Restricted, none), Rule::AccessRule));
        add(Row { also: given, ..classed(row("data", Edge), Sensitivity::Confidential, none) });

        let hidden = |row: Row, pointer: &str, people| {
            let row = asking(row, 20, Some(people));
            Row { tool: Tool { redact: vec![pointer.into()], ..row.tool }, ..row }
        };
        add(Row { also: redacted, ..hidden(row("redact", Allowed), "/message", Answer::Approve) });
        let no = hidden(row("redact", Denied), "/message", Answer::Deny);
        add(Row { also: redacted, ..refused(no, Rule::ToolApproval) });
        // A pointer to nothing redacts nothing.
        let whole = |evidence: &Evidence| !redacted(evidence) && evidence.request.is_some();
        add(Row { also: whole, ..hidden(row("redact", Edge), "/nothing", Answer::Approve) });
    }
    rows
}

/// Returns the policy of the table's task: every row's tool, and the tools that `verify` reads with. The pack denies restricted arguments.
fn policy_of(rows: &[Row]) -> PolicyConfig {
    let limits = Limits {
        wall_time_seconds: 300,
        tool_calls: 1_000,
        tokens: 0,
        denials: None,
        cost_micros: None,
        approval_wait_seconds: 600,
    };
    let rule = |name: &str, decision, when: Option<&str>| AccessRule {
        name: name.into(),
        principals: vec![],
        tools: vec![],
        effects: vec![],
        when: when.map(Into::into),
        decision,
        message: None,
    };
    let mut policy = policy(limits);
    policy.task.requester = Some("ci".into());
    policy.access.rules = vec![
        rule("all", RuleDecision::Allow, None),
        rule("restricted", RuleDecision::Deny, Some("data.arguments == 'Restricted'")),
    ];
    policy.tools = rows.iter().map(|row| row.tool.clone()).collect();
    policy.tools.push(tool("look.mcp", everything("echo"), SideEffect::Read));
    policy.tools.push(tool("look.http", over_http(HttpMethod::Post, "/items", &[]), SideEffect::Read));
    let host = policy.egress.iter().find(|entry| entry.host == "everything.test").unwrap().clone();
    policy.egress.push(EgressHost { host: "files.test".into(), ..host });
    policy
}

/// Returns the digest of `server-everything`'s definition of `echo`, as the intent of a call has it.
async fn digest_of_echo(everything: SocketAddr) -> String {
    let one = row("tool", Allowed, Mcp);
    let name = one.name();
    let harness = harness_of(policy_of(&[one]), vec![("everything.test".into(), everything)]).await;
    let (error, text) = harness.tool(&name, json!({"message": "hi"})).await;
    assert!(!error, "{text}");
    let (_, found) = evidence(&harness, &harness.records().await, &[], &name);
    found.intent.unwrap().definition_digest.unwrap()
}

/// Makes all calls in one session of a third-party client.
async fn made_by(kind: &str, harness: &Harness, calls: &[(String, Value)]) -> Vec<(bool, String)> {
    if kind == "rmcp" {
        let mut results = Vec::new();
        for (name, args) in calls {
            results.push(harness.tool(name, args.clone()).await);
        }
        return results;
    }
    let url = format!("http://{}/mcp", harness.address);
    let seen = client(client_of(kind), &url, &json!(calls)).await;
    let results = seen["results"].as_array().unwrap().iter();
    results.map(|one| (one["isError"] == true, one["text"].as_str().unwrap().to_owned())).collect()
}

/// Decides about each request as the row of its tool says. It never returns.
async fn people(harness: &Harness, answers: &BTreeMap<String, Answer>) {
    loop {
        for request in harness.gateway.requests().into_iter().filter(|request| request.status.is_none()) {
            if let Some(answer) = answers.get(&request.spec.tool) {
                harness.gateway.decide(&request.name_any(), "ana", *answer);
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Returns what the log says about a tool's last call.
fn evidence(
    harness: &Harness,
    records: &[Record],
    requests: &[ApprovalRequest],
    name: &str,
) -> (Option<Told>, Evidence) {
    // If the name does not look like a name, the record has the commitment to it.
    let refused = harness.gate.redactor().name(name, harness.gate.salt());
    let mut found = Evidence {
        intent: None,
        outcome: None,
        request: requests.iter().find(|request| request.spec.tool == name).cloned(),
    };
    let mut told = None;
    for record in records {
        match &record.event {
            Event::Denied(denied) if denied.target == refused => told = Some(Told::Denied(denied.rule)),
            Event::Intent(intent) if intent.target == name && intent.channel.as_str() == "tool" => {
                (found.intent, told) = (Some(intent.clone()), None);
            }
            Event::Outcome(outcome) if found.intent.as_ref().is_some_and(|intent| intent.call == outcome.call) => {
                told = Some(Told::Made(outcome.outcome, outcome.rule));
                found.outcome = Some(outcome.clone());
            }
            Event::Resolved(resolved) if found.intent.as_ref().is_some_and(|intent| intent.call == resolved.call) => {
                told = Some(Told::Resolved(resolved.outcome));
            }
            Event::Replayed(replayed) if replayed.target == name => told = Some(Told::Replayed),
            Event::ApprovalRequested(asked) if asked.tool == name => told = Some(Told::Asked),
            _ => {}
        }
    }
    (told, found)
}

#[rstest]
#[case::rmcp("rmcp")]
#[case::python("python")]
#[case::typescript("typescript")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_table_holds(#[case] kind: &str) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("notes.txt"), "remember the milk").unwrap();
    let (everything, files) = tokio::join!(Everything::start(), Files::start(folder.path()));
    let rows = in_folder(table(&digest_of_echo(everything.1).await), folder.path());
    let upstreams = vec![("everything.test".into(), everything.1), ("files.test".into(), files.1)];
    let harness = harness_of(policy_of(&rows), upstreams).await;
    let calls = rows.iter().flat_map(|row| {
        let before = row.before.iter().map(|args| (row.name(), args.clone()));
        before.chain([(row.name(), row.args.clone())]).collect::<Vec<_>>()
    });
    let calls: Vec<(String, Value)> = calls.collect();
    let answers = rows.iter().filter_map(|row| Some((row.tool.name.clone(), row.people?))).collect();
    let results = tokio::select! {
        results = made_by(kind, &harness, &calls) => results,
        () = people(&harness, &answers) => unreachable!(),
    };
    assert_eq!(results.len(), calls.len());
    // The last outcomes may not be stored yet.
    harness.gate.journal().caught_up().await.unwrap();
    let (records, requests) = (harness.records().await, harness.gateway.requests());
    let mut wrong = Vec::new();
    let mut results = results.into_iter();
    for row in &rows {
        let (error, text) = results.by_ref().nth(row.before.len()).unwrap();
        let seen = match row.seen {
            Seen::Text(part) => !error && text.contains(part),
            Seen::Refused(rule) => {
                error && text.starts_with("Belay ") && text.contains(&format!(" this call. rule: {rule}."))
            }
            Seen::Pending => !error && text.contains("pending"),
        };
        let (told, found) = evidence(&harness, &records, &requests, &row.name());
        if !seen || told != Some(row.told) || !(row.also)(&found) {
            let (name, expected) = (row.name(), (row.seen, row.told));
            wrong.push(format!("{name}: expected {expected:?}, the agent saw {text:?}, the evidence says {told:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} rows: {wrong:#?}", wrong.len(), rows.len());
    assert_eq!(std::fs::read_to_string(folder.path().join("written.txt")).unwrap(), "by the edge");
}

/// Makes the paths of the rows absolute, as the file server requires.
fn in_folder(mut rows: Vec<Row>, folder: &Path) -> Vec<Row> {
    for row in &mut rows {
        if let Some(name) = row.args.get("path").and_then(Value::as_str).map(str::to_owned) {
            row.args["path"] = folder.join(name).to_str().unwrap().into();
        }
    }
    rows
}

/// Fields that have no influence on calls.
const SAYS_NOTHING_TO_A_CALL: [&str; 1] = ["description"];

#[test]
fn every_field_has_its_rows() {
    let crd = serde_json::to_value(ToolContract::crd()).unwrap();
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    let fields = |of: &Value| of.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let limits = fields(&spec["limits"]["properties"]).into_iter().map(|name| format!("limits.{name}"));
    let all = fields(spec).into_iter().filter(|name| name != "limits").chain(limits);
    let expected: BTreeSet<_> = all.filter(|name| !SAYS_NOTHING_TO_A_CALL.contains(&name.as_str())).collect();
    let rows = table("");
    let found: BTreeSet<_> = rows.iter().map(|row| (row.field.to_owned(), row.side, row.over)).collect();
    assert_eq!(found.len(), rows.len(), "a row is there twice");
    for field in &expected {
        for (side, over) in [Allowed, Denied, Edge].into_iter().flat_map(|side| [(side, Mcp), (side, Http)]) {
            assert!(found.contains(&(field.clone(), side, over)), "no row for {field}, {side:?}, over {over:?}");
        }
    }
    assert!(found.iter().all(|(field, ..)| expected.contains(field)), "rows of a field that is not there");
}
