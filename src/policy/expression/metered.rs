//! Meters the evaluation of CEL expressions.
//!
//! Guarantees: an expression that [`meter`] has rewritten counts one step for each turn of a loop and for each operator that reads whole
//! values. It counts the bytes of each list and text that it makes before these are copied. Its meaning does not change. Patterns of
//! `matches` are compiled within a memory limit, and their cost depends on the length of the text.
//! Non-goals: counting operations that take no longer than reading a variable.
//!
//! The evaluator has no metering of its own. It evaluates any tree, so the tree gets calls of functions whose names cannot be written in an
//! expression.

use std::sync::{Arc, LazyLock};

use cel::{
    Env, ExecutionError, IdedExpr,
    common::{
        ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, LiteralValue, operators},
        types::{CelBool, CelBytes, CelList, CelMap, CelString, DYN_TYPE, STRING_TYPE},
        value::{CowVal, Val},
    },
};
use regex::RegexBuilder;

use crate::policy::meter::{self, Exceeded};

/// Counts a step and returns its argument.
const STEP: &str = "@step";
/// Counts the bytes of its argument and returns it.
const MADE: &str = "@made";
/// Counts a turn of a loop: returns true, or an error.
const TURN: &str = "@turn";
/// `matches` within limits.
const MATCHES: &str = "@matches";

/// Maximum memory of a compiled pattern, in bytes.
const LARGEST_PATTERN: usize = 4 << 20;
/// Size of a value besides its content, in bytes.
const EACH: u64 = 48;

/// Operators that decide themselves which of their operands are evaluated, or that read only a boolean or one element.
const PLAIN: [&str; 7] = [
    operators::LOGICAL_AND,
    operators::LOGICAL_OR,
    operators::LOGICAL_NOT,
    operators::CONDITIONAL,
    operators::NOT_STRICTLY_FALSE,
    operators::NEGATE,
    operators::INDEX,
];

/// Functions that return a boolean, a number or a part of their argument.
const SMALL: [&str; 25] = [
    operators::EQUALS,
    operators::NOT_EQUALS,
    operators::LESS,
    operators::LESS_EQUALS,
    operators::GREATER,
    operators::GREATER_EQUALS,
    operators::SUBSTRACT,
    operators::MULTIPLY,
    operators::DIVIDE,
    operators::MODULO,
    operators::IN,
    "size",
    "contains",
    "startsWith",
    "endsWith",
    "matches",
    "int",
    "uint",
    "double",
    "bool",
    "type",
    "duration",
    "timestamp",
    MATCHES,
    STEP,
];

/// Returns the environment with all functions that expressions may call, and the functions that count.
pub fn env() -> Arc<Env> {
    static ENV: LazyLock<Arc<Env>> = LazyLock::new(|| {
        let mut env = Env::stdlib();
        // No other function can have these names. An expression that does not find one of them cannot be evaluated, which denies the call.
        let _ = env.add_overload(STEP, STEP, vec![DYN_TYPE], stepped);
        let _ = env.add_overload(MADE, MADE, vec![DYN_TYPE], made);
        let _ = env.add_overload(TURN, TURN, vec![], turn);
        let _ = env.add_overload(MATCHES, MATCHES, vec![STRING_TYPE, STRING_TYPE], matches);
        Arc::new(env)
    });
    ENV.clone()
}

/// Rewrites an expression so that it counts its cost.
pub fn meter(expression: &mut IdedExpr) {
    match &mut expression.expr {
        Expr::Unspecified | Expr::Literal(_) | Expr::Ident(_) => {}
        Expr::Select(select) => meter(&mut select.operand),
        Expr::Call(call) => {
            call.target.iter_mut().for_each(|target| meter(target));
            call.args.iter_mut().for_each(meter);
            counted(expression);
        }
        Expr::List(list) => list.elements.iter_mut().for_each(kept),
        Expr::Map(map) => map.entries.iter_mut().for_each(|entry| entered(&mut entry.expr)),
        Expr::Struct(structure) => structure.entries.iter_mut().for_each(|entry| entered(&mut entry.expr)),
        Expr::Comprehension(one) => turned(one),
    }
}

fn entered(entry: &mut EntryExpr) {
    match entry {
        EntryExpr::StructField(field) => kept(&mut field.value),
        EntryExpr::MapEntry(entry) => {
            kept(&mut entry.key);
            kept(&mut entry.value);
        }
    }
}

/// Counts a value that becomes part of another value, because it is copied.
fn kept(part: &mut IdedExpr) {
    meter(part);
    if !matches!(part.expr, Expr::Literal(_)) {
        wrap(part, MADE);
    }
}

