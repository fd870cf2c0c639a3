//! Two logs in which everything happens that the evidence format lets follow from a policy, and whose policies and plan have every member.
//! No real run has all of this.
//!
//! The policy is written without defaults: this file does not compile until a new member has a value, see `sweep`.

use std::{collections::BTreeMap, sync::LazyLock};

use belay::{
    evidence::{
        note::{self, Signer, WITNESS_NAME},
        record::{
            Approval as Asked, CallOutcome, Channel, Containment, Denied, Event, Intent, Outcome, Record, Replayed,
            Resolved,
        },
        rollback::{By, Plan, Step, Undo},
    },
    policy::{
        access::{Assessment, Score},
        approval::{Answer, ApprovalSource, ApprovalState, Approvers, Vote},
        config::{
            Access, AccessRule, Approval, Compensation, DataClass, DataPattern, EgressHost, EgressUse, HttpMethod,
            HttpUpstream, Idempotency, Limits, McpUpstream, ModelEndpoint, ModelEndpoints, ModelPrice, OnTimeout,
            OutputLimitField, PackIdentity, PolicyConfig, Precondition, Risk, RiskTerm, Rollback, RollbackOf,
            RuleDecision, Sensitivity, SideEffect, StoreReplies, StreamUsage, TaskIdentity, Tokenizer, Tool,
            ToolLimits, UnknownMembers, Upstream, VerifyRead,
        },
        ledger,
        model::{api::Family, table::Capability},
        rule::Rule,
    },
};
use serde_json::json;

use crate::{
    forge::{self, Keys, Segments},
    runs::Story,
    script::{UID, attempt_closed, contained, opened, record, task_closed},
};

/// The uid of the task that is rolled back.
const OTHER: &str = "6f9c3c1e-0000-4000-8000-0000000000ff";

fn approval(when: Option<&str>, required: i64, on_timeout: OnTimeout) -> Approval {
    Approval {
        when: when.map(str::to_owned),
        approvers: Approvers { users: vec!["ana".into(), "bob".into()], groups: vec!["sre".into()] },
        required,
        timeout_seconds: 60,
        on_timeout,
        hold_seconds: 30,
    }
}

fn mcp(tool: &str, digest: Option<String>) -> Upstream {
    Upstream::Mcp(McpUpstream { url: "https://tools.world.test/mcp".into(), tool: tool.into(), digest })
}

fn tools() -> Vec<Tool> {
    let find = Tool {
        contract: "find-v1".into(),
        name: "find".into(),
        description: "Finds.".into(),
        upstream: mcp("find", Some(digest("find"))),
        input: json!({"type": "object"}),
        output: None,
        limits: ToolLimits::default(),
        preconditions: vec![],
        idempotency: None,
        verify: None,
        rollback: None,
        approval: None,
        side_effect: SideEffect::Read,
        data: DataClass { arguments: Sensitivity::Unclassified, result: Sensitivity::Internal },
        redact: vec![],
    };
    let note = Tool {
        contract: "note-v1".into(),
        name: "note".into(),
        upstream: mcp("note", None),
        idempotency: Some(Idempotency { argument: Some("id".into()), header: None, window_seconds: 600 }),
        verify: Some(VerifyRead {
            tool: "find".into(),
            arguments: BTreeMap::from([("id".into(), "/id".into())]),
            applied: "result.found".into(),
            settle_seconds: 5,
        }),
        rollback: Some(Rollback::ByHand("Strike it out.".into())),
        approval: Some(approval(Some("args.loud"), 1, OnTimeout::Deny)),
        side_effect: SideEffect::Write,
        data: DataClass::default(),
        ..find.clone()
    };
    let pay = Tool {
        contract: "pay-v1".into(),
        name: "pay".into(),
        description: "Pays.".into(),
        upstream: Upstream::Http(HttpUpstream {
            method: HttpMethod::Post,
            url: "https://pay.world.test/{id}".into(),
            query: vec!["dry".into()],
        }),
        input: json!({"type": "object", "required": [], "properties": {"id": {"maximum": 1.5, "const": null, "enum": [true, -7]}}}),
        output: Some(json!({"type": "object"})),
        limits: ToolLimits {
            calls: Some(4),
            per_minute: Some(60),
            timeout_seconds: Some(10),
            request_bytes: Some(4096),
            response_bytes: Some(65_536),
        },
        preconditions: vec![Precondition {
            name: "small".into(),
            cel: "args.n < 9".into(),
            message: "Too much.".into(),
        }],
        idempotency: Some(Idempotency { argument: None, header: Some("idempotency-key".into()), window_seconds: 60 }),
        verify: None,
        rollback: Some(Rollback::Call(Compensation {
            contract: "refund-v1".into(),
            arguments: BTreeMap::from([("of".into(), "result.id".into())]),
            within_seconds: Some(3600),
        })),
        approval: Some(approval(None, 2, OnTimeout::EndTask)),
        side_effect: SideEffect::Write,
        data: DataClass { arguments: Sensitivity::Confidential, result: Sensitivity::Confidential },
        redact: vec!["/card".into()],
    };
    vec![find, note, pay]
}

