use std::time::{Duration, Instant};

use cel::{Context, Program, Value as CelValue};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

use crate::policy::{
    expression::{Expression, json},
    meter::{self, Allowance},
};

const FEW: Allowance = Allowance { steps: 5_000, bytes: 1 << 20, time: Duration::from_secs(60) };

fn holds(source: &str, args: &Value) -> Result<bool, String> {
    let mut context = Context::with_env(super::env());
    context.add_variable_as_val("args", json(args));
    Expression::compile(source).unwrap().holds(&context)
}

/// Each evaluation ends, although it would take hours or all memory without metering. The control is the same expression over small values.
#[rstest]
#[case::each_once("args.n.all(x, args.n.exists_one(y, x == y))")]
#[case::exists("!args.n.exists(x, args.n.exists(y, x + y == -1))")]
#[case::exists_one("!args.n.exists_one(x, args.n.all(y, y != -1 && x == x))")]
#[case::filter("size(args.n.filter(x, size(args.n.filter(y, y > x)) >= 0)) >= 0")]
#[case::map("size(args.n.map(x, size(args.n.map(y, y + x)))) >= 0")]
#[case::guarded_map("size(args.n.map(x, size(args.n.filter(y, y == x)) == 1, x)) >= 0")]
#[case::errors_are_swallowed("args.n.exists(x, args.n.exists(y, y.missing)) || true")]
#[case::errors_are_turned_round("!(args.n.all(x, args.n.all(y, y == y)) && false)")]
#[case::the_other_branch("(args.n.all(x, args.n.all(y, true)) ? 1 : 2) > 0")]
#[case::in_a_range("args.n.filter(x, args.n.all(y, true)).all(z, true)")]
#[case::in_a_list("size([args.n.all(x, args.n.all(y, true))]) == 1")]
#[case::in_a_map("{'a': args.n.all(x, args.n.all(y, true))}.a")]
#[case::in_an_index("[true][args.n.all(x, args.n.all(y, true)) ? 0 : 1]")]
#[case::text_that_grows("size([[[[args.s].map(x, x + x)[0]].map(x, x + x)[0]].map(x, x + x)[0]].map(x, x + x)[0]) > 0")]
#[case::lists_that_grow("size([[[args.n].map(x, x + x)[0]].map(x, x + x)[0]].map(x, x + x + x + x)[0]) > 0")]
#[case::copies("size(args.n.map(x, args.n)) > 0")]
#[case::copies_in_maps("args.n.all(x, size({'a': args.n, 'b': args.n}) == 2)")]
#[case::copies_in_lists("args.n.all(x, size([args.s, args.s, args.s]) == 3)")]
#[case::patterns("args.n.all(x, !args.s.matches('(b*)*c'))")]
#[case::patterns_of_the_call("args.n.all(x, matches(args.s, args.s))")]
#[case::comparisons("args.n.all(x, args.n == args.n && args.n == args.n)")]
fn no_expression_goes_on(#[case] source: &str) {
    let little = json!({"n": [1, 2], "s": "a"});
    meter::within(FEW, || {
        assert!(holds(source, &little).is_ok_and(|_| true) || source.contains("missing"), "{source}")
    });
    let much = json!({"n": (0..4000).collect::<Vec<_>>(), "s": "a".repeat(90_000)});
    let started = Instant::now();
    let found = meter::within(FEW, || holds(source, &much));
    let reason = found.expect_err(source);
    assert!(reason.contains("more than"), "{source}: {reason}");
    // The bound is generous, because the machine may be slow.
    assert!(started.elapsed() < Duration::from_secs(20), "{source}: {:?}", started.elapsed());
}

