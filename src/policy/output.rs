//! Checks results of tools against the output schemas of their contracts.
//!
//! Guarantees: the whole JSON of a result is checked, by JSON Schema draft 2020-12. The reason of a misfit does not repeat the result,
//! because the agent must not read it.
//! Rejects: results that are not JSON if the contract has a schema.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    config::Tool,
    cost,
    shape::{Misfit, Shape},
};

/// An error of an invalid output schema. The operator rejects such a task. A harness with such a schema does not start.
#[derive(Debug, thiserror::Error)]
#[error("tool {tool}: output is not a JSON Schema: {reason}")]
pub struct OutputError {
    /// The tool.
    tool: String,
    /// The reason.
    reason: String,
}

/// The output schemas of a task's tools, compiled.
#[derive(Default)]
pub struct Outputs(BTreeMap<String, Shape>);

impl Outputs {
    /// Compiles the output schemas of these tools.
    ///
    /// # Errors
    /// Returns an error if a schema is not a JSON Schema.
    pub fn compile(tools: &[Tool]) -> Result<Self, OutputError> {
        let schemas = tools.iter().filter_map(|tool| Some((&tool.name, tool.output.as_ref()?)));
        let compile = |(name, schema): (&String, &Value)| match Shape::compile(schema) {
            Ok(shape) => Ok((name.clone(), shape)),
            Err(reason) => Err(OutputError { tool: name.clone(), reason }),
        };
        schemas.map(compile).collect::<Result<_, _>>().map(Self)
    }

    /// Returns whether results of this many bytes are checked in microseconds.
    pub fn is_bounded_cost(&self, tool: &Tool, length: usize) -> bool {
        tool.output.as_ref().is_none_or(|schema| length <= cost::SHORT && cost::schema(schema))
    }

    /// Returns whether the tool's contract has an output schema.
    pub fn has(&self, tool: &str) -> bool {
        self.0.contains_key(tool)
    }

    /// Checks whether a result fits. Every result of a tool without a schema fits.
    ///
    /// # Errors
    /// Returns where the result does not fit, by the place in the schema, or that the check exceeded its allowance.
    pub fn check(&self, tool: &str, result: &Value) -> Result<(), String> {
        let Some(schema) = self.0.get(tool) else { return Ok(()) };
        schema.check(result).map_err(|misfit| match misfit {
            // The place in the schema is the contract author's own text. The place in the result may contain keys of the result.
            Misfit::At { schema, .. } => format!("it does not fit {schema} of the contract's output schema"),
            Misfit::Exceeded(exceeded) => {
                format!("it cannot be checked against the contract's output schema: {exceeded}")
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
