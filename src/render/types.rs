//! Infers the types of CEL conditions, as far as they are known before a call.
//!
//! Guarantees: A reported expression can never decide about a call, because its evaluation gives no value, or a value that is not a
//! boolean.
//!
//! Non-goals: Guesses. What the input schema leaves open can have any type, and `has()` accepts every field.

use std::collections::BTreeMap;

use cel::{
    Program,
    common::ast::{CallExpr, Expr, IdedExpr, LiteralValue, operators},
};
use serde_json::Value;

/// The fields of `task`, all strings, as the harness binds them.
const TASK: [&str; 7] = ["namespace", "name", "uid", "objective", "workflowClass", "taskClass", "principal"];
/// The fields of `usage`, all integers.
const USAGE: [&str; 4] = ["toolCalls", "tokens", "denials", "costMicros"];
/// The fields of `data`, all strings.
const DATA: [&str; 2] = ["arguments", "seen"];
/// Functions that need a string.
const ON_TEXT: [&str; 3] = ["startsWith", "endsWith", "matches"];
/// All functions of a harness: those of the `cel` crate, except `optional.…`, because `optional` is not one of Belay's variables.
const FUNCTIONS: [&str; 24] = [
    "contains",
    "size",
    "max",
    "min",
    "startsWith",
    "endsWith",
    "matches",
    "string",
    "bytes",
    "double",
    "int",
    "uint",
    "duration",
    "timestamp",
    "getFullYear",
    "getMonth",
    "getDayOfYear",
    "getDayOfMonth",
    "getDate",
    "getDayOfWeek",
    "getHours",
    "getMinutes",
    "getSeconds",
    "getMilliseconds",
];

/// A type, as far as it is known.
#[derive(Clone, Debug, PartialEq)]
enum Type {
    Any,
    Null,
    Bool,
    Number,
    Text,
    List(Box<Type>),
    /// An object with named fields. It can have other fields only if it is open.
    Object {
        fields: BTreeMap<String, Type>,
        open: bool,
    },
}

impl Type {
    fn name(&self) -> &'static str {
        match self {
            Self::Any => "anything",
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Number => "a number",
            Self::Text => "text",
            Self::List(_) => "a list",
            Self::Object { .. } => "an object",
        }
    }

    fn is_or_any(&self, wanted: &Self) -> bool {
        matches!(self, Self::Any) || self.name() == wanted.name()
    }

    fn record<'a>(names: impl IntoIterator<Item = &'a str>, of: &Self) -> Self {
        Self::Object { fields: names.into_iter().map(|name| (name.to_owned(), of.clone())).collect(), open: false }
    }

    /// Returns the type of a schema's instances.
    fn of_schema(schema: &Value, depth: usize) -> Self {
        const DEEPEST: usize = 32;
        let composed =
            ["$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "patternProperties"];
        let Some(map) =
            schema.as_object().filter(|map| depth < DEEPEST && !composed.iter().any(|key| map.contains_key(*key)))
        else {
            return Self::Any;
        };
        match map.get("type").and_then(Value::as_str) {
            Some("string") => Self::Text,
            Some("integer" | "number") => Self::Number,
            Some("boolean") => Self::Bool,
            Some("null") => Self::Null,
            Some("array") => {
                let items = map.get("items").filter(|_| !map.contains_key("prefixItems"));
                Self::List(Box::new(items.map_or(Self::Any, |items| Self::of_schema(items, depth + 1))))
            }
            Some("object") => Self::Object {
                fields: map
                    .get("properties")
                    .and_then(Value::as_object)
                    .into_iter()
                    .flatten()
                    .map(|(name, inner)| (name.clone(), Self::of_schema(inner, depth + 1)))
                    .collect(),
                open: map.get("additionalProperties") != Some(&Value::Bool(false)),
            },
            _ => Self::Any,
        }
    }
}

/// Checks whether a condition can be true for some call.
///
/// `input` is the closed schema of the arguments. The expression must have passed [`condition::check`](crate::render::condition::check).
///
/// # Errors
/// Returns what is wrong with the expression, in words that follow "found".
pub fn check(source: &str, input: &Value) -> Result<(), String> {
    let mut scope = common();
    // `results` has an entry for each tool, and contracts do not say what the tools return.
    scope.extend([("args".to_owned(), Type::of_schema(input, 0)), ("results".to_owned(), Type::Any)]);
    check_in(source, scope)
}

