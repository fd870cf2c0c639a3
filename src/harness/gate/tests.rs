//! No generated call delays the harness's own work: generated calls of generated contracts run beside a ticker and a signal on the
//! harness's own thread.
//!
//! `BELAY_CALLS=1000000 cargo test --release --no-default-features --features harness --lib generated_call -- --nocapture` runs this many
//! calls and prints the worst delays.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::*;
use crate::{
    evidence::{
        merkle::Tree,
        note::{self, Signer},
        record::{AttemptOpened, Pod},
        segment::Segment,
        state::{TaskState, User},
    },
    harness::{gateway_client::CallError, journal, spool::Spool},
    policy::{
        approval::Approvers,
        config::{
            Approval, Compensation, HttpMethod, HttpUpstream, Limits, OnTimeout, PolicyConfig, Precondition, Probe,
            Rollback, Upstream, VerifyRead, Wiring,
        },
        decide::tests::{policy as small, salt},
    },
    wire::{AppendReply, AppendRequest},
};

mod ticker;

use ticker::{Watched, inside, outside};

/// Pseudo-random numbers that are the same in each run.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, most: u64) -> u64 {
        self.next() % most.max(1)
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let index = self.below(of.len() as u64) as usize;
        &of[index]
    }

    fn is(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// Returns an expression of nested parts of the grammar.
fn grown(dice: &mut Dice, depth: u32, variables: &[&str]) -> String {
    if depth == 0 || dice.is(5) {
        return (*dice.one(variables)).to_owned();
    }
    let deeper = depth - 1;
    let part = |dice: &mut Dice| grown(dice, deeper, variables);
    match dice.below(9) {
        0 | 1 => format!(
            "({} {} {})",
            part(dice),
            dice.one(&["==", "!=", "&&", "||", "+", "<", "in"]).to_owned(),
            part(dice)
        ),
        2 | 3 => {
            let (over, name) = (part(dice), dice.one(&["all", "exists", "exists_one", "map", "filter"]).to_owned());
            let variable = format!("v{deeper}");
            let mut inner: Vec<&str> = variables.to_vec();
            inner.extend([variable.as_str(), variable.as_str()]);
            format!("{over}.{name}({variable}, {})", grown(dice, deeper, &inner))
        }
        4 => format!("({} ? {} : {})", part(dice), part(dice), part(dice)),
        5 => format!("[{}, {}]", part(dice), part(dice)),
        6 => format!("{{'k': {}, 'l': {}}}", part(dice), part(dice)),
        7 => format!("string({}).matches(string({}))", part(dice), part(dice)),
        _ => format!("{}({})", dice.one(&["size", "string", "!", "int"]), part(dice)),
    }
}

/// Returns an expression that a contract may have. Some are handwritten.
fn expression(dice: &mut Dice, result: bool) -> String {
    const WRITTEN: [&str; 14] = [
        "args.n.all(x, args.n.exists_one(y, x == y))",
        "args.l.all(x, x.matches('^[a-z0-9-]+$')) && size(args.l) < 100",
        "args.l.all(x, args.l.filter(y, y == x).size() == 1)",
        "!args.n.exists(x, args.n.exists(y, x + y == -1))",
        "size(args.s) < 4000 && !args.s.contains('secret')",
        "args.s.matches('^(a+)+$')",
        "matches(args.s, args.s)",
        "size(args.n.map(x, args.n.map(y, y + x))) >= 0",
        "args.n == args.n && args.l == args.l && args.o == args.o",
        "size([[[args.s].map(x, x + x)[0]].map(x, x + x)[0]].map(x, x + x)[0]) > 0",
        "usage.toolCalls < 100 && args.n.all(x, args.n.all(y, true))",
        "has(args.o.a) ? args.o.a == 1 : args.n.filter(x, x > 2).size() >= 0",
        "args.n.map(x, args.l).size() > 0",
        "args.s + args.s + args.s + args.s != ''",
    ];
    let mut variables =
        vec!["args.n", "args.l", "args.s", "args.o", "args.n[0]", "1", "'a'", "true", "[1, 2, 3]", "usage.toolCalls"];
    if result {
        variables = vec!["args.n", "args.l", "args.s", "result", "result", "1", "'a'", "true"];
    }
    for _ in 0..20 {
        let source = if dice.is(2) { (*dice.one(&WRITTEN)).to_owned() } else { grown(dice, 4, &variables) };
        let source = if result { source.replace("usage.toolCalls", "1") } else { source };
        if may_be(&source) {
            return source;
        }
    }
    "true".to_owned()
}

/// Returns a schema that a contract may have.
fn input(dice: &mut Dice) -> Value {
    let more = dice
        .one(&[
            json!({}),
            json!({}),
            json!({"properties": {"n": {"uniqueItems": true}}}),
            json!({"properties": {"l": {"items": {"pattern": "^(?=.*a)(?!.*(b+)+c)[a-z]*$"}}}}),
            json!({"properties": {"s": {"pattern": r"^(\w+\s?)*$"}}}),
            json!({"properties": {"n": {"contains": {"enum": (0..400).collect::<Vec<_>>()}}}}),
            json!({"properties": {"o": {"patternProperties": {"^(a|aa)+$": true}, "propertyNames": {"maxLength": 40}}}}),
            json!({
                "properties": {"t": {"$ref": "#/$defs/t"}},
                "$defs": {"t": {"anyOf": [
                    {"type": "object", "required": ["c"], "properties": {"a": {"$ref": "#/$defs/t"}, "b": true}},
                    {"type": "object", "required": ["b"], "properties": {"a": {"$ref": "#/$defs/t"}, "b": true}},
                    {"const": 1},
                ]}},
            }),
        ])
        .clone();
    let mut whole = json!({
        "type": "object",
        "properties": {
            "n": {"type": "array", "items": {"type": "integer"}}, "l": {"type": "array", "items": {"type": "string"}},
            "s": {"type": "string"}, "o": {"type": "object"}, "t": true,
        },
        "additionalProperties": false,
    });
    for (name, of) in more.get("properties").and_then(Value::as_object).into_iter().flatten() {
        whole["properties"][name] = of.clone();
    }
    if let Some(definitions) = more.get("$defs") {
        whole["$defs"] = definitions.clone();
    }
    whole
}

fn contract(dice: &mut Dice, number: usize) -> Tool {
    let name = format!("t{number}");
    let precondition =
        |dice: &mut Dice| Precondition { name: "p".into(), cel: expression(dice, false), message: "m".into() };
    let mut made = Tool {
        input: input(dice),
        preconditions: (0..dice.below(3)).map(|_| precondition(dice)).collect(),
        ..tool(&name)
    };
    if dice.is(3) {
        made.approval = Some(Approval {
            when: Some(expression(dice, false)),
            approvers: Approvers { users: vec![], groups: vec!["finance".into()] },
            required: 1,
            timeout_seconds: 60,
            on_timeout: OnTimeout::Deny,
            hold_seconds: 0,
        });
    }
    made.verify = Some(VerifyRead {
        tool: name.clone(),
        arguments: BTreeMap::new(),
        applied: expression(dice, true),
        settle_seconds: 0,
    });
    let arguments = [("a".to_owned(), expression(dice, true)), ("b".to_owned(), expression(dice, true))].into();
    made.rollback = Some(Rollback::Call(Compensation { contract: name, arguments, within_seconds: None }));
    if dice.is(2) {
        made.output = Some(input(dice));
    }
    made
}

/// Returns arguments. Most are short; a few are as long as arguments may be.
fn arguments(dice: &mut Dice) -> Value {
    let most = match dice.below(1000) {
        0..=899 => 12,
        900..=979 => 200,
        980..=997 => 3_000,
        _ => 150_000,
    };
    let count = dice.below(most);
    let long = "a".repeat(usize::try_from(dice.below(most * 20)).unwrap());
    let mut made = json!({
        "n": (0..count).collect::<Vec<_>>(), "l": (0..dice.below(most) / 4).map(|n| format!("a-{n}")).collect::<Vec<_>>(),
        "s": long, "o": {"a": 1, "aaaaaaaaaaaaaaaaaaaaaaaaaaaa!": 2},
    });
    if dice.is(4) {
        made["t"] = (0..dice.below(90)).fold(json!(1), |inner, _| json!({"a": inner, "b": 1}));
    }
    made
}

/// No generated call delays the harness's own work: not by its schema, its preconditions, its approval's condition, the check of whether it
/// took effect, the arguments of its compensation, or its result.
#[test]
#[expect(clippy::print_stdout, reason = "how many came to what is what is asked for")]
fn no_generated_call_delays_what_is_the_harnesss_own() {
    let calls: u64 = std::env::var("BELAY_CALLS").map_or(1_500, |calls| calls.parse().expect("BELAY_CALLS: a number"));
    let (outside, inside) = (outside(), inside());
    let own = inside.handle().clone();
    // This thread does nothing else. The test generates its input on its own thread.
    std::thread::spawn(move || inside.block_on(std::future::pending::<()>()));
    let _own = own.enter();
    let mut dice = Dice(0x5EED_0F7E_11A1);
    let watched = Watched::begin();
    let (mut made, mut ends) = (0_u64, BTreeMap::<&'static str, u64>::new());
    while made < calls {
        let mut policy = small(vec![SideEffect::Write]);
        policy.limits = Limits { tool_calls: 1 << 40, wall_time_seconds: 1 << 20, ..policy.limits };
        policy.tools = (0..16).map(|number| contract(&mut dice, number)).collect();
        let gate = gate(policy);
        let batch: Vec<_> = (0..1000.min(calls - made))
            .map(|_| (format!("t{}", dice.below(16)), arguments(&mut dice), dice.below(8)))
            .collect();
        made += batch.len() as u64;
        outside.block_on(async {
            let batch = Arc::new(Mutex::new(batch.into_iter()));
            // An agent may make any number of concurrent calls.
            let workers: Vec<_> = (0..8)
                .map(|_| {
                    let (batch, gate) = (batch.clone(), gate.clone());
                    tokio::spawn(async move {
                        let mut ends = BTreeMap::<&'static str, u64>::new();
                        loop {
                            let next = batch.lock().next();
                            let Some((name, args, kind)) = next else { return ends };
                            *ends.entry(judged(&gate, &name, args, kind).await).or_default() += 1;
                        }
                    })
                })
                .collect();
            for worker in workers {
                for (end, count) in worker.await.unwrap() {
                    *ends.entry(end).or_default() += count;
                }
            }
        });
    }
    println!("{made} calls: {ends:?}");
    assert!(ends.len() > 2, "some pass, some are refused, some take too much: {ends:?}");
    watched.is_in_time();
}

/// Evaluates one call as its pipeline does, and returns the result.
async fn judged(gate: &Arc<Gate>, name: &str, args: Value, kind: u64) -> &'static str {
    let length = serde_json::to_vec(&args).unwrap().len();
    let five = Duration::from_secs(5);
    let (of, from) = (name.to_owned(), args.clone());
    let long = match kind {
        0 => gate
            .apart(five, move |gate| gate.contracts().applied(&of, &from, &from).map(|_| ()))
            .await
            .and_then(as_denial),
        1 => {
            gate.apart(five, move |gate| gate.contracts().undo(&of, &from, &from).map(|_| ())).await.and_then(as_denial)
        }
        2 => gate.apart(five, move |gate| gate.outputs().check(&of, &from)).await.and_then(as_denial),
        _ => gate.decide(name, args, length).await.verdict,
    };
    match long {
        Ok(()) => "yes",
        Err(denial) if denial.rule == Rule::Busy => "not judged in time",
        Err(denial) if denial.reason.contains("more than") => "too much",
        Err(_) => "no",
    }
}

fn as_denial(answer: Result<(), String>) -> Result<(), Denial> {
    answer.map_err(|reason| Denial { rule: Rule::ToolPrecondition, reason })
}

/// Returns whether a contract may have this expression.
#[cfg(feature = "kube")]
fn may_be(source: &str) -> bool {
    crate::render::condition::check_among(source, &["args", "task", "principal", "usage", "results", "result"]).is_ok()
}

/// Builds without the checks of contracts use the depth limit alone, which the generator keeps.
#[cfg(not(feature = "kube"))]
fn may_be(source: &str) -> bool {
    Contracts::compile(&small(vec![])).is_ok() && crate::policy::expression::Expression::compile(source).is_ok()
}

fn tool(name: &str) -> Tool {
    let mut made = small(vec![]).tools.remove(0);
    name.clone_into(&mut made.name);
    name.clone_into(&mut made.contract);
    made.upstream =
        Upstream::Http(HttpUpstream { method: HttpMethod::Post, url: "http://api.test/items".into(), query: vec![] });
    made.limits.timeout_seconds = Some(5);
    made
}

/// A witness that accepts everything at once.
struct Takes;

impl journal::Witness for Takes {
    fn append<'a>(&'a self, request: &'a AppendRequest) -> BoxFuture<'a, Result<AppendReply, CallError>> {
        let (segment, _) = Segment::read(request.segment.as_bytes()).unwrap();
        Box::pin(async move { Ok(AppendReply { size: segment.end(), checkpoint: None }) })
    }
}

/// Creates a gate as a harness has it.
fn gate(policy: PolicyConfig) -> Arc<Gate> {
    gate_followed_by(policy, Box::new(|_, _| ()))
}

/// Creates a gate as a harness has it. `follow` gets each record of its log.
pub(crate) fn gate_followed_by(policy: PolicyConfig, follow: journal::Follow) -> Arc<Gate> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir().unwrap();
    let ca = rcgen::generate_simple_self_signed(["gateway".to_owned()]).unwrap().cert.pem();
    let probe = Probe { reachable: "r".into(), unreachable: vec![] };
    let wiring = Wiring { attempt: 1, gateway: "127.0.0.1:1".into(), gateway_ca: ca, probe };
    let link = Arc::new(GatewayClient::new(&wiring, folder.path().join("token"), None).unwrap());
    let (spool, _) = Spool::open(folder.path()).unwrap();
    let uid = &policy.task.uid;
    let start = journal::Start {
        attempt: 1,
        tree: Tree::default(),
        signer: Signer::generate(&note::attempt_key_name(uid, 1)).unwrap(),
        origin: note::origin(uid),
        state: TaskState::new(User::Harness, &note::origin(uid)),
        spool,
        follow,
    };
    let key = start.signer.verifier().to_string();
    let journal = Journal::start(start, Arc::new(Takes));
    let opened = AttemptOpened {
        verifier_key: key,
        policy: policy.clone(),
        pod: Pod {
            name: "t-1".into(),
            uid: "pod".into(),
            node: "node".into(),
            runtime_class: String::new(),
            network_policy: "t-1".into(),
        },
        containment: Containment {
            contained: true,
            rounds: 3,
            millis: 1,
            reachable: "r".into(),
            unreachable: vec![],
            breaches: vec![],
        },
        rollback: None,
        local: None,
    };
    journal.record(|_, _| Ok(Event::AttemptOpened(Box::new(opened)))).unwrap();
    let clock = Clock::start(Duration::from_secs(1 << 20), Duration::ZERO);
    let approvals = Approvals::new(link.clone(), journal.clone(), clock.clone());
    let compiled = Compiled {
        contracts: Contracts::compile(&policy).unwrap(),
        guard: AccessPolicy::compile(&policy).unwrap(),
        outputs: Outputs::compile(&policy.tools).unwrap(),
    };
    let once = Deduplicator::new(false, salt());
    Arc::new(Gate::new(compiled, once, salt(), journal, link, clock, approvals))
}
