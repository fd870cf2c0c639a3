//! Checks CEL preconditions before any call depends on them.
//!
//! Guarantees: An accepted expression compiles, names only variables that a harness binds, and is shallow enough to be evaluated on a small
//! stack.
//!
//! Non-goals: Types. An expression whose value is not a boolean denies the call when it is evaluated.

use std::collections::BTreeSet;

use cel::{
    Program,
    common::ast::{EntryExpr, Expr, IdedExpr},
};

/// The variables that a harness binds, see [`Precondition`](crate::policy::config::Precondition).
pub const VARIABLES: [&str; 5] = ["args", "task", "principal", "usage", "results"];

/// The deepest nesting or longest chain of operators. Evaluation recurses, and this depth fits into the 2 MiB stack of tokio's workers.
pub const MAX_DEPTH: usize = 64;

/// The deepest nesting of loops (`all`, `exists`, `map`, …). The lists that they loop over come from the agent.
pub const MAX_LOOPS: usize = 2;

/// The longest expression, as in the CRD. It is checked again, because contracts do not always come from an API server.
pub const MAX_LENGTH: usize = 4096;

/// Why an expression cannot be used as a precondition.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConditionError {
    /// The expression is too long to be compiled safely.
    #[error("{found} characters, more than {MAX_LENGTH}")]
    Length {
        /// The length of the expression.
        found: usize,
    },
    /// The expression has too many nested or chained operators.
    #[error("more than {MAX_DEPTH} operators or {MAX_LOOPS} loops in each other")]
    Depth,
    /// The expression is not valid CEL.
    #[error("text that is not CEL: {0}")]
    Syntax(String),
    /// The expression names a variable that is not bound.
    #[error("unknown variable `{0}`")]
    Variable(String),
}

/// Compiles the expression and makes all checks that are possible before evaluation.
///
/// # Errors
/// See [`ConditionError`].
pub fn check(source: &str) -> Result<(), ConditionError> {
    check_among(source, &VARIABLES)
}

/// Like [`check`], for an expression with other variables.
///
/// # Errors
/// See [`ConditionError`].
pub fn check_among(source: &str, variables: &[&str]) -> Result<(), ConditionError> {
    if source.len() > MAX_LENGTH {
        return Err(ConditionError::Length { found: source.len() });
    }
    let program = Program::compile(source).map_err(|errors| {
        ConditionError::Syntax(errors.to_string().lines().next().unwrap_or_default().trim().to_owned())
    })?;
    let mut free = BTreeSet::new();
    walk(program.expression(), &mut Vec::new(), &mut free, 0, 0)?;
    match free.iter().find(|name| !variables.contains(&name.as_str())) {
        Some(name) => Err(ConditionError::Variable(name.clone())),
        None => Ok(()),
    }
}

fn walk<'e>(
    expression: &'e IdedExpr,
    bound: &mut Vec<&'e str>,
    free: &mut BTreeSet<String>,
    depth: usize,
    loops: usize,
) -> Result<(), ConditionError> {
    if depth > MAX_DEPTH || loops > MAX_LOOPS {
        return Err(ConditionError::Depth);
    }
    let depth = depth + 1;
    match &expression.expr {
        Expr::Unspecified | Expr::Literal(_) => {}
        Expr::Ident(name) => {
            if !bound.contains(&name.as_str()) {
                free.insert(name.clone());
            }
        }
        Expr::Select(select) => walk(&select.operand, bound, free, depth, loops)?,
        Expr::Call(call) => {
            for part in call.target.as_deref().into_iter().chain(&call.args) {
                walk(part, bound, free, depth, loops)?;
            }
        }
        Expr::List(list) => {
            for element in &list.elements {
                walk(element, bound, free, depth, loops)?;
            }
        }
        Expr::Map(map) => {
            for entry in &map.entries {
                walk_entry(&entry.expr, bound, free, depth, loops)?;
            }
        }
        Expr::Struct(structure) => {
            for entry in &structure.entries {
                walk_entry(&entry.expr, bound, free, depth, loops)?;
            }
        }
        Expr::Comprehension(loop_) => {
            walk(&loop_.iter_range, bound, free, depth, loops)?;
            walk(&loop_.accu_init, bound, free, depth, loops)?;
            let outer = bound.len();
            bound.push(&loop_.accu_var);
            bound.push(&loop_.iter_var);
            bound.extend(loop_.iter_var2.as_deref());
            let inner = [&loop_.loop_cond, &loop_.loop_step, &loop_.result];
            let seen = inner.into_iter().try_for_each(|part| walk(part, bound, free, depth, loops + 1));
            bound.truncate(outer);
            seen?;
        }
    }
    Ok(())
}

