//! A slow and obvious decision function, written from the documentation, and many generated calls on which [`super`] must agree with it.
//!
//! It shares only the types with [`super`]. It reads JSON by itself and keeps every member that was written. Each contract is a function in
//! plain Rust that says what the contract's schema and preconditions mean. It looks everything up in lists and copies freely.
//!
//! `BELAY_CALLS=10000000 cargo test --release --no-default-features --lib reference` runs that many calls.

use serde_json::json;

use super::*;
use crate::policy::{
    access::{AccessPolicy, AccessRequest},
    config::*,
};

/// A JSON value, as written.
#[derive(Clone, Debug)]
enum Node {
    Null,
    Bool,
    Number(String),
    Text(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

/// A reader of RFC 8259, character by character.
struct Reader {
    rest: Vec<char>,
}

impl Reader {
    fn read(text: &[u8]) -> Option<Node> {
        let mut rest: Vec<char> = std::str::from_utf8(text).ok()?.chars().collect();
        rest.reverse();
        let mut reader = Reader { rest };
        let node = reader.value()?;
        reader.space();
        reader.rest.is_empty().then_some(node)
    }

    fn peek(&self) -> Option<char> {
        self.rest.last().copied()
    }

    fn take(&mut self, expected: char) -> Option<()> {
        (self.rest.pop()? == expected).then_some(())
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(' ' | '\t' | '\n' | '\r')) {
            self.rest.pop();
        }
    }

    fn word(&mut self, word: &str, node: Node) -> Option<Node> {
        word.chars().try_for_each(|c| self.take(c))?;
        Some(node)
    }

    fn value(&mut self) -> Option<Node> {
        self.space();
        match self.peek()? {
            'n' => self.word("null", Node::Null),
            't' => self.word("true", Node::Bool),
            'f' => self.word("false", Node::Bool),
            '"' => self.text().map(Node::Text),
            '[' => self.many('[', ']', Reader::value).map(Node::List),
            '{' => {
                let member = |reader: &mut Reader| {
                    reader.space();
                    let name = reader.text()?;
                    reader.space();
                    reader.take(':')?;
                    Some((name, reader.value()?))
                };
                self.many('{', '}', member).map(Node::Object)
            }
            _ => self.number().map(Node::Number),
        }
    }

    fn many<T>(&mut self, open: char, close: char, one: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        self.take(open)?;
        self.space();
        let mut all = vec![];
        if self.peek()? == close {
            self.take(close)?;
            return Some(all);
        }
        loop {
            all.push(one(self)?);
            self.space();
            match self.rest.pop()? {
                ',' => {}
                c if c == close => return Some(all),
                _ => return None,
            }
        }
    }

    fn text(&mut self) -> Option<String> {
        self.take('"')?;
        let mut text = String::new();
        loop {
            match self.rest.pop()? {
                '"' => return Some(text),
                '\\' => match self.rest.pop()? {
                    c @ ('"' | '\\' | '/') => text.push(c),
                    'b' => text.push('\u{8}'),
                    'f' => text.push('\u{c}'),
                    'n' => text.push('\n'),
                    'r' => text.push('\r'),
                    't' => text.push('\t'),
                    'u' => {
                        let mut unit = self.unit()?;
                        if (0xd800..0xdc00).contains(&unit) {
                            self.take('\\')?;
                            self.take('u')?;
                            let low = self.unit()?;
                            if !(0xdc00..0xe000).contains(&low) {
                                return None;
                            }
                            unit = 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
                        }
                        text.push(char::from_u32(unit)?);
                    }
                    _ => return None,
                },
                c if c < ' ' => return None,
                c => text.push(c),
            }
        }
    }

    fn unit(&mut self) -> Option<u32> {
        let mut unit = 0;
        for _ in 0..4 {
            unit = unit * 16 + self.rest.pop()?.to_digit(16)?;
        }
        Some(unit)
    }

    fn number(&mut self) -> Option<String> {
        let mut written = String::new();
        while let Some(c) = self.peek().filter(|c| c.is_ascii_digit() || "+-.eE".contains(*c)) {
            written.push(c);
            self.rest.pop();
        }
        let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
        let unsigned = written.strip_prefix('-').unwrap_or(&written);
        let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, Some(exponent)),
            None => (unsigned, None),
        };
        let (whole, fraction) = match mantissa.split_once('.') {
            Some((whole, fraction)) => (whole, Some(fraction)),
            None => (mantissa, None),
        };
        let exponent = exponent.map(|exponent| exponent.strip_prefix(['+', '-']).unwrap_or(exponent));
        let fine = digits(whole)
            && (whole == "0" || !whole.starts_with('0'))
            && fraction.is_none_or(digits)
            && exponent.is_none_or(digits);
        fine.then_some(written)
    }
}

