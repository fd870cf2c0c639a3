//! Results of tools, against their contracts' output schemas.
//!
//! Promises: what is compared is the result's JSON, whole, by JSON Schema draft 2020-12; why it does not fit is said without
//! repeating it, as an agent must not read it. Refuses: results that are no JSON where a contract has a schema.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    config::Tool,
    quick,
    shape::{Misfit, Shape},
};

/// An output schema that is none. The operator refuses such a task; a harness that meets one does not start.
#[derive(Debug, thiserror::Error)]
#[error("tool {tool}: output is not a JSON Schema: {reason}")]
pub struct OutputError {
    /// The tool.
    tool: String,
    /// Why not.
    reason: String,
}

/// The output schemas of a task's tools, compiled.
#[derive(Default)]
pub struct Outputs(BTreeMap<String, Shape>);

impl Outputs {
    /// Compiles them.
    ///
    /// # Errors
    /// If one is not a JSON Schema.
    pub fn compile(tools: &[Tool]) -> Result<Self, OutputError> {
        let schemas = tools.iter().filter_map(|tool| Some((&tool.name, tool.output.as_ref()?)));
        let compile = |(name, schema): (&String, &Value)| match Shape::compile(schema) {
            Ok(shape) => Ok((name.clone(), shape)),
            Err(reason) => Err(OutputError { tool: name.clone(), reason }),
        };
        schemas.map(compile).collect::<Result<_, _>>().map(Self)
    }

    /// Whether results of so many bytes are compared in microseconds.
    pub fn is_quick(&self, tool: &Tool, length: usize) -> bool {
        tool.output.as_ref().is_none_or(|schema| length <= quick::SHORT && quick::schema(schema))
    }

    /// Whether the tool's contract has a schema.
    pub fn has(&self, tool: &str) -> bool {
        self.0.contains_key(tool)
    }

    /// Whether a result fits. One of a tool without a schema does.
    ///
    /// # Errors
    /// Where it does not fit, and what was expected there.
    pub fn check(&self, tool: &str, result: &Value) -> Result<(), String> {
        let Some(schema) = self.0.get(tool) else { return Ok(()) };
        schema.check(result).map_err(|misfit| match misfit {
            // The keyword's place is the contract author's own text; the instance's place may hold keys of the result.
            Misfit::At { schema, .. } => format!("it does not fit {schema} of the contract's output schema"),
            Misfit::Exceeded(exceeded) => {
                format!("whether it fits the contract's output schema cannot be told: {exceeded}")
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::policy::decide::tests::policy as small;

    #[test]
    fn what_does_not_fit_is_named_and_not_repeated() {
        let tool = Tool {
            name: "t".into(),
            output: Some(json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})),
            ..small(vec![]).tools.remove(0)
        };
        let outputs = Outputs::compile(std::slice::from_ref(&tool)).unwrap();
        assert_eq!(outputs.check("t", &json!({"n": 1, "more": true})), Ok(()));
        let error = outputs.check("t", &json!({"n": "secret"})).unwrap_err();
        assert_eq!(error, "it does not fit /properties/n/type of the contract's output schema");
        assert!(outputs.check("t", &json!([])).is_err());
        assert!(outputs.has("t") && !outputs.has("u"));
        assert_eq!(outputs.check("u", &json!(7)), Ok(()));
        assert!(Outputs::compile(&[Tool { output: Some(json!({"type": 7})), ..tool }]).is_err());
    }
}