/// Returns a policy with every member except `rollbackOf`, which only the policy of a rollback has.
fn policy() -> PolicyConfig {
    let rule = |name: &str, decision| AccessRule {
        name: name.into(),
        principals: vec![],
        tools: vec![],
        effects: vec![],
        when: None,
        decision,
        message: None,
    };
    let rules = vec![
        AccessRule {
            principals: vec!["jane@*".into()],
            effects: vec![SideEffect::Read, SideEffect::Write],
            ..rule("mine", RuleDecision::Allow)
        },
        AccessRule {
            tools: vec!["p*".into()],
            effects: vec![SideEffect::Write],
            ..rule("asks", RuleDecision::RequireApproval)
        },
        AccessRule {
            when: Some("args.n == 13".into()),
            message: Some("Not thirteen.".into()),
            ..rule("never", RuleDecision::Deny)
        },
        AccessRule { principals: vec!["bob".into()], ..rule("bob", RuleDecision::Deny) },
    ];
    let term = |name: &str, when: &str, points| RiskTerm { name: name.into(), when: when.into(), points };
    PolicyConfig {
        task: TaskIdentity {
            namespace: "team-a".into(),
            name: "tidy".into(),
            uid: UID.into(),
            objective: "Tidy up.".into(),
            workflow_class: "support".into(),
            task_class: Some("triage".into()),
            principal: "jane@example.com".into(),
            requester: Some("ci".into()),
            image: "localhost/agent:dev".into(),
            rollback_of: None,
        },
        pack: PackIdentity { name: "dev".into(), uid: "u".into(), environment: "dev".into() },
        limits: Limits {
            wall_time_seconds: 600,
            tool_calls: 20,
            tokens: 1000,
            denials: Some(9),
            cost_micros: Some(1000),
            approval_wait_seconds: 60,
        },
        allowed_effects: vec![SideEffect::Read, SideEffect::Write],
        tools: tools(),
        models: ModelEndpoints {
            openai: Some("https://models.world.test".into()),
            anthropic: Some("https://claude.world.test".into()),
            endpoints: vec![ModelEndpoint {
                models: vec!["gpt-*".into()],
                api: Family::OpenAi,
                url: "https://models.world.test/openai/v1?api-version=preview".into(),
                allow: vec![Capability::WebSearch],
                stream_usage: StreamUsage::AsWritten,
            }],
            allow: vec![Capability::Files, Capability::Stored],
            unknown_members: UnknownMembers::Pass,
            store_replies: StoreReplies::Never,
            stream_usage: StreamUsage::AsWritten,
            prices: vec![
                ModelPrice {
                    model: "m-small".into(),
                    input_micros: 1_000_000,
                    output_micros: 2_000_000,
                    max_output_tokens: Some(4096),
                    context_tokens: Some(8192),
                    output_limit_field: Some(OutputLimitField::MaxTokens),
                    tokenizer: Some(Tokenizer::Bytes),
                },
                ModelPrice {
                    model: "m*".into(),
                    input_micros: 3_000_000,
                    output_micros: 5_000_000,
                    max_output_tokens: None,
                    context_tokens: None,
                    output_limit_field: Some(OutputLimitField::MaxCompletionTokens),
                    tokenizer: Some(Tokenizer::O200k),
                },
            ],
        },
        egress: vec![
            EgressHost {
                host: "*.world.test".into(),
                ports: vec![443, 8443],
                uses: vec![EgressUse::Tools, EgressUse::Models],
                credential: Some("secret/key".into()),
                barred: false,
            },
            EgressHost {
                host: "barred.test".into(),
                ports: vec![],
                uses: vec![EgressUse::Direct],
                credential: None,
                barred: true,
            },
        ],
        ignored_hosts: vec!["telemetry.test".into(), "*.ingest.test".into()],
        upstream_timeout_seconds: Some(900),
        access: Access {
            classification: vec![DataPattern {
                name: "card".into(),
                pattern: "[0-9]{16}".into(),
                sensitivity: Sensitivity::Restricted,
            }],
            rules,
            risk: Some(Risk {
                terms: vec![term("big", "args.n > 5", 10), term("known", "args.known", -3)],
                approve_at: Some(10),
                deny_at: Some(50),
            }),
            approval: Some(approval(None, 1, OnTimeout::Deny)),
        },
    }
}