/// Counts a call before it reads its first argument, or after the call if it has no argument. Also counts the size of its result.
fn counted(expression: &mut IdedExpr) {
    let Expr::Call(call) = &mut expression.expr else { return };
    let arguments = call.args.len();
    match (call.func_name.as_str(), call.target.take_if(|_| call.func_name == "matches" && arguments == 1)) {
        (_, Some(text)) => {
            call.args.insert(0, *text);
            MATCHES.clone_into(&mut call.func_name);
        }
        ("matches", None) if call.target.is_none() && arguments == 2 => MATCHES.clone_into(&mut call.func_name),
        _ => {}
    }
    // The accumulator of a loop has no name that an expression can write. It belongs to the loop, which counts its turns.
    let is_own = matches!(call.args.first().map(|first| &first.expr), Some(Expr::Ident(name)) if name.starts_with('@'));
    if PLAIN.contains(&call.func_name.as_str()) || is_own {
        return;
    }
    let (small, first) = (SMALL.contains(&call.func_name.as_str()), call.args.first_mut());
    match first {
        Some(first) => wrap(first, STEP),
        None if small => return wrap(expression, STEP),
        None => {}
    }
    if !small {
        wrap(expression, MADE);
    }
}

/// Counts the turns of a loop. A loop that only appends to a list keeps the form that the evaluator runs in place.
fn turned(one: &mut ComprehensionExpr) {
    meter(&mut one.iter_range);
    meter(&mut one.loop_cond);
    meter(&mut one.loop_step);
    let appends = matches!(&one.accu_init.expr, Expr::List(list) if list.elements.is_empty())
        && matches!(one.loop_cond.expr, Expr::Literal(_));
    if !appends {
        meter(&mut one.accu_init);
        meter(&mut one.result);
        return on_turn(&mut one.loop_cond, refuse());
    }
    if let Expr::Call(step) = &mut one.loop_step.expr
        && step.func_name == operators::CONDITIONAL
        && let [guard, ..] = step.args.as_mut_slice()
    {
        return on_turn(guard, refuse());
    }
    let unchanged = Expr::Ident(one.accu_var.clone());
    on_turn(&mut one.loop_step, unchanged);
}

fn refuse() -> Expr {
    Expr::Literal(LiteralValue::Boolean(false.into()))
}

/// Replaces `part` by `turn() ? part : otherwise`.
fn on_turn(part: &mut IdedExpr, otherwise: Expr) {
    let (id, inner) = (part.id, std::mem::take(part));
    let node = |expr| IdedExpr { id, expr };
    let turn = node(call(TURN, vec![]));
    part.id = id;
    part.expr = call(operators::CONDITIONAL, vec![turn, inner, node(otherwise)]);
}

fn wrap(part: &mut IdedExpr, function: &str) {
    let (id, inner) = (part.id, std::mem::take(part));
    part.id = id;
    part.expr = call(function, vec![inner]);
}

fn call(function: &str, args: Vec<IdedExpr>) -> Expr {
    Expr::Call(CallExpr { func_name: function.to_owned(), target: None, args })
}

fn over(exceeded: Exceeded) -> ExecutionError {
    ExecutionError::function_error("judgment", exceeded)
}

fn only<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    args.into_iter().next().ok_or_else(ExecutionError::missing_argument_or_target)
}

fn stepped<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    meter::step(1).map_err(over)?;
    only(args)
}

fn made<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let value = only(args)?;
    weigh(value.as_ref()).map_err(over)?;
    Ok(value)
}

fn turn<'b, 'v>(_: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    meter::step(1).map_err(over)?;
    Ok(CowVal::owned(CelBool::from(true)))
}

fn matches<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let mut texts = args.iter().filter_map(|arg| arg.downcast_ref::<CelString<'_>>());
    let (Some(text), Some(pattern)) = (texts.next(), texts.next()) else {
        return Err(ExecutionError::missing_argument_or_target());
    };
    let (text, pattern) = (text.inner(), pattern.inner());
    let length = |text: &str| u64::try_from(text.len()).unwrap_or(u64::MAX);
    // The regex engine reads each character with, at worst, each part of the pattern.
    let looks = length(text).saturating_mul(length(pattern).max(8)) / 64;
    meter::step(looks.saturating_add(length(pattern))).map_err(over)?;
    let compiled = RegexBuilder::new(pattern).size_limit(LARGEST_PATTERN).build();
    let compiled = compiled.map_err(|error| ExecutionError::function_error("matches", error))?;
    Ok(CowVal::owned(CelBool::from(compiled.is_match(text))))
}

/// Counts the parts and the bytes of a value.
fn weigh(value: &dyn Val) -> Result<(), Exceeded> {
    let length = |length: usize| u64::try_from(length).unwrap_or(u64::MAX);
    meter::step(1)?;
    if let Some(text) = value.downcast_ref::<CelString<'_>>() {
        return meter::make(EACH.saturating_add(length(text.inner().len())));
    }
    if let Some(bytes) = value.downcast_ref::<CelBytes<'_>>() {
        return meter::make(EACH.saturating_add(length(bytes.inner().len())));
    }
    meter::make(EACH)?;
    if let Some(list) = value.downcast_ref::<CelList<'_>>() {
        return list.inner().iter().try_for_each(|item| weigh(item.as_ref()));
    }
    if let Some(map) = value.downcast_ref::<CelMap<'_>>() {
        return map.inner().iter().try_for_each(|(key, value)| {
            weigh(key.inner())?;
            weigh(value.as_ref())
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
