//! Finds what may take too long to evaluate, as far as a contract alone shows it.
//!
//! Guarantees: nested loops over an argument, `uniqueItems` and patterns with lookaround or backreferences are reported if nothing bounds
//! their input.
//!
//! Non-goals: errors. A call that takes too long to evaluate is denied anyway; these findings warn of that earlier.

use cel::{
    Program,
    common::ast::{EntryExpr, Expr, IdedExpr},
};
use serde_json::Value;

use crate::{api::ToolContract, policy::json::pointer_token, render::Finding};

/// Returns the parts of a contract that may take too long.
pub(super) fn contract(contract: &ToolContract) -> Vec<Finding> {
    let spec = &contract.spec;
    let mut found = Vec::new();
    let numbered = spec.preconditions.iter().enumerate();
    let preconditions = numbered.map(|(index, one)| (format!("spec.preconditions[{index}].cel"), &one.cel));
    let when = spec.approval.iter().filter_map(|approval| approval.when.as_ref());
    let applied = spec.verify.iter().map(|read| &read.applied);
    let undo = spec.rollback.iter().filter_map(|rollback| rollback.call.as_ref()).flat_map(|call| &call.arguments);
    let expressions = preconditions
        .chain(when.map(|cel| ("spec.approval.when".to_owned(), cel)))
        .chain(applied.map(|cel| ("spec.verify.applied".to_owned(), cel)))
        .chain(undo.map(|(name, cel)| (format!("spec.rollback.call.arguments.{name}"), cel)));
    for (field, cel) in expressions {
        let Ok(program) = Program::compile(cel) else { continue };
        let mut over = Vec::new();
        loops(program.expression(), 0, &mut over);
        over.retain(|path| !has_bound(&spec.input, path));
        if let Some(path) = over.first() {
            found.push(Finding::new(
                field,
                "a limit on the items of a nested loop",
                format!("args.{}, which may have any number of items", path.join(".")),
                "give it `maxItems` in spec.input: a call that takes too long to evaluate is denied",
            ));
        }
    }
    for (field, schema) in [("spec.input", Some(&spec.input)), ("spec.output", spec.output.as_ref())] {
        if let Some(schema) = schema {
            unbounded(schema, field, "", &mut found);
        }
    }
    found
}

/// Collects the paths of the arguments that nested loops iterate over.
fn loops(expression: &IdedExpr, depth: usize, over: &mut Vec<Vec<String>>) {
    match &expression.expr {
        Expr::Unspecified | Expr::Literal(_) | Expr::Ident(_) => {}
        Expr::Select(select) => loops(&select.operand, depth, over),
        Expr::Call(call) => {
            call.target.as_deref().into_iter().chain(&call.args).for_each(|part| loops(part, depth, over));
        }
        Expr::List(list) => list.elements.iter().for_each(|part| loops(part, depth, over)),
        Expr::Map(map) => map.entries.iter().for_each(|entry| entered(&entry.expr, depth, over)),
        Expr::Struct(structure) => structure.entries.iter().for_each(|entry| entered(&entry.expr, depth, over)),
        Expr::Comprehension(one) => {
            loops(&one.iter_range, depth, over);
            if depth > 0
                && let Some(path) = argument(&one.iter_range)
            {
                over.push(path);
            }
            [&one.loop_cond, &one.loop_step, &one.result].into_iter().for_each(|part| loops(part, depth + 1, over));
        }
    }
}

fn entered(entry: &EntryExpr, depth: usize, over: &mut Vec<Vec<String>>) {
    match entry {
        EntryExpr::StructField(field) => loops(&field.value, depth, over),
        EntryExpr::MapEntry(entry) => {
            loops(&entry.key, depth, over);
            loops(&entry.value, depth, over);
        }
    }
}

/// Returns the path of `args.a.b`.
fn argument(expression: &IdedExpr) -> Option<Vec<String>> {
    match &expression.expr {
        Expr::Ident(name) if name == "args" => Some(vec![]),
        Expr::Select(select) if !select.test => {
            let mut path = argument(&select.operand)?;
            path.push(select.field.clone());
            Some(path)
        }
        _ => None,
    }
}

