//! CEL expressions of contracts and packs, and what they see.
//!
//! Promises: an expression says yes, no, or why it says neither; who asks decides what neither means, and it is never in the
//! agent's favour. Whole numbers of JSON are `int` where they fit, so that they can be added to literals. Refuses: to show an
//! argument's value in a reason, which is recorded.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use cel::{Context, ExecutionError, Program, Value as CelValue, objects::Key};
use serde_json::Value;

use super::{
    config::{TaskIdentity, Usage},
    decide::shorten,
};

/// A compiled expression.
pub struct Expression {
    program: Program,
    names: BTreeSet<String>,
}

impl Expression {
    /// Compiles one.
    ///
    /// # Errors
    /// Why it is no CEL.
    pub fn compile(source: &str) -> Result<Self, String> {
        let program = Program::compile(source).map_err(|error| error.to_string())?;
        let names = program.references().variables().into_iter().map(str::to_owned).collect();
        Ok(Self { program, names })
    }

    /// Whether it looks at a variable.
    pub fn sees(&self, variable: &str) -> bool {
        self.names.contains(variable)
    }

    /// Yes or no.
    ///
    /// # Errors
    /// Why it is neither, without any value of the call.
    pub fn holds(&self, context: &Context<'_, '_>) -> Result<bool, String> {
        match self.execute(context)? {
            CelValue::Bool(truth) => Ok(truth),
            _ => Err("it is not a yes or no".into()),
        }
    }

    /// What it comes to, as JSON other than `null`.
    ///
    /// # Errors
    /// Why it comes to nothing that JSON has, without any value of the call.
    pub fn value(&self, context: &Context<'_, '_>) -> Result<Value, String> {
        match self.execute(context)?.json() {
            // A member of what has none comes to that as well.
            Ok(Value::Null) => Err("it comes to nothing".to_owned()),
            Ok(value) => Ok(value),
            Err(_) => Err("it does not come to JSON".to_owned()),
        }
    }

    fn execute(&self, context: &Context<'_, '_>) -> Result<CelValue, String> {
        self.program.execute(context).map_err(|error| match error {
            ExecutionError::NoSuchKey(key) => format!("there is no {}", shorten(&key)),
            _ => "it cannot be evaluated over these values".into(),
        })
    }
}

/// What every expression of a task sees: `task` and `principal`, and all functions.
pub fn context(task: &TaskIdentity) -> Context<'static, 'static> {
    let mut context = Context::default();
    context.add_variable_from_value("task", task_value(task));
    context.add_variable_from_value("principal", task.principal.as_str());
    context
}

/// JSON as CEL has it.
pub fn json_value(value: &Value) -> CelValue {
    match value {
        Value::Null => CelValue::Null,
        Value::Bool(value) => CelValue::Bool(*value),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => CelValue::Int(whole),
            (None, Some(whole)) => CelValue::UInt(whole),
            (None, None) => number.as_f64().map_or(CelValue::Null, CelValue::Float),
        },
        Value::String(text) => CelValue::String(Arc::new(text.clone())),
        Value::Array(items) => CelValue::List(Arc::new(items.iter().map(json_value).collect())),
        Value::Object(fields) => map(fields.iter().map(|(name, value)| (name.as_str(), json_value(value)))),
    }
}

/// A map by names.
pub fn map<'n>(fields: impl IntoIterator<Item = (&'n str, CelValue)>) -> CelValue {
    fields.into_iter().map(|(name, value)| (Key::from(name), value)).collect::<HashMap<Key, CelValue>>().into()
}

/// `usage`.
pub fn usage_value(usage: Usage) -> CelValue {
    map([
        ("toolCalls", CelValue::Int(usage.tool_calls)),
        ("tokens", CelValue::Int(usage.tokens)),
        ("denials", CelValue::Int(usage.denials)),
        ("costMicros", CelValue::Int(usage.cost_micros)),
    ])
}

fn task_value(task: &TaskIdentity) -> CelValue {
    let fields = [
        ("namespace", task.namespace.as_str()),
        ("name", &task.name),
        ("uid", &task.uid),
        ("objective", &task.objective),
        ("workflowClass", &task.workflow_class),
        ("taskClass", task.task_class.as_deref().unwrap_or_default()),
        ("principal", &task.principal),
    ];
    map(fields.map(|(name, value)| (name, CelValue::from(value))))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    /// What is asked of a value that has no members is an error, whatever the rest of the expression makes of it: cel 0.13 took it for
    /// `false`, by which a condition could pass.
    #[rstest]
    #[case("args.card.blocked == false")]
    #[case("!args.card.blocked")]
    #[case("!has(args.card.blocked)")]
    #[case("args.list.all(one, !one.blocked)")]
    #[case("!args.nothing.blocked")]
    #[case("!args.missing")]
    fn a_member_of_what_has_none_is_an_error(#[case] source: &str) {
        let mut context = Context::default();
        let args = json!({"card": "4111", "list": ["a"], "nothing": null});
        context.add_variable_from_value("args", json_value(&args));
        assert!(Expression::compile(source).unwrap().holds(&context).is_err(), "{source}");
    }

    #[rstest]
    #[case("{'id': args.id, 'all': [args.id, 2]}", Ok(json!({"id": 7, "all": [7, 2]})))]
    #[case("'no. ' + string(args.id)", Ok(json!("no. 7")))]
    #[case("args.nothing", Err("it comes to nothing"))]
    #[case("args.missing", Err("there is no missing"))]
    #[case("args.id.deeper", Err("it cannot be evaluated over these values"))]
    fn a_value(#[case] source: &str, #[case] expected: Result<Value, &str>) {
        let mut context = Context::default();
        context.add_variable_from_value("args", json_value(&json!({"id": 7, "nothing": null})));
        let found = Expression::compile(source).unwrap().value(&context);
        assert_eq!(found, expected.map_err(str::to_owned));
    }
}
