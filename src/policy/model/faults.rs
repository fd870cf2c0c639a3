//! Tests the counters against a model that fails, lies, thinks without showing it, and is cut off anywhere.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    Bound,
    settle::{Came, Reported, Reserved, charge},
};
use crate::policy::{
    budget::{Budget, Spent},
    config::{Limits, Usage},
};

/// What the provider reports about its usage.
#[derive(Clone, Copy, Debug)]
enum Account {
    True,
    Missing,
    Percent(i64),
    Wild(i64, i64),
}

/// How the reply ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Whole,
    HangsUp(usize),
    ErrorAfter(usize),
    Unread(usize),
    Refused,
}

/// A call with its real properties.
#[derive(Clone, Debug)]
struct Call {
    prompt: i64,
    /// The estimate of the prompt, in percent of the real value.
    estimated: i64,
    /// The bytes of each token that is shown.
    shown: Vec<usize>,
    /// The tokens of a thought before the reply.
    thought: i64,
    /// How far the output limit is above the model's output.
    room: i64,
    account: Account,
    end: End,
}

impl Call {
    fn output(&self) -> i64 {
        count(self.shown.len()) + self.thought
    }

    fn reserved(&self) -> Reserved {
        let bound = Bound { prompt: self.prompt * self.estimated / 100, output: self.output() + self.room };
        // A text with 4 bytes per token.
        Reserved { bound, least_prompt: (self.prompt * 4 / 16).min(bound.prompt) }
    }

    fn usage(&self) -> Value {
        let usage = |prompt: i64, output: i64| json!({"prompt_tokens": prompt, "completion_tokens": output});
        match self.account {
            Account::True => usage(self.prompt, self.output()),
            Account::Missing => Value::Null,
            Account::Percent(percent) => usage(self.prompt * percent / 100, self.output() * percent / 100),
            Account::Wild(prompt, output) => usage(prompt, output),
        }
    }

    /// Returns the result of the call: how it ended, the tokens and the bytes that were shown, and what the reply reported.
    fn made(&self) -> (Came, i64, i64, Reported) {
        let (came, until, error) = match self.end {
            End::Whole | End::Refused => (Came::Whole, self.shown.len(), false),
            End::HangsUp(at) => (Came::Broken, at, false),
            End::ErrorAfter(at) => (Came::Whole, at, true),
            End::Unread(at) => (Came::Unread, at, false),
        };
        let (mut said, mut tokens, mut bytes) = (Reported::default(), 0, 0);
        for length in self.shown.iter().take(until) {
            (tokens, bytes) = (tokens + 1, bytes + count(*length));
            said.see(&json!({"choices": [{"delta": {"content": "x".repeat(*length)}}]}));
        }
        match (self.end, error) {
            (End::Whole, _) => said.see(&json!({"choices": [], "usage": self.usage()})),
            (_, true) => said.see(&json!({"error": {"code": 502, "message": "gone"}})),
            _ => {}
        }
        (came, tokens, bytes, said)
    }
}

fn count(length: usize) -> i64 {
    i64::try_from(length).unwrap()
}

fn accounts() -> impl Strategy<Value = Account> {
    prop_oneof![
        4 => Just(Account::True),
        1 => Just(Account::Missing),
        2 => (0i64..300).prop_map(Account::Percent),
        1 => (any::<i64>(), any::<i64>()).prop_map(|(prompt, output)| Account::Wild(prompt, output)),
    ]
}

fn ends() -> impl Strategy<Value = End> {
    prop_oneof![
        4 => Just(End::Whole),
        1 => (0usize..60).prop_map(End::HangsUp),
        1 => (0usize..60).prop_map(End::ErrorAfter),
        1 => (0usize..60).prop_map(End::Unread),
        1 => Just(End::Refused),
    ]
}

