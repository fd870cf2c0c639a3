//! Reads the tools that an MCP server lists.
//!
//! Guarantees: a tool that cannot be read takes away only itself, with the reason. A name that is listed twice has no tool, because a call
//! by that name could mean either.
//!
//! Non-goals: whether a definition is approved, see [`definition`](crate::policy::definition).

use std::collections::HashMap;

use rmcp::model::Tool;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::policy::shorten::shorten;

/// The members of a tool that decisions depend on. A wrong value of another member, such as an icon, does not matter.
const MEMBERS: [&str; 6] = ["name", "title", "description", "inputSchema", "outputSchema", "annotations"];

/// A tool that is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Odd {
    /// Its name, empty if it has none.
    pub name: String,
    /// What was expected, and what was found.
    pub reason: String,
}

/// Separates the tools of a list from those that cannot be read.
pub fn sort(tools: Vec<Value>) -> (Vec<Tool>, Vec<Odd>) {
    let (mut read, mut odd) = (Vec::new(), Vec::new());
    for tool in tools {
        match self::tool(&tool) {
            Ok(tool) => read.push(tool),
            Err(left_out) => odd.push(left_out),
        }
    }
    (read, odd)
}

fn tool(tool: &Value) -> Result<Tool, Odd> {
    if let Ok(tool) = Tool::deserialize(tool) {
        return Ok(tool);
    }
    let members = tool.as_object().map(|members| {
        let needed = members.iter().filter(|(name, _)| MEMBERS.contains(&name.as_str()));
        needed.map(|(name, value)| (name.clone(), value.clone())).collect::<Map<_, _>>()
    });
    Tool::deserialize(Value::Object(members.unwrap_or_default())).map_err(|error| {
        let name = tool.get("name").and_then(Value::as_str).unwrap_or_default();
        Odd {
            name: name.to_owned(),
            reason: format!("expected a tool of MCP, found another value: {}", whats_wrong(tool, &error)),
        }
    })
}

/// Says what is wrong with a tool.
fn whats_wrong(tool: &Value, error: &serde_json::Error) -> String {
    let is = |name: &str, fits: fn(&Value) -> bool| tool.get(name).is_none_or(|value| value.is_null() || fits(value));
    let texts = ["title", "description"];
    if let Some(name) = texts.into_iter().find(|name| !is(name, Value::is_string)) {
        return format!("`{name}` is not a text");
    }
    match tool.get("inputSchema") {
        None | Some(Value::Null) => return "there is no `inputSchema`".to_owned(),
        Some(schema) if !schema.is_object() => return "`inputSchema` is not an object".to_owned(),
        Some(_) => {}
    }
    if !is("outputSchema", Value::is_object) {
        return "`outputSchema` is not an object".to_owned();
    }
    let hints = tool.get("annotations").and_then(Value::as_object);
    let wrong = hints.and_then(|hints| hints.iter().find(|(name, hint)| name.ends_with("Hint") && !hint.is_boolean()));
    match wrong {
        Some((name, _)) => format!("`annotations.{}` is neither true nor false", shorten(name)),
        None => shorten(&error.to_string()),
    }
}

/// The tools of all pages of a list.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    tools: Vec<Tool>,
    /// Why a name has no tool.
    odd: Vec<Odd>,
    /// The number of times that each name was listed.
    names: HashMap<String, usize>,
}

impl Catalogue {
    /// Adds a page.
    pub fn extend(&mut self, tools: Vec<Tool>, odd: Vec<Odd>) {
        for name in tools.iter().map(|tool| tool.name.as_ref()).chain(odd.iter().map(|odd| odd.name.as_str())) {
            let listed = self.names.entry(name.to_owned()).or_default();
            *listed = listed.saturating_add(1);
        }
        self.tools.extend(tools);
        self.odd.extend(odd);
    }

    /// Returns the number of tools that were listed.
    pub fn len(&self) -> usize {
        self.tools.len().saturating_add(self.odd.len())
    }

    /// Returns whether no tool was listed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the tools in the order of the list, and those that are left out.
    pub fn finish(self) -> (Vec<Tool>, Vec<Odd>) {
        let Self { tools, mut odd, names } = self;
        let times = |name: &str| names.get(name).copied().unwrap_or_default();
        let mut twice: Vec<String> = Vec::new();
        let mut kept = Vec::new();
        for tool in tools {
            if times(&tool.name) == 1 {
                kept.push(tool);
            } else if !twice.iter().any(|name| *name == tool.name) {
                twice.push(tool.name.into_owned());
            }
        }
        odd.extend(twice.into_iter().map(|name| Odd {
            reason: format!(
                "expected each name once, found this name {} times: a call could mean either",
                times(&name)
            ),
            name,
        }));
        (kept, odd)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn good(name: &str) -> Value {
        json!({"name": name, "inputSchema": {"type": "object"}})
    }

    #[rstest]
    #[case::no_schema(json!({"name": "other"}), Some("no `inputSchema`"))]
    #[case::a_schema_that_is_none(json!({"name": "other", "inputSchema": true}), Some("`inputSchema` is not an object"))]
    #[case::a_hint_in_words(json!({"name": "other", "inputSchema": {}, "annotations": {"readOnlyHint": "yes"}}), Some("`annotations.readOnlyHint` is neither true nor false"))]
    #[case::a_number_as_description(json!({"name": "other", "inputSchema": {}, "description": 1}), Some("`description` is not a text"))]
    #[case::no_object(json!("other"), Some("no `inputSchema`"))]
    #[case::no_name(json!({"inputSchema": {}}), Some("name"))]
    #[case::an_odd_icon(json!({"name": "other", "inputSchema": {}, "icons": 1}), None)]
    #[case::odd_metadata(json!({"name": "other", "inputSchema": {}, "_meta": 1}), None)]
    #[case::unknown_members(json!({"name": "other", "inputSchema": {}, "x": 1, "annotations": {"x": 1}}), None)]
    fn an_odd_tool_takes_away_only_itself(#[case] other: Value, #[case] expected: Option<&str>) {
        let (tools, odd) = sort(vec![good("first"), other, good("last")]);
        let names: Vec<_> = tools.iter().map(|tool| tool.name.as_ref()).collect();
        match expected {
            None => assert_eq!((names, odd), (vec!["first", "other", "last"], vec![])),
            Some(words) => {
                assert_eq!((names, odd.len()), (vec!["first", "last"], 1));
                assert!(odd[0].reason.contains(words), "{odd:?}");
            }
        }
    }

    /// The same name on two pages, read or not.
    #[rstest]
    #[case::both(vec![good("a"), good("b")], vec![good("a")])]
    #[case::one_is_odd(vec![good("a"), good("b")], vec![json!({"name": "a"})])]
    #[case::thrice(vec![good("a"), good("a"), good("b")], vec![good("a")])]
    fn a_name_that_is_listed_twice_has_no_tool(#[case] first: Vec<Value>, #[case] second: Vec<Value>) {
        let mut all = Catalogue::default();
        for page in [first, second] {
            let (tools, odd) = sort(page);
            all.extend(tools, odd);
        }
        let (tools, odd) = all.finish();
        assert_eq!(tools.iter().map(|tool| tool.name.as_ref()).collect::<Vec<_>>(), ["b"]);
        assert!(odd.iter().any(|odd| odd.name == "a" && odd.reason.contains("times")), "{odd:?}");
    }
}