/// Metering changes nothing else.
#[rstest]
#[case("args.n.map(x, x * 2)[1] == 4 && args.n.filter(x, x > 1).size() == 2")]
#[case("args.n.map(x, x > 1, string(x)) == ['2', '3']")]
#[case("args.n.exists_one(x, x == 2) && args.n.exists(x, x == 3) && args.n.all(x, x > 0)")]
#[case("args.s.matches('^[a-c]+$') && matches(args.s, 'b') && args.s.size() == 3")]
#[case("args.s + 'd' == 'abcd' && [1] + [2] == [1, 2] && 1 + 1 == 2 && 1.5 + 1.5 == 3.0")]
#[case("has(args.o.a) && !has(args.o.b) && args.o['a'] == 1 && 'a' in args.o && 2 in args.n")]
#[case("{'k': args.o.a}['k'] == 1 && {'k': 1}.k == 1 && type(1) == int && dyn(1) == 1")]
#[case("(args.s == 'abc' ? args.n : [])[0] == 1 && -args.n[0] == -1")]
#[case("timestamp('2026-01-01T00:00:00Z').getFullYear() == 2026 && duration('1h') > duration('1m')")]
#[case("[2, 3].all(e, 6 / (2 - e) == 6) == false")]
#[case("[0, 2, 3].exists(e, 6 / (2 - e) == 3)")]
#[case("args.s.startsWith('a') && args.s.endsWith('c') && args.s.contains('b')")]
#[case("args.o.map(k, k) == ['a'] && [[1, 2], [3]].map(l, l.map(x, x + 1)) == [[2, 3], [4]]")]
fn what_is_metered_means_what_it_meant(#[case] source: &str) {
    let args = json!({"n": [1, 2, 3], "s": "abc", "o": {"a": 1}});
    assert_eq!(holds(source, &args), Ok(true), "{source}");
    let mut context = Context::default();
    context.add_variable_as_val("args", json(&args));
    assert_eq!(Program::compile(source).unwrap().execute(&context), Ok(CelValue::Bool(true)), "{source}");
}

/// Generates nested expressions from the parts of the grammar.
fn source() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("args.n"),
        Just("args.s"),
        Just("args.o"),
        Just("args.n[0]"),
        Just("args.missing"),
        Just("1"),
        Just("'a'"),
        Just("true"),
        Just("[1, 2, 3]"),
        Just("x"),
        Just("null"),
    ]
    .prop_map(str::to_owned);
    leaf.prop_recursive(4, 24, 3, |inner| {
        let two = (inner.clone(), inner.clone());
        prop_oneof![
            (two.clone(), prop::sample::select(vec!["==", "!=", "&&", "||", "+", "<", "in", "-", "*"]))
                .prop_map(|((a, b), operator)| format!("({a} {operator} {b})")),
            (two.clone(), prop::sample::select(vec!["all", "exists", "exists_one", "map", "filter"]))
                .prop_map(|((over, of), name)| format!("{over}.{name}(x, {of})")),
            (inner.clone(), inner.clone(), inner.clone()).prop_map(|(a, b, c)| format!("({a} ? {b} : {c})")),
            two.clone().prop_map(|(a, b)| format!("[{a}, {b}]")),
            two.clone().prop_map(|(a, b)| format!("{{'k': {a}, 'l': {b}}}")),
            two.prop_map(|(a, b)| format!("string({a}).matches(string({b}))")),
            (inner, prop::sample::select(vec!["size", "string", "!", "int"]))
                .prop_map(|(a, name)| format!("{name}({a})")),
        ]
    })
}

proptest! {
    /// A metered expression has the same result as the plain one, if it ends within its allowance.
    #[test]
    fn metered_expressions_agree_with_those_that_are_not(source in source()) {
        let args = json!({"n": [1, 2, 3], "s": "ab", "o": {"a": 1}});
        let mut context = Context::with_env(super::env());
        context.add_variable_as_val("args", json(&args));
        context.add_variable_as_val("x", json(&Value::Null));
        let Ok(program) = Program::compile(&source) else { return Ok(()) };
        let plain = match program.execute(&context) {
            Ok(CelValue::Bool(truth)) => Some(truth),
            _ => None,
        };
        prop_assert_eq!(Expression::compile(&source).unwrap().holds(&context).ok(), plain, "{}", source);
    }
}