impl Node {
    /// Checks for duplicate names, for nesting that is too deep, and for numbers that some parser would change.
    fn one_way(&self, depth: usize) -> bool {
        match self {
            Node::Null | Node::Bool | Node::Text(_) => true,
            Node::Number(written) => {
                let value: f64 = written.parse().unwrap();
                value.is_finite()
                    && value.abs() <= 9_007_199_254_740_991.0
                    && !(value == 0.0 && written.starts_with('-'))
            }
            Node::List(items) => depth < 100 && items.iter().all(|item| item.one_way(depth + 1)),
            Node::Object(members) => {
                let twice = (0..members.len()).any(|i| (0..i).any(|j| members[i].0 == members[j].0));
                let reserved = members.iter().any(|(name, _)| name.starts_with("$serde_json::"));
                depth < 100 && !twice && !reserved && members.iter().all(|(_, value)| value.one_way(depth + 1))
            }
        }
    }

    fn get(&self, name: &str) -> Option<&Node> {
        match self {
            Node::Object(members) => members.iter().find(|(found, _)| found == name).map(|(_, value)| value),
            _ => None,
        }
    }

    fn only(&self, names: &[&str]) -> bool {
        matches!(self, Node::Object(members) if members.iter().all(|(name, _)| names.contains(&name.as_str())))
    }

    fn text(&self) -> Option<&str> {
        match self {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    fn number(&self) -> Option<f64> {
        match self {
            Node::Number(written) => written.parse().ok(),
            _ => None,
        }
    }
}

/// Checks a member, if it is present.
fn optional(node: &Node, name: &str, fits: impl Fn(&Node) -> bool) -> bool {
    node.get(name).is_none_or(fits)
}

fn required(node: &Node, name: &str, fits: impl Fn(&Node) -> bool) -> bool {
    node.get(name).is_some_and(fits)
}

fn text_of(least: usize, most: usize) -> impl Fn(&Node) -> bool {
    move |node| node.text().is_some_and(|text| (least..=most).contains(&text.chars().count()))
}

fn number_of(least: f64, most: f64) -> impl Fn(&Node) -> bool {
    move |node| node.number().is_some_and(|number| (least..=most).contains(&number))
}

/// JSON Schema counts `1.0` as an integer.
fn integer_of(least: f64, most: f64) -> impl Fn(&Node) -> bool {
    move |node| number_of(least, most)(node) && node.number().is_some_and(|number| number.fract() == 0.0)
}

/// The result of the last call of `lookup`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Looked {
    Never,
    Up {
        owner: &'static str,
        open: bool,
    },
    /// A result of another shape.
    Odd,
    /// A result that is too long to be stored.
    Long,
}

/// What is known besides the call.
#[derive(Clone, Copy, Debug)]
struct State {
    usage: Usage,
    looked: Looked,
    seen: Sensitivity,
}

/// The decision about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Comes {
    Denied(Rule),
    /// The call is allowed, once the approvers that contract and pack require have approved it.
    Passes {
        by_contract: bool,
        by_pack: bool,
    },
}

/// One contract, in plain Rust.
struct Plain {
    name: &'static str,
    side_effect: SideEffect,
    schema: fn(&Node) -> bool,
    conditions: fn(&Node, State) -> bool,
    /// Whether the contract requires approval.
    asks: fn(&Node) -> bool,
}