/// Checks whether an expression over a call and the result of a read after it can be true.
///
/// # Errors
/// See [`check`].
pub fn check_read(source: &str, input: &Value) -> Result<(), String> {
    let scope = [("args".to_owned(), Type::of_schema(input, 0)), ("result".to_owned(), Type::Any)];
    check_in(source, scope.into())
}

/// Checks whether an expression of a pack, which applies to many tools, can be true.
///
/// # Errors
/// See [`check`].
pub fn check_pack(source: &str) -> Result<(), String> {
    let mut scope = common();
    scope.extend([
        ("args".to_owned(), Type::Any),
        ("tool".to_owned(), Type::Text),
        ("effect".to_owned(), Type::Text),
        ("data".to_owned(), Type::record(DATA, &Type::Text)),
    ]);
    check_in(source, scope)
}

fn common() -> BTreeMap<String, Type> {
    BTreeMap::from([
        ("task".to_owned(), Type::record(TASK, &Type::Text)),
        ("principal".to_owned(), Type::Text),
        ("usage".to_owned(), Type::record(USAGE, &Type::Number)),
    ])
}

fn check_in(source: &str, mut scope: BTreeMap<String, Type>) -> Result<(), String> {
    let Ok(program) = Program::compile(source) else { return Ok(()) };
    match infer(program.expression(), &mut scope)? {
        Type::Any | Type::Bool => Ok(()),
        other => Err(format!("{}, which is never `true`", other.name())),
    }
}

fn infer(expression: &IdedExpr, scope: &mut BTreeMap<String, Type>) -> Result<Type, String> {
    Ok(match &expression.expr {
        Expr::Unspecified | Expr::Struct(_) => Type::Any,
        Expr::Literal(literal) => match literal {
            LiteralValue::Boolean(_) => Type::Bool,
            LiteralValue::Double(_) | LiteralValue::Int(_) | LiteralValue::UInt(_) => Type::Number,
            LiteralValue::String(_) => Type::Text,
            LiteralValue::Null => Type::Null,
            LiteralValue::Bytes(_) => Type::Any,
        },
        Expr::Ident(name) => scope.get(name).cloned().unwrap_or(Type::Any),
        Expr::Select(select) => {
            let operand = infer(&select.operand, scope)?;
            if select.test { Type::Bool } else { field(&operand, &select.field)? }
        }
        Expr::List(list) => {
            let mut items = Vec::new();
            for element in &list.elements {
                items.push(infer(element, scope)?);
            }
            let same = items.first().filter(|first| items.iter().all(|item| item == *first));
            Type::List(Box::new(same.cloned().unwrap_or(Type::Any)))
        }
        // The keys of the map may be computed.
        Expr::Map(_) => Type::Object { fields: BTreeMap::new(), open: true },
        Expr::Call(call) => call_type(call, scope)?,
        Expr::Comprehension(loop_) => {
            let range = infer(&loop_.iter_range, scope)?;
            let (item, second) = match range {
                Type::List(item) if loop_.iter_var2.is_none() => (*item, Type::Any),
                Type::Object { .. } if loop_.iter_var2.is_none() => (Type::Text, Type::Any),
                Type::Bool | Type::Number | Type::Text | Type::Null => {
                    return Err(format!("a loop over {}, where only lists and objects have items", range.name()));
                }
                _ => (Type::Any, Type::Any),
            };
            let accumulator = infer(&loop_.accu_init, scope)?;
            let mut inner = scope.clone();
            inner.insert(loop_.iter_var.clone(), item);
            inner.extend(loop_.iter_var2.clone().map(|name| (name, second)));
            // `map` and `filter` fill a list that is empty at first.
            let accumulator =
                if matches!(accumulator, Type::List(_)) { Type::List(Box::new(Type::Any)) } else { accumulator };
            inner.insert(loop_.accu_var.clone(), accumulator);
            infer(&loop_.loop_cond, &mut inner)?;
            infer(&loop_.loop_step, &mut inner)?;
            infer(&loop_.result, &mut inner)?
        }
    })
}

