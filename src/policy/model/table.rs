//! The form of the tables: what may be written of a request, as plain data.
//!
//! Guarantees: what a table does not name is not known. Non-goals: what is in the tables ([`requests`](super::requests)), and walking a request by
//! them ([`members`](super::members)).

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
            /// Every one.
            pub const ALL: &[Capability] = &[$(Capability::$variant),+];

            /// The name in packs.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $id),+ }
            }

            /// What the provider does.
            pub fn does(self) -> &'static str {
                match self { $(Self::$variant => $does),+ }
            }
        }
    };
}

capabilities! {
    Advisor = "advisor": "It asks another model.",
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
    Stored = "stored": "It continues from what it stored of earlier calls, or stores this call for others than its caller.",
    ToolSearch = "tool_search": "It searches the tools of the request in steps of its own.",
    WebFetch = "web_fetch": "It fetches pages.",
    WebSearch = "web_search": "It searches the web.",
}

/// What becomes of a member, a part or a tool.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// It passes, if it has this form.
    Passes(Of),
    /// It passes, if it has this form, and is bounded by this.
    Bounded(Of, &'static str),
    /// No pack lets it pass, and this is why and what to do.
    Refused(&'static str),
    /// It passes where the pack allows it by name, whatever is in it; and this is what to do otherwise.
    Named(Capability, &'static str),
}

/// What a value is made of. `null` passes for each: it is as good as nothing.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// A text, a number, `true`, `false`, or a list of those.
    Plain,
    /// Anything: it is data to the model, such as a JSON Schema, or to whoever reads the provider's logs.
    Data,
    /// `false` passes; `true` is this.
    Switch(&'static Fate),
    /// One of these words passes; any other is this.
    Words(&'static [&'static str], &'static Fate),
    /// A URL that the provider fetches, or one that has all in it (`data:`).
    Url,
    /// What is sent in the request itself: bytes in base64, or a `data:` URL. A URL to be fetched counts as one, since some servers fetch it.
    Inline,
    /// An object with these members.
    Object(&'static Shape),
    /// An object, by what it is.
    Kinds(&'static Kinds),
    /// A list of those.
    List(&'static Of),
    /// The first that fits, by whether the value is an object, a list or neither.
    Either(&'static [Of]),
}

/// An object.
#[derive(Debug)]
pub struct Shape {
    /// What it is, in words.
    pub is: &'static str,
    /// What becomes of its members.
    pub rows: &'static [Row],
    /// A member that has to be there, and what becomes of an object without.
    pub needs: Option<(&'static str, Fate)>,
}

/// Members that share a fate.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Their names, with spaces between.
    pub names: &'static str,
    /// What becomes of them.
    pub fate: Fate,
}

/// Objects that say what they are.
#[derive(Debug)]
pub struct Kinds {
    /// What they are, in words.
    pub are: &'static str,
    /// Each, by its `type`: names with spaces between, or beginnings and `*`.
    pub rows: &'static [Row],
    /// Those that do not say it: by a member that they have.
    pub untyped: &'static [Row],
}

impl Row {
    /// Whether the row is for it.
    fn is_for(&self, name: &str) -> bool {
        self.names.split_ascii_whitespace().any(|known| match known.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => known == name,
        })
    }
}

/// The row of a name.
pub fn row(rows: &'static [Row], name: &str) -> Option<&'static Row> {
    rows.iter().find(|row| row.is_for(name))
}