fn calls() -> impl Strategy<Value = Call> {
    let texts = prop::collection::vec(1usize..=16, 0..50);
    (0i64..2_000, 90i64..170, texts, 0i64..300, 0i64..500, accounts(), ends()).prop_map(
        |(prompt, estimated, shown, thought, room, account, end)| Call {
            prompt,
            estimated,
            shown,
            thought,
            room,
            account,
            end,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Each call is charged as docs/model-budgets.md says.
    #[test]
    fn a_call_is_charged_within_the_documented_bound(call in calls()) {
        let reserved = call.reserved();
        let (came, tokens, bytes, said) = call.made();
        let charged = charge(reserved, !matches!(call.end, End::Refused), came, &said);
        let counted = charged.unwrap_or(reserved.bound);
        match (call.end, call.account) {
            (End::Refused, _) => prop_assert_eq!(counted.total(), 0),
            // A true usage is counted exactly.
            (End::Whole, Account::True) => prop_assert_eq!(counted, Bound { prompt: call.prompt, output: call.output() }),
            // Without a usage, the reservation is counted.
            (End::Whole, Account::Missing) => prop_assert_eq!(counted, reserved.bound),
            // A false usage: at least a sixteenth of the bytes that were sent and shown is counted.
            (End::Whole, _) => prop_assert!(counted.prompt >= reserved.least_prompt && counted.output >= bytes / 16),
            // A broken reply: everything that was shown counts, at most one token per byte, and the prompt as estimated.
            (End::HangsUp(_) | End::ErrorAfter(_), _) => {
                prop_assert_eq!(counted.prompt, reserved.bound.prompt);
                prop_assert!((tokens.min(bytes)..=bytes).contains(&counted.output), "{counted:?} {tokens} {bytes}");
            }
            // A client that stops reading pays no less than the reservation.
            (End::Unread(_), _) => prop_assert!(counted.prompt >= reserved.bound.prompt && counted.output >= reserved.bound.output),
        }
    }

    /// For a whole task, the counters are the sums of what was charged. The limit is exceeded by no more than the amount that calls were
    /// charged above their reservations. It is not exceeded if no prompt was estimated too low and no model exceeds its output limit.
    #[test]
    fn a_limit_is_passed_by_what_was_estimated_too_low_alone(calls in prop::collection::vec(calls(), 1..30), limit in 1i64..20_000, at_once in 1usize..5) {
        let limits = Limits { wall_time_seconds: 1, tool_calls: 0, tokens: limit, denials: None, cost_micros: None, approval_wait_seconds: 0 };
        let mut budget = Budget::resume(limits, Usage::default());
        let (mut under_way, mut sum, mut beyond) = (std::collections::VecDeque::new(), 0_i64, 0_i64);
        let mut end = |budget: &mut Budget, call: &Call| {
            let reserved = call.reserved();
            let (came, _, _, said) = call.made();
            let charged = charge(reserved, !matches!(call.end, End::Refused), came, &said).unwrap_or(reserved.bound);
            let spent = |bound: Bound| Spent { tokens: bound.total(), cost_micros: 0 };
            let counted = budget.settle_model(spent(reserved.bound), spent(charged));
            sum = sum.saturating_add(counted.tokens);
            beyond = beyond.saturating_add((charged.total() - reserved.bound.total()).max(0));
        };
        for call in &calls {
            if budget.reserve_model(call.reserved().bound.total(), 0).is_ok() {
                under_way.push_back(call);
            }
            if under_way.len() >= at_once && let Some(call) = under_way.pop_front() {
                end(&mut budget, call);
            }
        }
        under_way.into_iter().for_each(|call| end(&mut budget, call));
        prop_assert_eq!(budget.usage().tokens, sum);
        prop_assert!(sum <= limit.saturating_add(beyond), "{} of {}, {} beyond", sum, limit, beyond);
        let honest = calls.iter().all(|call| call.estimated >= 100 && matches!(call.account, Account::True | Account::Missing));
        prop_assert!(!honest || (beyond == 0 && sum <= limit));
    }
}