fn field(of: &Type, name: &str) -> Result<Type, String> {
    match of {
        Type::Any => Ok(Type::Any),
        Type::Object { fields, open } => match fields.get(name) {
            Some(found) => Ok(found.clone()),
            None if *open => Ok(Type::Any),
            None => {
                let known: Vec<_> = fields.keys().map(|name| format!("`{name}`")).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                Err(format!("`{name}`, which does not exist; there is {known}"))
            }
        },
        other => Err(format!("`.{name}` of {}, which has no fields", other.name())),
    }
}

fn call_type(call: &CallExpr, scope: &mut BTreeMap<String, Type>) -> Result<Type, String> {
    use operators as op;
    let target = match &call.target {
        Some(target) => Some(infer(target, scope)?),
        None => None,
    };
    let mut args = Vec::new();
    for arg in &call.args {
        args.push(infer(arg, scope)?);
    }
    let all = |wanted: &Type, args: &[Type], what: &str| match args.iter().find(|arg| !arg.is_or_any(wanted)) {
        Some(other) => Err(format!("`{what}` of {}, which takes {}", other.name(), wanted.name())),
        None => Ok(()),
    };
    let sign = |name: &str| name.trim_matches(|c: char| c == '_').trim_start_matches('@').to_owned();
    let name = call.func_name.as_str();
    Ok(match (name, args.as_slice()) {
        (op::LOGICAL_AND | op::LOGICAL_OR | op::LOGICAL_NOT, args) => {
            all(&Type::Bool, args, &sign(name))?;
            Type::Bool
        }
        (op::NOT_STRICTLY_FALSE, _) => Type::Bool,
        (op::EQUALS | op::NOT_EQUALS, [left, right]) => {
            let comparable =
                left.is_or_any(right) || matches!((left, right), (_, Type::Any | Type::Null) | (Type::Null, _));
            if !comparable {
                return Err(format!("{} compared with {}, which never are the same", left.name(), right.name()));
            }
            Type::Bool
        }
        (op::LESS | op::LESS_EQUALS | op::GREATER | op::GREATER_EQUALS, [left, right]) => {
            if !left.is_or_any(right) && !matches!(right, Type::Any) {
                return Err(format!("`{}` between {} and {}", sign(name), left.name(), right.name()));
            }
            Type::Bool
        }
        (op::SUBSTRACT | op::MULTIPLY | op::DIVIDE | op::MODULO | op::NEGATE, args) => {
            // Timestamps and durations can also be subtracted, but no known value has such a type.
            all(&Type::Number, args, &sign(name))?;
            if args.contains(&Type::Any) { Type::Any } else { Type::Number }
        }
        (op::ADD, [left, right]) => match (left, right) {
            (Type::Any, _) | (_, Type::Any) => Type::Any,
            (Type::Number, Type::Number) => Type::Number,
            (Type::Text, Type::Text) => Type::Text,
            (Type::List(one), Type::List(other)) => {
                Type::List(Box::new(if one == other { (**one).clone() } else { Type::Any }))
            }
            (left, right) => return Err(format!("`+` between {} and {}", left.name(), right.name())),
        },
        (op::CONDITIONAL, [condition, then, otherwise]) => {
            all(&Type::Bool, std::slice::from_ref(condition), "?")?;
            if then == otherwise { then.clone() } else { Type::Any }
        }
        (op::IN, [_, within]) => match within {
            Type::Any | Type::List(_) | Type::Object { .. } => Type::Bool,
            other => return Err(format!("`in` {}, which takes a list or an object", other.name())),
        },
        (op::INDEX, [of, index]) => match (of, index) {
            (Type::List(item), _) => (**item).clone(),
            (Type::Object { .. } | Type::Any, _) => match call.args.get(1).map(|arg| &arg.expr) {
                Some(Expr::Literal(LiteralValue::String(key))) => field(of, key.inner())?,
                _ => Type::Any,
            },
            (other, _) => return Err(format!("`[…]` of {}, which has no items", other.name())),
        },
        ("size", args) => {
            if let Some(of @ (Type::Number | Type::Bool | Type::Null)) = target.as_ref().or(args.first()) {
                return Err(format!("`size` of {}", of.name()));
            }
            Type::Number
        }
        ("contains", _) => Type::Bool,
        ("string", _) => Type::Text,
        ("int" | "double" | "uint", _) => Type::Number,
        (name, args) if ON_TEXT.contains(&name) => {
            all(&Type::Text, target.as_slice(), name)?;
            all(&Type::Text, args, name)?;
            Type::Bool
        }
        (name, _) if !known(name) => {
            return Err(format!("a function `{name}`, which does not exist"));
        }
        _ => Type::Any,
    })
}