const CONTRACTS: [Plain; 6] = [
    Plain {
        name: "open_ticket",
        side_effect: SideEffect::Write,
        schema: |args| {
            args.only(&["title", "severity", "count", "tags"])
                && required(args, "title", text_of(1, 20))
                && optional(args, "severity", |node| matches!(node, Node::Text(_)))
                && optional(args, "count", integer_of(0.0, 1000.0))
                && optional(
                    args,
                    "tags",
                    |node| matches!(node, Node::List(tags) if tags.len() <= 3 && tags.iter().all(|tag| matches!(tag, Node::Text(_)))),
                )
        },
        conditions: |args, state| {
            optional(args, "severity", |node| matches!(node.text(), Some("low" | "high"))) && state.usage.tool_calls < 5
        },
        // More than five, or the count is unknown.
        asks: |args| !required(args, "count", number_of(0.0, 5.0)),
    },
    Plain {
        name: "lookup",
        side_effect: SideEffect::Read,
        schema: |args| args.only(&["id"]) && required(args, "id", integer_of(1.0, 9_007_199_254_740_991.0)),
        conditions: |_, _| true,
        asks: |_| false,
    },
    Plain {
        name: "pay",
        side_effect: SideEffect::External,
        schema: |args| {
            args.only(&["amount", "to"])
                && required(args, "amount", number_of(0.0, 1e6))
                && required(args, "to", |to| {
                    to.only(&["name", "iban"])
                        && required(to, "name", |node| matches!(node, Node::Text(_)))
                        && optional(to, "iban", |node| matches!(node, Node::Null | Node::Text(_)))
                })
        },
        conditions: |args, state| {
            let name = args.get("to").and_then(|to| to.get("name")).and_then(Node::text);
            let owner = match state.looked {
                Looked::Up { owner, open: true } => Some(owner),
                _ => None,
            };
            args.get("amount").and_then(Node::number).is_some_and(|amount| amount <= 100.0)
                && name.is_some()
                && name == owner
        },
        asks: |_| true,
    },
    Plain {
        name: "ping",
        side_effect: SideEffect::Read,
        schema: |args| args.only(&[]),
        conditions: |_, _| true,
        asks: |_| false,
    },
    Plain {
        name: "odd",
        side_effect: SideEffect::Read,
        // The values can be anything: if a condition cannot read a value, the call is denied.
        schema: |args| args.only(&["x", "y"]),
        conditions: |args, state| required(args, "x", number_of(1.5, 1e300)) || state.usage.denials == 1,
        asks: |_| false,
    },
    Plain {
        name: "yes",
        side_effect: SideEffect::Read,
        schema: |args| matches!(args, Node::Object(_)),
        conditions: |_, _| false,
        asks: |_| false,
    },
];

fn contracts(limits: Limits, allowed_effects: Vec<SideEffect>) -> PolicyConfig {
    let precondition = |cel: &str| Precondition { name: "c".into(), cel: cel.into(), message: "no".into() };
    let tool = |plain: &Plain| {
        let (input, preconditions) = match plain.name {
            "open_ticket" => (
                json!({
                    "type": "object", "required": ["title"], "additionalProperties": false,
                    "properties": {
                        "title": {"type": "string", "minLength": 1, "maxLength": 20},
                        "severity": {"type": "string"},
                        "count": {"type": "integer", "minimum": 0, "maximum": 1000},
                        "tags": {"type": "array", "maxItems": 3, "items": {"type": "string"}}
                    }
                }),
                vec![
                    precondition("!has(args.severity) || args.severity in ['low', 'high']"),
                    precondition("usage.toolCalls < 5"),
                ],
            ),
            "lookup" => (
                json!({
                    "type": "object", "required": ["id"], "additionalProperties": false,
                    "properties": {"id": {"type": "integer", "minimum": 1, "maximum": 9_007_199_254_740_991_i64}}
                }),
                vec![],
            ),
            "pay" => (
                json!({
                    "type": "object", "required": ["amount", "to"], "additionalProperties": false,
                    "properties": {
                        "amount": {"type": "number", "minimum": 0, "maximum": 1_000_000},
                        "to": {
                            "type": "object", "required": ["name"], "additionalProperties": false,
                            "properties": {"name": {"type": "string"}, "iban": {"type": ["null", "string"]}}
                        }
                    }
                }),
                vec![
                    precondition("double(args.amount) <= 100.0"),
                    precondition("results.lookup.open && results['lookup'].owner == args.to.name"),
                ],
            ),
            "ping" => (json!({"type": "object", "additionalProperties": false}), vec![]),
            "odd" => (
                json!({"type": "object", "additionalProperties": false, "properties": {"x": {}, "y": {}}}),
                vec![precondition("usage.denials == 1 || args.x >= 1.5")],
            ),
            _ => (json!({"type": "object"}), vec![precondition("'yes'")]),
        };
        Tool {
            contract: plain.name.into(),
            name: plain.name.into(),
            description: "d".into(),
            upstream: Upstream::Mcp(McpUpstream {
                url: "https://tools.test/mcp".into(),
                tool: plain.name.into(),
                digest: None,
            }),
            output: None,
            limits: ToolLimits::default(),
            input,
            preconditions,
            idempotency: None,
            verify: None,
            rollback: None,
            approval: match plain.name {
                "open_ticket" => Some(approval(Some("args.count > 5"))),
                "pay" => Some(approval(None)),
                _ => None,
            },
            side_effect: plain.side_effect,
            data: DataClass::default(),
            redact: vec![],
        }
    };
    let tools = CONTRACTS.iter().map(tool).collect();
    PolicyConfig { limits, allowed_effects, tools, access: access(), ..super::tests::policy(vec![]) }
}