/// Returns whether a schema bounds what lies at a path. If the schema does not say it plainly, it counts as bounded.
fn has_bound(schema: &Value, path: &[String]) -> bool {
    let mut at = schema;
    for name in path {
        match at.get("properties").and_then(|properties| properties.get(name)) {
            Some(found) => at = found,
            None => return true,
        }
    }
    let list = at.get("type").is_none_or(|kind| kind == "array");
    !list
        || ["maxItems", "enum", "const", "$ref", "allOf", "anyOf", "oneOf"]
            .iter()
            .any(|keyword| at.get(keyword).is_some())
}

/// Finds `uniqueItems` and patterns with lookaround or backreferences over input without a bound.
fn unbounded(schema: &Value, field: &str, pointer: &str, found: &mut Vec<Finding>) {
    let Value::Object(members) = schema else {
        if let Value::Array(schemas) = schema {
            let each = schemas.iter().enumerate();
            each.for_each(|(index, one)| unbounded(one, field, &format!("{pointer}/{index}"), found));
        }
        return;
    };
    let mut add = |keyword: &str, expected: &str, by: &str| {
        let mend = format!("add `{by}` beside it: a call that takes too long to evaluate is denied");
        found.push(Finding::new(field, expected, format!("`{keyword}` at {pointer}/{keyword} without"), mend));
    };
    if members.get("uniqueItems") == Some(&Value::Bool(true)) && !members.contains_key("maxItems") {
        add("uniqueItems", "a limit on the number of items that are compared with each other", "maxItems");
    }
    let looks_back = |pattern: &Value| pattern.as_str().is_some_and(|pattern| regex_syntax_only(pattern).is_err());
    if members.get("pattern").is_some_and(looks_back) && !members.contains_key("maxLength") {
        add("pattern", "a limit on the text that a pattern with lookaround or backreferences reads", "maxLength");
    }
    for (name, inner) in
        members.iter().filter(|(name, _)| !["enum", "const", "default", "examples"].contains(&name.as_str()))
    {
        unbounded(inner, field, &format!("{pointer}/{}", pointer_token(name)), found);
    }
}

/// Checks that a pattern has no lookaround or backreferences.
fn regex_syntax_only(pattern: &str) -> Result<(), regex::Error> {
    regex::Regex::new(pattern).map(|_| ())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn of(cel: &str, names: Value) -> Vec<Finding> {
        let made: ToolContract = serde_json::from_value(json!({
            "apiVersion": "belay.dev/v1alpha1", "kind": "ToolContract", "metadata": {"name": "t"},
            "spec": {
                "tool": "t", "description": "d", "sideEffect": "read",
                "upstream": {"http": {"method": "POST", "url": "http://shop.test/"}},
                "input": {"type": "object", "properties": {"names": names}},
                "preconditions": [{"name": "p", "cel": cel, "message": "m"}],
            },
        }))
        .unwrap();
        contract(&made)
    }

    #[rstest]
    #[case("args.names.all(x, args.names.exists_one(y, x == y))", json!({"type": "array"}), "spec.preconditions[0].cel")]
    #[case("size(args.names.map(x, args.names.filter(y, y == x))) > 0", json!({"type": "array"}), "spec.preconditions[0].cel")]
    #[case("true", json!({"type": "array", "uniqueItems": true}), "spec.input")]
    #[case("true", json!({"type": "array", "items": {"type": "string", "pattern": "^(?=.*a).*$"}}), "spec.input")]
    #[case("true", json!({"type": "string", "pattern": r"^(a+)\1$"}), "spec.input")]
    fn what_has_no_bound_is_told(#[case] cel: &str, #[case] names: Value, #[case] field: &str) {
        let found = of(cel, names);
        assert!(matches!(found.as_slice(), [one] if one.field == field), "{found:?}");
    }

    #[rstest]
    #[case("args.names.all(x, args.names.exists_one(y, x == y))", json!({"type": "array", "maxItems": 50}))]
    #[case("args.names.all(x, x != '')", json!({"type": "array"}))]
    #[case("args.names.all(x, ['a', 'b'].exists(y, x == y))", json!({"type": "array"}))]
    #[case("true", json!({"type": "array", "uniqueItems": true, "maxItems": 9}))]
    #[case("true", json!({"type": "string", "pattern": "^(?=.*a).*$", "maxLength": 64}))]
    #[case("true", json!({"type": "string", "pattern": "^[a-z]+$"}))]
    fn what_is_bounded_is_not(#[case] cel: &str, #[case] names: Value) {
        assert_eq!(of(cel, names), []);
    }
}
