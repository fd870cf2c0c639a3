//! The types of the tables that describe what a request may contain, as plain data.
//!
//! Guarantees: what a table does not name is unknown.
//! Non-goals: the contents of the tables ([`requests`](super::requests)), and checking a request against them
//! ([`members`](super::members)).

use serde::{Deserialize, Serialize};

macro_rules! capabilities {
    ($($(#[$doc:meta])* $variant:ident = $id:literal: $does:literal),+ $(,)?) => {
        /// What a provider can be made to do besides answering. A pack allows each by its name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
        pub enum Capability {
            $(#[doc = $does] #[serde(rename = $id)] $variant,)+
        }

        impl Capability {
            /// All capabilities.
            pub const ALL: &[Capability] = &[$(Capability::$variant),+];

            /// Returns the name that packs use.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $id),+ }
            }

            /// Returns a description of what the provider does.
            pub fn does(self) -> &'static str {
                match self { $(Self::$variant => $does),+ }
            }
        }
    };
}

capabilities! {
    Advisor = "advisor": "It calls another model.",
    Background = "background": "It continues after it has answered the call, and its later reply does not pass through Belay.",
    CodeExecution = "code_execution": "It runs code in a container of its own.",
    Compaction = "compaction": "It shortens the conversation with a model, and stores the result in a form that only it can read.",
    DataSources = "data_sources": "It reads from databases and plugins that it is connected to.",
    Fallbacks = "fallbacks": "It answers with another model than the request names, at another price.",
    FileSearch = "file_search": "It searches files that it stores.",
    Files = "files": "It reads files that it stores, by their ids.",
    HostedShell = "hosted_shell": "It runs a shell in a container of its own.",
    ImageGeneration = "image_generation": "It makes pictures.",
    Mcp = "mcp": "It calls MCP servers and connectors, without any contract.",
    Stored = "stored": "It continues from earlier calls that it stored, or stores this call so that others can read it.",
    ToolSearch = "tool_search": "It searches the tools of the request in steps of its own.",
    WebFetch = "web_fetch": "It fetches pages.",
    WebSearch = "web_search": "It searches the web.",
}

/// How a member, a part or a tool is handled.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// It passes if it has this form.
    Passes(Of),
    /// It passes if it has this form, and Belay bounds it as the text says.
    Bounded(Of, &'static str),
    /// It is denied, whatever the pack says. The text says why and what to do.
    Refused(&'static str),
    /// It passes with any content if the pack allows it by name. The text says what to do otherwise.
    Named(Capability, &'static str),
}

/// The form of a value. `null` matches every form, because it is as good as absent.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// A text, a number, `true`, `false`, or a list of those.
    Plain,
    /// Any value. It is data for the model, such as a JSON Schema, or for the reader of the provider's logs.
    Data,
    /// A boolean. `false` passes, and `true` has this fate.
    Switch(&'static Fate),
    /// A text. These words pass, and any other text has this fate.
    Words(&'static [&'static str], &'static Fate),
    /// A URL that the provider fetches, or a `data:` URL.
    Url,
    /// Content that is sent in the request itself: bytes in base64, or a `data:` URL. Any other URL is checked like [`Of::Url`], because
    /// some servers fetch it.
    Inline,
    /// An object with the members of a shape.
    Object(&'static Shape),
    /// An object with a type.
    Kinds(&'static Kinds),
    /// A list whose items have this form.
    List(&'static Of),
    /// The first form that matches the JSON type of the value.
    Either(&'static [Of]),
}

/// An object and its members.
#[derive(Debug)]
pub struct Shape {
    /// What the object is, in words.
    pub is: &'static str,
    /// How its members are handled.
    pub rows: &'static [Row],
    /// A required member, and how an object without it is handled.
    pub needs: Option<(&'static str, Fate)>,
}

/// Members that are handled alike.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The names, separated by spaces, or prefixes with `*`.
    pub names: &'static str,
    /// How they are handled.
    pub fate: Fate,
}

/// Objects that name their type.
#[derive(Debug)]
pub struct Kinds {
    /// What the objects are, in words.
    pub are: &'static str,
    /// Rows by the object's `type`: names separated by spaces, or prefixes with `*`.
    pub rows: &'static [Row],
    /// Rows for objects without a type, by a member that they have.
    pub untyped: &'static [Row],
}

impl Row {
    /// Returns whether the row covers a name.
    fn is_for(&self, name: &str) -> bool {
        self.names.split_ascii_whitespace().any(|known| match known.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => known == name,
        })
    }
}

/// Returns the row that covers a name.
pub fn row(rows: &'static [Row], name: &str) -> Option<&'static Row> {
    rows.iter().find(|row| row.is_for(name))
}
