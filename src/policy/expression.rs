//! Evaluates CEL expressions of contracts and packs, and provides the variables that they see.
//!
//! Guarantees: an expression evaluates to true, to false, or to an error with a reason. The caller decides what an error means, and never
//! in favour of the agent. An evaluation stays within its allowance ([`meter`](super::meter)). Whole numbers of JSON are `int` if they fit,
//! so they can be added to literals. No reason contains the value of an argument, because reasons are recorded.

use std::collections::{BTreeSet, HashMap};

use cel::{
    Context, ExecutionError, IdedExpr, Program, Value as CelValue,
    common::{
        types::{CelBool, CelDouble, CelInt, CelList, CelMap, CelMapKey, CelNull, CelString, CelUInt},
        value::Val,
    },
};
use serde_json::Value;

use super::{
    config::{TaskIdentity, Usage},
    cost, meter,
    shorten::shorten,
};

/// Metering of expressions.
mod metered;

/// A compiled expression.
pub struct Expression {
    metered: IdedExpr,
    names: BTreeSet<String>,
    is_bounded_cost: bool,
}

impl Expression {
    /// Compiles an expression.
    ///
    /// # Errors
    /// Returns the reason if the source is not a CEL expression.
    pub fn compile(source: &str) -> Result<Self, String> {
        let program = Program::compile(source).map_err(|error| error.to_string())?;
        let references = program.references();
        let names = references.variables().into_iter().map(str::to_owned).collect();
        let is_bounded_cost = cost::expression(source, references.functions());
        let mut metered = program.expression().clone();
        metered::meter(&mut metered);
        Ok(Self { metered, names, is_bounded_cost })
    }

    /// Returns whether the expression takes microseconds if the arguments are short. See [`cost`].
    pub fn is_bounded_cost(&self) -> bool {
        self.is_bounded_cost
    }

    /// Returns whether the expression reads a variable.
    pub fn sees(&self, variable: &str) -> bool {
        self.names.contains(variable)
    }

    /// Evaluates the expression to true or false.
    ///
    /// # Errors
    /// Returns the reason if the result is neither. The reason contains no value of the call.
    pub fn holds(&self, context: &Context<'_, '_>) -> Result<bool, String> {
        match self.execute(context)? {
            CelValue::Bool(truth) => Ok(truth),
            _ => Err("the result is not true or false".into()),
        }
    }

    /// Evaluates the expression to JSON other than `null`.
    ///
    /// # Errors
    /// Returns the reason if the result is `null` or not JSON. The reason contains no value of the call.
    pub fn value(&self, context: &Context<'_, '_>) -> Result<Value, String> {
        match self.execute(context)?.json() {
            // A member of a value without members evaluates to null as well.
            Ok(Value::Null) => Err("the result is null".to_owned()),
            Ok(value) => Ok(value),
            Err(_) => Err("the result is not JSON".to_owned()),
        }
    }

    fn execute(&self, context: &Context<'_, '_>) -> Result<CelValue, String> {
        meter::metered(|| {
            let came = CelValue::resolve(&self.metered, context);
            // The result does not matter here, because an expression may recover from the error.
            meter::ended_by_itself().map_err(|exceeded| exceeded.to_string())?;
            came.map_err(|error| match error {
                ExecutionError::NoSuchKey(key) => format!("there is no {}", shorten(&key)),
                _ => "it cannot be evaluated with these values".into(),
            })
        })
    }
}

/// Returns the variables that every expression of a task sees, `task` and `principal`, and all functions.
pub fn context(task: &TaskIdentity) -> Context<'static, 'static> {
    let mut context = Context::with_env(metered::env());
    context.add_variable_as_val("task", task_seen(task));
    context.add_variable_as_val("principal", text(task.principal.clone()));
    context
}

/// The value of a variable that an expression sees. It may borrow for `'v`.
pub type Seen<'v> = Box<dyn Val + 'v>;

/// Returns a JSON value as a CEL value, without a copy.
pub fn json(value: &Value) -> Seen<'_> {
    seen(value, |text| text)
}