fn approval(when: Option<&str>) -> Approval {
    Approval {
        when: when.map(Into::into),
        approvers: Default::default(),
        required: 1,
        timeout_seconds: 60,
        on_timeout: OnTimeout::Deny,
        hold_seconds: 0,
    }
}

/// The pack that [`pack`] describes in plain Rust.
fn access() -> Access {
    let rule = |name: &str, decision, tools: &[&str], effects: &[SideEffect], when: Option<&str>| AccessRule {
        name: name.into(),
        principals: vec![],
        tools: tools.iter().map(|tool| (*tool).into()).collect(),
        effects: effects.to_vec(),
        when: when.map(Into::into),
        decision,
        message: None,
    };
    let term = |name: &str, when: &str| RiskTerm { name: name.into(), when: when.into(), points: 10 };
    Access {
        classification: vec![DataPattern {
            name: "high".into(),
            pattern: "^high$".into(),
            sensitivity: Sensitivity::Restricted,
        }],
        rules: vec![
            rule("known", RuleDecision::Allow, &["open_*", "lookup", "pay", "odd"], &[], None),
            rule("ping-early", RuleDecision::Allow, &["ping"], &[], Some("usage.toolCalls < 5")),
            rule("not-two", RuleDecision::Deny, &["odd"], &[], Some("args.x == 2")),
            rule("payments", RuleDecision::RequireApproval, &[], &[SideEffect::External], Some("args.amount > 50")),
        ],
        risk: Some(Risk {
            terms: vec![
                term("write", "effect == 'write'"),
                term("restricted", "data.arguments == 'Restricted'"),
                term("seen", "data.seen != 'Unclassified'"),
            ],
            approve_at: Some(20),
            deny_at: Some(30),
        }),
        approval: Some(approval(None)),
    }
}

impl Node {
    /// Returns whether a text or a name in the value equals `word`.
    fn says(&self, word: &str) -> bool {
        match self {
            Node::Text(text) => text == word,
            Node::List(items) => items.iter().any(|item| item.says(word)),
            Node::Object(members) => members.iter().any(|(name, value)| name == word || value.says(word)),
            Node::Null | Node::Bool | Node::Number(_) => false,
        }
    }
}

/// Evaluates the pack's rules and the risk score: the rule that denies the call, or whether the call needs approval.
fn pack(plain: &Plain, args: &Node, state: State) -> Result<bool, Rule> {
    // The number two in any notation. A value that cannot be compared with two counts against the call.
    let two = args.get("x").is_none_or(|x| x.number() == Some(2.0));
    if plain.name == "odd" && two || plain.name == "ping" && state.usage.tool_calls >= 5 {
        return Err(Rule::AccessRule);
    }
    let large =
        plain.side_effect == SideEffect::External && args.get("amount").and_then(Node::number).is_none_or(|n| n > 50.0);
    let reasons = [plain.side_effect == SideEffect::Write, args.says("high"), state.seen != Sensitivity::Unclassified];
    match reasons.into_iter().filter(|reason| *reason).count() {
        3 => Err(Rule::RiskScore),
        2 => Ok(true),
        _ => Ok(large),
    }
}