fn known(function: &str) -> bool {
    // Operators have names such as `_[?_]`.
    FUNCTIONS.contains(&function) || function.contains(['_', '@', '?'])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn input() -> Value {
        crate::render::schema::close(&json!({
            "type": "object",
            "properties": {
                "path": {"type": "string"}, "count": {"type": "integer"}, "force": {"type": "boolean"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "open": {"type": "object"}, "any": {}, "either": {"type": ["string", "integer"]},
                "inner": {"type": "object", "properties": {"a": {"type": "string"}}}
            }
        }))
        .unwrap()
    }

    #[rstest::rstest]
    #[case("args.path.startsWith('/logs/') && !args.force")]
    #[case("args.count < 5 && args.count + usage.tokens > 3 || args.count == 2.5")]
    #[case("args.tags.all(t, t.size() < 3) && args.tags.exists(t, t == 'x') && 'a' in args.tags")]
    #[case("args.tags.map(t, t + '!').filter(t, t != 'x').size() == 1")]
    #[case("args.open.whatever == 1 && args.any.more > 2 && args.either == 'x' && args.either == 1")]
    #[case("has(args.nothing) ? args.force : true")]
    #[case("task.namespace == 'x' && principal.endsWith('.test') && args.inner.a == 'y' && args['path'] == 'z'")]
    #[case("args.path.contains('a') && args.path.matches('^a') && size(args.tags) > 0 && int(args.path) == 1")]
    #[case("args.any == null && (args.force ? 1 : 2) == 2 && -args.count < 0 && args.tags[0] == 'x'")]
    #[case("args.tags.exists_one(t, t == 'x') && {'a': 1}['a'] == 1")]
    #[case("timestamp('2026-01-01T00:00:00Z') < timestamp('2027-01-01T00:00:00Z')")]
    fn accepts(#[case] source: &str) {
        assert_eq!(crate::render::condition::check(source), Ok(()), "{source}");
        assert_eq!(check(source, &input()), Ok(()), "{source}");
    }

    #[rstest::rstest]
    #[case("args.pth == 'x'", "`pth`, which does not exist")]
    #[case("args.inner.b == 'x'", "`b`, which does not exist")]
    #[case("args['pth'] == 'x'", "`pth`, which does not exist")]
    #[case("usage.calls < 3", "`toolCalls`")]
    #[case("task.owner == 'x'", "`owner`, which does not exist")]
    #[case("args.count == '5'", "a number compared with text")]
    #[case("args.path < 5", "`<` between text and a number")]
    #[case("args.path", "text, which is never `true`")]
    #[case("args.count + 1", "a number, which is never `true`")]
    #[case("args.path && true", "`&&` of text")]
    #[case("!args.count", "`!` of a number")]
    #[case("args.count.startsWith('1')", "`startsWith` of a number")]
    #[case("args.path.starts('1')", "a function `starts`")]
    #[case("lower(args.path) == 'x'", "a function `lower`")]
    #[case("args.path.all(c, true)", "a loop over text")]
    #[case("args.tags.all(t, t > 3)", "`>` between text and a number")]
    #[case("'x' in args.path", "`in` text")]
    #[case("args.count.size() == 1", "`size` of a number")]
    #[case("args.path + 1 == 'x'", "`+` between text and a number")]
    #[case("principal.name == 'x'", "`.name` of text")]
    fn refuses(#[case] source: &str, #[case] word: &str) {
        assert_eq!(crate::render::condition::check(source), Ok(()), "{source}");
        let found = check(source, &input()).unwrap_err();
        assert!(found.contains(word), "{source}: {found}");
    }
}
