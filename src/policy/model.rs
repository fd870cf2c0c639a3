//! Model calls: which requests may leave, what each may cost, and what it did cost.
//!
//! Guarantees: a request that passes is bounded before it leaves, and none passes whose cost or effect cannot be bounded from its own bytes.
//! Non-goals: sending it, counting what all calls together have spent ([`budget`](super::budget)), prices ([`price`](super::price)).

/// The APIs of models.
pub mod api;
/// OpenAI's tokenizer.
mod bpe;
/// What is known of well-known models.
pub mod catalogue;
/// The tables as people read them.
pub mod docs;
/// Pages and texts of documents.
mod document;
/// Prompt tokens of a request, before its provider counts them.
pub mod estimate;
/// Headers of calls.
pub mod headers;
/// What of a request may leave.
pub mod members;
/// What pictures cost.
pub mod picture;
/// A request that is about to be sent.
pub mod ready;
/// The bound of a request, and what makes it hold.
pub mod request;
/// What may be in a request.
pub mod requests;
/// What a call is charged.
pub mod settle;
/// How long sound is.
mod sound;
/// The form of the tables.
pub mod table;
/// A request as the agent wrote it.
pub mod written;

#[cfg(test)]
mod faults;

/// Tokens: what a request may cost at most, or what it did cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Of the prompt.
    pub prompt: i64,
    /// Of all replies together.
    pub output: i64,
}

impl Bound {
    /// All of them.
    pub fn total(self) -> i64 {
        self.prompt.saturating_add(self.output)
    }
}