fn walk_entry<'e>(
    entry: &'e EntryExpr,
    bound: &mut Vec<&'e str>,
    free: &mut BTreeSet<String>,
    depth: usize,
    loops: usize,
) -> Result<(), ConditionError> {
    match entry {
        EntryExpr::StructField(field) => walk(&field.value, bound, free, depth, loops),
        EntryExpr::MapEntry(entry) => {
            walk(&entry.key, bound, free, depth, loops)?;
            walk(&entry.value, bound, free, depth, loops)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::plain("args.path.startsWith('/logs/')")]
    #[case::all_variables("usage.toolCalls < 10 && task.namespace == 'x' && principal == 'a' && has(args.x)")]
    #[case::results("results.lookup.severity == 'high' || results['read-log'].size() > 0")]
    #[case::loop_variable("args.items.all(item, item.size() < 3)")]
    #[case::nested_loops("args.a.exists(x, args.b.all(y, x == y))")]
    fn accepts(#[case] source: &str) {
        assert_eq!(check(source), Ok(()));
    }

    #[rstest::rstest]
    #[case::typo("arg.path == 'x'", ConditionError::Variable("arg".into()))]
    #[case::loop_variable_outside("args.a.all(x, true) && x", ConditionError::Variable("x".into()))]
    #[case::chain(&vec!["1"; 200].join("+"), ConditionError::Depth)]
    #[case::three_loops("args.a.all(x, x.all(y, y.all(z, z)))", ConditionError::Depth)]
    #[case::long(&"a".repeat(5000), ConditionError::Length { found: 5000 })]
    fn refuses(#[case] source: &str, #[case] expected: ConditionError) {
        let source = source.to_owned();
        on_a_large_stack(move || assert_eq!(check(&source), Err(expected)));
    }

    #[rstest::rstest]
    #[case("")]
    #[case("args.path ==")]
    #[case("if x then y")]
    #[case("'unclosed")]
    fn refuses_what_is_no_cel(#[case] source: &str) {
        assert!(matches!(check(source), Err(ConditionError::Syntax(_))), "{source:?}: {:?}", check(source));
    }

    /// In release builds, the parser's own limit is far within the 2 MiB stack of tokio's workers (measured: 256 of each are fine). Frames
    /// of debug builds are about ten times larger, so this stack is large.
    fn on_a_large_stack(check: impl FnOnce() + Send + 'static) {
        std::thread::Builder::new().stack_size(256 << 20).spawn(check).unwrap().join().unwrap();
    }

    #[rstest::rstest]
    #[case("(", ")")]
    #[case("[", "]")]
    #[case("{1:", "}")]
    #[case("!", "")]
    #[case("-", "")]
    #[case("true?1:", "")]
    #[case("size(", ")")]
    #[case("args[", "]")]
    #[case("1 in ", "")]
    #[case("1<", "")]
    #[case("true&&", "")]
    #[case("true||", "")]
    #[case("[1].all(x,", ")")]
    fn no_expression_exhausts_the_stack(#[case] open: &str, #[case] close: &str) {
        let sources: Vec<_> = [20, 60, 90, 1000].map(|n| format!("{}1{}", open.repeat(n), close.repeat(n))).into();
        on_a_large_stack(move || sources.iter().for_each(|source| drop(check(source))));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(source in "[a-z0-9 ()\\[\\]{}.,:?!<>=&|+*/%'\"\\\\-]{0,80}") {
            let _ = check(&source);
        }
    }
}
