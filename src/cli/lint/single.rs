//! Checks one object by itself: its version, its schema and its type.
//!
//! Guarantees: what the API server rejects is found. An object of another project is left alone.
//!
//! Non-goals: what follows from other objects.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    diagnostic::Severity,
    found::Found,
    object::{Entry, Object, Typed},
    schema::{Kind, nearest},
};
use crate::render::Finding;

impl Found<'_> {
    /// Checks one object of Belay by itself. Returns `None` for an object of another group.
    pub(super) fn object<'n>(
        &mut self,
        kinds: &[Kind],
        entry: Entry<'n>,
        set: Option<&str>,
        default: &str,
    ) -> Option<Object<'n>> {
        let node = entry.node;
        let version = node.text("apiVersion").unwrap_or_default();
        let name = node.text("kind").unwrap_or_default();
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name.as_str()).collect();
        let kind = kinds.iter().find(|kind| kind.name == name);
        let group = version.split('/').next().unwrap_or_default();
        let Some(kind) = kind.filter(|kind| kind.api_version == version) else {
            let ours = kinds.first().map(|kind| kind.api_version.as_str()).unwrap_or_default();
            let our_group = ours.split('/').next().unwrap_or_default();
            let quoted = |text: &str| if text.is_empty() { "nothing".to_owned() } else { format!("`{text}`") };
            let finding = if kind.is_some() {
                let mend = "use this version; the document is not checked any further";
                Finding::new("apiVersion", format!("`{ours}`, the version of {name}"), quoted(version), mend)
            } else if group == our_group {
                let mend = nearest(name, &names)
                    .map_or_else(|| "choose one of them".to_owned(), |near| format!("write `{near}`"));
                Finding::new("kind", format!("one of {}", names.join(", ")), quoted(name), mend)
            } else {
                return None;
            };
            // Another project may have a kind of that name in a group that does not resemble Belay's.
            let stranger = kind.is_some() && !group.is_empty() && nearest(group, &[our_group]).is_none();
            let severity = if stranger { Severity::Warning } else { Severity::Error };
            self.add_at_field(&entry, severity, finding);
            return None;
        };
        for (place, field) in node.boolean_keys() {
            let finding = Finding::new(
                field,
                "a name",
                "a word that YAML takes for a boolean, such as `y` or `on`",
                "put it in quotes",
            );
            self.add(&entry, place, Severity::Error, finding);
        }
        let mut value = node.value();
        for (place, finding) in kind.check(node, &value) {
            self.add(&entry, place, Severity::Error, finding);
        }
        let metadata = node.get("metadata");
        let own = metadata.and_then(|metadata| metadata.text("namespace"));
        let clustered = name == "PolicyPack";
        let namespace = if clustered { "" } else { set.or(own).unwrap_or(default) }.to_owned();
        if !clustered && let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("namespace".into(), namespace.as_str().into());
        }
        let object_name = metadata.and_then(|metadata| metadata.text("name")).unwrap_or_default().to_owned();
        let typed = match name {
            "AgentTask" => self.typed(&entry, value).map(|task| Typed::Task(Box::new(task))),
            "ToolContract" => self.typed(&entry, value).map(|contract| Typed::Contract(Box::new(contract))),
            _ => self.typed(&entry, value).map(|pack| Typed::Pack(Box::new(pack))),
        };
        Some(Object { entry, kind: name.to_owned(), namespace, name: object_name, typed })
    }

    /// Deserializes an object to its type. A failure is reported only if the schema check has not reported why.
    fn typed<T: DeserializeOwned>(&mut self, entry: &Entry<'_>, value: Value) -> Option<T> {
        let error = match serde_json::from_value(value) {
            Ok(typed) => return Some(typed),
            Err(error) => error,
        };
        if !self.taken.iter().any(|(file, at, _)| (*file, *at) == (entry.file, entry.node.at)) {
            let finding = Finding::new(
                "the object",
                "an object that this version of Belay can read",
                error.to_string(),
                "correct it",
            );
            self.add_at_field(entry, Severity::Error, finding);
        }
        None
    }
}