/// Returns the SHA-256 digest of a text.
fn digest(of: &str) -> String {
    hex::encode(belay::canonical::sha256(of.as_bytes()))
}

/// Writes records, one second apart, with what follows from the earlier records.
struct Teller {
    policy: PolicyConfig,
    attempt: i64,
    second: i64,
    seen: Sensitivity,
    segments: Segments,
}

impl Teller {
    fn say(&mut self, event: Event) {
        self.second += 1;
        let time = jiff::Timestamp::from_second(1_795_000_000 + self.second).unwrap();
        let record = Record { time: format!("{time:.3}"), ..record(self.attempt, event) };
        self.segments.last_mut().unwrap().push(record);
    }

    fn open(&mut self, attempt: i64, key: &Signer, rollback: Option<&Plan>) {
        self.attempt = attempt;
        self.segments.push(vec![]);
        let Event::AttemptOpened(mut opened) = opened(key, attempt) else { unreachable!() };
        (opened.policy, opened.rollback) = (self.policy.clone(), rollback.cloned());
        self.say(Event::AttemptOpened(opened));
    }

    /// Returns the intent of a tool call, as the tool's contract requires it.
    fn tool(&self, call: &str, target: &str, arguments: &str) -> Intent {
        let tool = self.policy.tool(target).unwrap();
        let key = match &tool.idempotency {
            Some(Idempotency { argument: None, .. }) => Some(ledger::made_of(UID, target, &digest(arguments))),
            Some(_) => Some(digest(&format!("{target} {arguments}"))),
            None => None,
        };
        let is_pay = target == "pay";
        let risk = Score { score: i64::from(is_pay) * 10, terms: if is_pay { vec!["big".into()] } else { vec![] } };
        let mut rules = vec!["mine".to_owned()];
        rules.extend(is_pay.then(|| "asks".to_owned()));
        let assessment = Assessment { arguments: tool.data.arguments, seen: self.seen, rules, risk: Some(risk) };
        Intent {
            call: call.into(),
            channel: Channel::Tool,
            target: target.into(),
            side_effect: Some(tool.side_effect),
            definition_digest: (!is_pay).then(|| digest(target)),
            request_commitment: Some(digest(arguments)),
            request_bytes: 120,
            idempotency_key: key,
            approvals: vec![],
            compensates: None,
            assessment: (!self.policy.access.is_empty()).then_some(assessment),
            rules: vec![Rule::ToolUnknown, Rule::ToolSchema],
            model: None,
            reserved_tokens: 0,
            reserved_cost_micros: 0,
        }
    }

    /// Returns the intent of a call on another channel.
    fn other(call: &str, channel: Channel, target: &str) -> Intent {
        Intent {
            call: call.into(),
            channel,
            target: target.into(),
            side_effect: None,
            definition_digest: None,
            request_commitment: None,
            request_bytes: 0,
            idempotency_key: None,
            approvals: vec![],
            compensates: None,
            assessment: None,
            rules: vec![Rule::ToolUnknown],
            model: None,
            reserved_tokens: 0,
            reserved_cost_micros: 0,
        }
    }

    fn intend(&mut self, intent: Intent) {
        self.seen = self.seen.max(intent.assessment.as_ref().map(|of| of.arguments).unwrap_or_default());
        self.say(Event::Intent(intent));
    }

    fn end(&mut self, call: &str, change: impl FnOnce(&mut Outcome)) {
        let mut outcome = Outcome {
            call: call.into(),
            outcome: CallOutcome::Applied,
            rule: None,
            status: 200,
            response_commitment: Some(digest(call)),
            response_bytes: 640,
            sent_bytes: None,
            tokens: 0,
            cost_micros: 0,
            upstream: Some("198.51.100.20:443".into()),
            certificate: None,
            sensitivity: Sensitivity::Confidential,
            compensation_commitment: None,
        };
        change(&mut outcome);
        self.seen = self.seen.max(outcome.sensitivity);
        self.say(Event::Outcome(outcome));
    }