/// Evaluates all rules in their order.
fn reference(policy: &PolicyConfig, tool: &str, text: &[u8], state: State) -> Comes {
    match denied(policy, tool, text, state) {
        Err(rule) => Comes::Denied(rule),
        Ok((plain, args)) => match pack(plain, &args, state) {
            Err(rule) => Comes::Denied(rule),
            Ok(by_pack) => Comes::Passes { by_contract: (plain.asks)(&args), by_pack },
        },
    }
}

/// Evaluates the contract's rules.
fn denied<'p>(policy: &PolicyConfig, tool: &str, text: &[u8], state: State) -> Result<(&'p Plain, Node), Rule> {
    if policy.limits.denials.is_some_and(|limit| state.usage.denials >= limit) {
        return Err(Rule::Denials);
    }
    let args = match Reader::read(text) {
        Some(args) if args.one_way(0) => args,
        _ => return Err(Rule::RequestJson),
    };
    let Some(plain) = CONTRACTS.iter().find(|plain| plain.name == tool) else { return Err(Rule::ToolUnknown) };
    if !policy.allowed_effects.contains(&plain.side_effect) {
        return Err(Rule::ToolEffect);
    }
    if !(plain.schema)(&args) {
        return Err(Rule::ToolSchema);
    }
    if !(plain.conditions)(&args, state) {
        return Err(Rule::ToolPrecondition);
    }
    if state.usage.tool_calls >= policy.limits.tool_calls {
        return Err(Rule::ToolCalls);
    }
    Ok((plain, args))
}

/// SplitMix64. The same seed gives the same calls everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.roll() % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

const NAMES: [&str; 14] = [
    "open_tickеt",
    "0pen_ticket",
    "open_ticket ",
    "OPEN_TICKET",
    "",
    "pаy",
    "pay\u{200b}",
    "lookup\0",
    "ping2",
    "pin",
    "\u{202e}gnip",
    "open-ticket",
    "yes\n",
    "ﬁle",
];

/// Values that parsers are known to read differently, and plain values.
const VALUES: [&str; 62] = [
    "0",
    "-0",
    "-0.0",
    "-0e5",
    "0e999999999999",
    "1",
    "1.0",
    "1e0",
    "1.5",
    "1.4999999999999999999",
    "-1",
    "2",
    "100",
    "100.0",
    "100.00000000000001",
    "100.5",
    "1000",
    "1000.0",
    "1001",
    "999999",
    "1e6",
    "1000000.1",
    "1e15",
    "1e16",
    "9007199254740991",
    "9007199254740991.0",
    "9007199254740992",
    "9007199254740993.0",
    "-9007199254740991",
    "-9007199254740992",
    "18446744073709551615",
    "18446744073709551616",
    "123456789012345678901234567890",
    "1e308",
    "1e309",
    "1e999",
    "-1e999",
    "1e-999",
    "-1e-400",
    "NaN",
    "Infinity",
    "-Infinity",
    "01",
    "1.",
    ".5",
    "+1",
    "0x10",
    "1_000",
    "null",
    "true",
    "false",
    r#""""#,
    r#""low""#,
    r#""critical""#,
    r#""\u006cow""#,
    r#""\ud83d\ude00""#,
    r#""\ud800""#,
    r#""ana""#,
    "[]",
    "{}",
    r#"{"a":1,"a":1}"#,
    r#"["a","b","c","d"]"#,
];

