//! Model calls: which requests may be sent, what each may cost, and what it did cost.
//!
//! Guarantees: a request that passes has a bound before it is sent. No request passes if its cost or effect cannot be bounded from its own
//! bytes.
//! Non-goals: sending the request, counting the total of all calls ([`budget`](super::budget)), prices ([`price`](super::price)).

/// The APIs of model providers.
pub mod api;
/// OpenAI's tokenizer.
mod bpe;
/// The catalogue of models.
pub mod catalogue;
/// The tables as documentation.
pub mod docs;
/// Counts the pages and extracts the text of documents.
mod document;
/// Estimates the prompt tokens of a request before the call.
pub mod estimate;
/// The headers of model calls that are forwarded.
pub mod headers;
/// Checks the members of a request against the tables.
pub mod members;
/// The token cost of pictures.
pub mod picture;
/// Checks a request that is complete and about to be sent.
pub mod ready;
/// Bounds a request: its prompt and its output limit.
pub mod request;
/// The tables of what a request may contain.
pub mod requests;
/// Determines the charge for a call.
pub mod settle;
/// The duration of sound.
mod sound;
/// The types of the tables.
pub mod table;
/// A request as the agent wrote it.
pub mod written;

#[cfg(test)]
mod faults;

/// A number of tokens: the highest possible cost of a request, or its real cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Tokens of the prompt.
    pub prompt: i64,
    /// Tokens of all replies together.
    pub output: i64,
}

impl Bound {
    /// Returns the sum of both.
    pub fn total(self) -> i64 {
        self.prompt.saturating_add(self.output)
    }
}