    /// Records the approval request for a call of `pay`, and its approval.
    fn approve(&mut self, name: &str, by: ApprovalSource, arguments: &str) {
        let required = if by == ApprovalSource::Contract { 2 } else { 1 };
        let vote = |by: &str| Vote { by: by.into(), decision: Answer::Approve, reason: Some("Fine.".into()) };
        let asked = Asked {
            name: name.into(),
            uid: "u".into(),
            requested_by: by,
            tool: "pay".into(),
            request_commitment: digest(arguments),
            required,
            expires: "2026-11-23T10:01:00Z".into(),
            reasons: if by == ApprovalSource::Pack {
                vec!["rule asks".into(), "risk 10 (big 10)".into()]
            } else {
                vec![]
            },
            state: ApprovalState::Pending,
            decisions: vec![],
        };
        let decided = Asked {
            state: ApprovalState::Approved,
            // The decision of the principal does not count.
            decisions: ["jane@example.com", "ana", "bob"].map(vote)[..=required as usize].to_vec(),
            ..asked.clone()
        };
        self.say(Event::ApprovalRequested(asked.clone()));
        self.say(Event::ApprovalDecided(decided));
    }

    fn pay(&mut self, call: &str, arguments: &str) {
        let approvals = [(ApprovalSource::Contract, "c"), (ApprovalSource::Pack, "p")];
        for (by, name) in approvals {
            self.approve(&format!("{name}-{call}"), by, arguments);
        }
        let approvals = approvals.map(|(_, name)| format!("{name}-{call}")).to_vec();
        self.intend(Intent { approvals, ..self.tool(call, "pay", arguments) });
    }

    fn story(mut self, keys: Keys) -> Story {
        self.say(attempt_closed());
        self.segments.push(vec![]);
        self.say(task_closed());
        forge::count(&mut self.segments);
        Story::new(note::origin(UID), self.segments, keys, Signer::generate(WITNESS_NAME).unwrap())
    }
}

fn keys() -> Keys {
    [1, 2].map(|n| (n, Signer::generate(&note::attempt_key_name(UID, n)).unwrap())).into_iter().collect()
}

/// A task that does everything that its policy allows.
pub static TASK: LazyLock<Story> = LazyLock::new(task);

/// The rollback of another task.
pub static ROLLBACK: LazyLock<Story> = LazyLock::new(rollback);

fn task() -> Story {
    let (keys, policy) = (keys(), policy());
    let mut tell = Teller { policy, attempt: 1, second: 0, seen: Sensitivity::default(), segments: Segments::new() };
    tell.open(1, &keys[&1], None);
    let asked = Teller::other("m1", Channel::Model, "/v1/chat/completions");
    let digest_of_prompt = Some(digest("prompt"));
    tell.intend(Intent {
        model: Some("m-small".into()),
        request_commitment: digest_of_prompt,
        request_bytes: 300,
        reserved_tokens: 100,
        reserved_cost_micros: 150,
        ..asked
    });
    tell.end("m1", |o| (o.tokens, o.cost_micros, o.sensitivity) = (60, 90, Sensitivity::default()));
    tell.intend(Teller::other("l1", Channel::Listing, "find"));
    tell.end("l1", |o| (o.response_commitment, o.sensitivity) = (None, Sensitivity::default()));
    let found = tell.tool("f1", "find", "a");
    tell.intend(found);
    tell.end("f1", |o| o.sensitivity = Sensitivity::Internal);
    tell.pay("p1", "one");
    tell.end("p1", |o| o.compensation_commitment = Some(digest("refund")));
    let again = tell.tool("p1", "pay", "one");
    tell.say(Event::Replayed(Replayed {
        call: "p1".into(),
        target: "pay".into(),
        idempotency_key: again.idempotency_key.unwrap(),
        request_commitment: digest("one"),
        response_commitment: digest("p1"),
    }));
    // The outcome is unknown, until a read shows that the call had no effect. Then the call is made again.
    let noted = tell.tool("n1", "note", "x");
    tell.intend(noted);
    tell.end("n1", |o| (o.outcome, o.response_commitment, o.status) = (CallOutcome::Unknown, None, 0));
    let read = tell.tool("f2", "find", "x");
    tell.intend(read);
    tell.end("f2", |o| o.sensitivity = Sensitivity::Restricted);
    tell.say(Event::Resolved(Resolved { call: "n1".into(), outcome: CallOutcome::NotApplied, by: "f2".into() }));
    let noted = tell.tool("n2", "note", "x");
    tell.intend(noted);
    tell.end("n2", |_| {});
    tell.say(Event::Denied(Denied {
        channel: Channel::Tool,
        target: "pay".into(),
        rule: Rule::ToolPrecondition,
        reason: "Too much.".into(),
        request_commitment: None,
        count: 3,
    }));
    let tunnel = Teller::other("e1", Channel::Egress, "a.world.test:443");
    tell.intend(tunnel);
    tell.end("e1", |o| {
        (o.response_commitment, o.sent_bytes, o.sensitivity) = (None, Some(7), Sensitivity::default());
    });
    // The harness is lost while this call is under way.
    tell.pay("p2", "two");
    tell.open(2, &keys[&2], None);
    // The upstream recognizes repeats by the key.
    tell.pay("p3", "two");
    tell.end("p3", |o| {
        (o.outcome, o.rule, o.response_commitment) = (CallOutcome::NotApplied, Some(Rule::UpstreamReply), None);
    });
    tell.pay("p4", "two");
    tell.end("p4", |o| o.certificate = Some(digest("certificate")));
    // The window of the key is over.
    tell.second += 600;
    let noted = tell.tool("n3", "note", "x");
    tell.intend(noted);
    tell.end("n3", |_| {});
    // The server says that a tool changes something, and the contract says that the tool reads.
    let read = Intent { side_effect: Some(SideEffect::Write), ..tell.tool("f3", "find", "y") };
    tell.intend(read);
    tell.end("f3", |_| {});
    tell.say(Event::ContainmentChecked(Containment { rounds: 1, ..contained() }));
    tell.story(keys)
}