/// Generates a call. Most calls are nearly valid.
fn call(dice: &mut Dice) -> (String, Vec<u8>) {
    let plain = &CONTRACTS[dice.below(CONTRACTS.len())];
    let tool = if dice.one_in(12) { dice.of(&NAMES) } else { plain.name };
    let mut members: Vec<(String, String)> = match plain.name {
        "open_ticket" => vec![
            (
                "title".into(),
                dice.of(&[
                    r#""a""#,
                    r#""disk full""#,
                    r#""exactly twenty chars""#,
                    r#""twenty-one characters""#,
                    r#""ééééééééééééééééééé""#,
                ])
                .into(),
            ),
            ("severity".into(), dice.of(&[r#""low""#, r#""high""#, r#""critical""#]).into()),
            ("count".into(), dice.of(&["1", "7.0", "1000"]).into()),
            ("tags".into(), dice.of(&["[]", r#"["x"]"#, r#"["x","y","z"]"#, r#"[1]"#]).into()),
        ],
        "lookup" => vec![("id".into(), dice.of(&["1", "77", "9007199254740991"]).into())],
        "pay" => vec![
            ("amount".into(), dice.of(&["1", "99.5", "100", "100.5"]).into()),
            (
                "to".into(),
                dice.of(&[
                    r#"{"name":"ana"}"#,
                    r#"{"name":"bob","iban":null}"#,
                    r#"{"name":"ana","name":"bob"}"#,
                    r#"{"name":"ana","x":1}"#,
                ])
                .into(),
            ),
        ],
        "odd" => vec![("x".into(), dice.of(&["1", "2", "1.5", r#""2""#, "true", "[2]"]).into())],
        _ => vec![],
    };
    if dice.one_in(3) && members.len() > 1 {
        let at = 1 + dice.below(members.len() - 1);
        members.truncate(at);
    }
    if dice.one_in(4) && !members.is_empty() {
        let at = dice.below(members.len());
        members[at].1 = dice.of(&VALUES).into();
    }
    if dice.one_in(12) && !members.is_empty() {
        // The same name again, a name that looks like it, or the same name in another notation.
        let at = dice.below(members.len());
        let (name, value) = members[at].clone();
        let name = match dice.below(4) {
            0 => name,
            1 => format!("\\u{:04x}{}", name.as_bytes()[0], &name[1..]),
            2 => name.replace('t', "т").replace('x', "х"),
            _ => name.to_uppercase(),
        };
        let value = if dice.one_in(2) { value } else { dice.of(&VALUES).into() };
        members.insert(dice.below(members.len() + 1), (name, value));
    }
    if dice.one_in(16) {
        let name = dice.of(&["admin", "__proto__", "$ref", "$serde_json::private::RawValue", "", "title\\u0000"]);
        members.push((name.into(), dice.of(&VALUES).into()));
    }
    if dice.one_in(40) {
        let depth = 96 + dice.below(8);
        members.push((dice.of(&["y", "tags"]).into(), format!("{}{}", "[".repeat(depth), "]".repeat(depth))));
    }
    let space =
        |dice: &mut Dice| if dice.one_in(8) { dice.of(&[" ", "\n", "\t", "\r", "\u{a0}", "\u{feff}"]) } else { "" };
    let mut text = String::from(space(dice)) + "{";
    for (n, (name, value)) in members.iter().enumerate() {
        let comma = if n > 0 { "," } else { "" };
        text += &format!("{comma}{}\"{name}\"{}:{}{value}{}", space(dice), space(dice), space(dice), space(dice));
    }
    text += "}";
    let mut text = match dice.below(40) {
        0 => dice.of(&VALUES).as_bytes().to_vec(),
        1 => format!("{text}{}", dice.of(&["{}", ",", "x", "\0", "//"])).into_bytes(),
        _ => text.into_bytes(),
    };
    if dice.one_in(20) && !text.is_empty() {
        let at = dice.below(text.len());
        match dice.below(3) {
            0 => text[at] = dice.roll() as u8,
            1 => text.truncate(at),
            _ => drop(text.remove(at)),
        }
    }
    (tool.to_owned(), text)
}

#[test]
fn generated_calls_are_decided_as_the_reference_decides() {
    let calls: u64 = std::env::var("BELAY_CALLS").map_or(40_000, |calls| calls.parse().expect("BELAY_CALLS: a number"));
    let limits = Limits {
        wall_time_seconds: 60,
        tool_calls: 7,
        tokens: 0,
        denials: Some(3),
        cost_micros: None,
        approval_wait_seconds: 0,
    };
    let policies = [
        contracts(limits, vec![SideEffect::Read, SideEffect::Write, SideEffect::External]),
        contracts(Limits { denials: None, ..limits }, vec![SideEffect::Read]),
    ];
    let compiled = policies.each_ref().map(|policy| Contracts::compile(policy).unwrap());
    let guards = policies.each_ref().map(|policy| AccessPolicy::compile(policy).unwrap());
    let answers = [
        (Looked::Never, None),
        (Looked::Up { owner: "ana", open: true }, Some(json!({"owner": "ana", "open": true, "n": 1}))),
        (Looked::Up { owner: "bob", open: true }, Some(json!({"owner": "bob", "open": true}))),
        (Looked::Up { owner: "ana", open: false }, Some(json!({"owner": "ana", "open": false}))),
        (Looked::Odd, Some(json!(["ana"]))),
        (Looked::Long, Some(json!({"owner": "ana", "open": true, "more": "x".repeat(LONGEST_RESULT)}))),
    ];
    let results: Vec<Vec<Results>> = compiled
        .iter()
        .map(|contracts| {
            let results = |answer: &Option<Value>| {
                let none = contracts.no_results();
                answer.as_ref().map_or_else(
                    || contracts.no_results(),
                    |value| contracts.with_result(&none, "lookup", value).unwrap(),
                )
            };
            answers.iter().map(|(_, answer)| results(answer)).collect()
        })
        .collect();
    let salt = crate::policy::commit::Salt::new([7; 32]);
    let mut dice = Dice(20_261_124);
    let mut seen: BTreeMap<Comes, u64> = BTreeMap::new();
    for n in 0..calls {
        let (which, answer) = (usize::from(dice.one_in(8)), dice.below(answers.len()));
        let usage = Usage {
            tool_calls: dice.of(&[0, 1, 4, 5, 6, 7]),
            denials: dice.of(&[0, 0, 0, 0, 0, 0, 1, 2, 3]),
            ..Usage::default()
        };
        let data = dice.of(&[Sensitivity::Unclassified, Sensitivity::Unclassified, Sensitivity::Internal]);
        let state = State { usage, looked: answers[answer].0, seen: data };
        let (tool, text) = call(&mut dice);
        let expected = reference(&policies[which], &tool, &text, state);
        let known = DecisionInputs { usage, ignored: 0, results: &results[which][answer] };
        let decision = compiled[which].decide(&tool, Arguments::Text(&text), known, &salt);
        let found = match &decision.verdict {
            Err(denial) => Comes::Denied(denial.rule),
            Ok(tool) => {
                let asked = AccessRequest { tool, side_effect: tool.side_effect, usage, seen: data };
                match guards[which].judge(asked, &decision.arguments) {
                    Err(denial) => Comes::Denied(denial.rule),
                    Ok(passed) => {
                        let again = guards[which].replay(asked, passed.assessment.as_ref());
                        assert_eq!(again.as_ref(), Ok(&passed), "call {n}: its record is judged otherwise");
                        let by_pack = !passed.reasons.is_empty();
                        Comes::Passes { by_contract: decision.needs_approval, by_pack }
                    }
                }
            }
        };
        let written = String::from_utf8_lossy(&text);
        assert_eq!(found, expected, "call {n}: {tool:?} with {written:?} in {state:?}: {:?}", decision.verdict);
        // The gateway has only the call. It denies no call that is allowed, and it requires approval if the call alone determines that.
        if let Comes::Passes { by_contract, .. } = found {
            let again = canonical::to_bytes(&decision.arguments).map(|text| json::parse(&text).map(json::whole));
            let again = compiled[which].check_stateless(&tool, &again.unwrap().unwrap());
            assert_eq!(again, Ok(by_contract), "call {n}: {tool:?} with {written:?}");
        }
        *seen.entry(found).or_default() += 1;
    }
    // A generator that never triggers a rule proves nothing about the rule.
    for rule in [
        Rule::Denials,
        Rule::RequestJson,
        Rule::ToolUnknown,
        Rule::ToolEffect,
        Rule::ToolSchema,
        Rule::ToolPrecondition,
        Rule::ToolCalls,
        Rule::AccessRule,
        Rule::RiskScore,
    ] {
        let count = seen.get(&Comes::Denied(rule)).copied().unwrap_or_default();
        assert!(count * 1_000 >= calls, "{rule:?} came up {count} times in {calls} calls: {seen:?}");
    }
    for (by_contract, by_pack) in [(false, false), (true, false), (false, true), (true, true)] {
        let count = seen.get(&Comes::Passes { by_contract, by_pack }).copied().unwrap_or_default();
        assert!(count * 10_000 >= calls, "({by_contract}, {by_pack}) came up {count} times in {calls} calls: {seen:?}");
    }
}