/// Returns a JSON value as a CEL value that owns its content.
pub fn json_kept(value: &Value) -> Seen<'static> {
    seen(value, str::to_owned)
}

fn seen<'j, 'v, T>(value: &'j Value, copied: fn(&'j str) -> T) -> Seen<'v>
where
    T: Into<CelString<'v>> + Into<CelMapKey<'v>>,
{
    match value {
        Value::Null => Box::new(CelNull),
        Value::Bool(value) => Box::new(CelBool::from(*value)),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Box::new(CelInt::from(whole)),
            (None, Some(whole)) => Box::new(CelUInt::from(whole)),
            (None, None) => match number.as_f64() {
                Some(double) => Box::new(CelDouble::from(double)),
                None => Box::new(CelNull),
            },
        },
        Value::String(value) => text(copied(value)),
        Value::Array(items) => {
            let items: Vec<Seen<'v>> = items.iter().map(|item| seen(item, copied)).collect();
            Box::new(CelList::from(items))
        }
        Value::Object(fields) => map(fields.iter().map(|(name, value)| (copied(name), seen(value, copied)))),
    }
}

/// Returns a text as a CEL value.
pub fn text<'v>(text: impl Into<CelString<'v>>) -> Seen<'v> {
    Box::new(text.into())
}

/// Returns a map with these names as a CEL value.
pub fn map<'v>(fields: impl IntoIterator<Item = (impl Into<CelMapKey<'v>>, Seen<'v>)>) -> Seen<'v> {
    let fields: HashMap<CelMapKey<'v>, Seen<'v>> =
        fields.into_iter().map(|(name, value)| (name.into(), value)).collect();
    Box::new(CelMap::from(fields))
}

/// Returns the variable `usage`.
pub fn usage(usage: Usage) -> Seen<'static> {
    let counters = [
        ("toolCalls", usage.tool_calls),
        ("tokens", usage.tokens),
        ("denials", usage.denials),
        ("costMicros", usage.cost_micros),
    ];
    map(counters.map(|(name, count)| (name, Box::new(CelInt::from(count)) as Seen<'static>)))
}

fn task_seen(task: &TaskIdentity) -> Seen<'static> {
    let fields = [
        ("namespace", task.namespace.as_str()),
        ("name", &task.name),
        ("uid", &task.uid),
        ("objective", &task.objective),
        ("workflowClass", &task.workflow_class),
        ("taskClass", task.task_class.as_deref().unwrap_or_default()),
        ("principal", &task.principal),
    ];
    map(fields.map(|(name, value)| (name, text(value.to_owned()))))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    /// To select a member of a value without members is an error, whatever the rest of the expression does with it. cel 0.13 evaluated it
    /// to `false`, so a condition could pass.
    #[rstest]
    #[case("args.card.blocked == false")]
    #[case("!args.card.blocked")]
    #[case("!has(args.card.blocked)")]
    #[case("args.list.all(one, !one.blocked)")]
    #[case("!args.nothing.blocked")]
    #[case("!args.missing")]
    fn a_member_of_what_has_none_is_an_error(#[case] source: &str) {
        let args = json!({"card": "4111", "list": ["a"], "nothing": null});
        let mut context = Context::with_env(metered::env());
        context.add_variable_as_val("args", json(&args));
        assert!(Expression::compile(source).unwrap().holds(&context).is_err(), "{source}");
    }

    #[rstest]
    #[case("{'id': args.id, 'all': [args.id, 2]}", Ok(json!({"id": 7, "all": [7, 2]})))]
    #[case("'no. ' + string(args.id)", Ok(json!("no. 7")))]
    #[case("args.nothing", Err("the result is null"))]
    #[case("args.missing", Err("there is no missing"))]
    #[case("args.id.deeper", Err("it cannot be evaluated with these values"))]
    fn a_value(#[case] source: &str, #[case] expected: Result<Value, &str>) {
        let mut context = Context::with_env(metered::env());
        context.add_variable_as_val("args", json_kept(&json!({"id": 7, "nothing": null})));
        let found = Expression::compile(source).unwrap().value(&context);
        assert_eq!(found, expected.map_err(str::to_owned));
    }
}