fn rollback() -> Story {
    let (keys, mut policy) = (keys(), policy());
    policy.task.rollback_of = Some(RollbackOf { name: "other".into(), uid: OTHER.into() });
    policy.access = Access::default();
    policy.tools.iter_mut().for_each(|tool| {
        tool.data = DataClass::default();
        tool.approval = None;
    });
    let undo = |tool: &str, arguments: &str, until: Option<&str>| {
        By::Call(Undo {
            contract: format!("{tool}-v1"),
            request_commitment: digest(arguments),
            until: until.map(str::to_owned),
        })
    };
    let step = |call: &str, by| Step { call: call.into(), tool: "write".into(), by };
    let plan = Plan {
        origin: note::origin(OTHER),
        size: 20,
        root: "r".into(),
        steps: vec![
            step("c9", undo("note", "nine", Some("2027-01-01T00:00:00.000Z"))),
            step("c8", By::People("by hand".into())),
            step("c7", undo("pay", "seven", None)),
            step("c6", undo("note", "six", None)),
        ],
    };
    let mut tell = Teller { policy, attempt: 1, second: 0, seen: Sensitivity::default(), segments: Segments::new() };
    let compensates = |tell: &Teller, call: &str, tool: &str, arguments: &str, of: &str| Intent {
        compensates: Some(of.into()),
        ..tell.tool(call, tool, arguments)
    };
    tell.open(1, &keys[&1], Some(&plan));
    tell.intend(Teller::other("l1", Channel::Listing, "note"));
    tell.end("l1", |o| o.response_commitment = None);
    let first = compensates(&tell, "u1", "note", "nine", "c9");
    tell.intend(first);
    tell.end("u1", |o| (o.outcome, o.response_commitment) = (CallOutcome::NotApplied, None));
    let again = compensates(&tell, "u2", "note", "nine", "c9");
    tell.intend(again);
    tell.end("u2", |_| {});
    let lost = compensates(&tell, "u3", "note", "six", "c6");
    tell.intend(lost);
    tell.open(2, &keys[&2], Some(&plan));
    let read = tell.tool("f1", "find", "six");
    tell.intend(read);
    tell.end("f1", |_| {});
    tell.say(Event::Resolved(Resolved { call: "u3".into(), outcome: CallOutcome::NotApplied, by: "f1".into() }));
    let again = compensates(&tell, "u4", "note", "six", "c6");
    tell.intend(again);
    tell.end("u4", |_| {});
    let last = compensates(&tell, "u5", "pay", "seven", "c7");
    tell.intend(last);
    tell.end("u5", |_| {});
    tell.story(keys)
}
