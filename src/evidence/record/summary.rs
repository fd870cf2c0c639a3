//! What a record says, for people.
//!
//! Guarantees: a summary is made of the record alone. Non-goals: escaping. Text in a summary is as the record has it.

use crate::policy::rule::Rule;

/// Whether a record is good or bad news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// Neither.
    Plain,
    /// It went well.
    Good,
    /// It needs attention, or its result is open.
    Warn,
    /// It went wrong, or was denied.
    Bad,
}

/// What a record says, in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Whether it is good or bad news.
    pub tone: Tone,
    /// One word for what was decided or what happened.
    pub word: &'static str,
    /// What it happened to.
    pub what: String,
    /// Details, or nothing.
    pub detail: String,
    /// The rules of the decision.
    pub rules: Vec<Rule>,
}

impl Summary {
    /// Returns a summary without rules.
    pub(super) fn new(tone: Tone, word: &'static str, what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { tone, word, what: what.into(), detail: detail.into(), rules: Vec::new() }
    }

    /// Adds the rules of the decision.
    pub(super) fn by(self, rules: impl IntoIterator<Item = Rule>) -> Self {
        Self { rules: rules.into_iter().collect(), ..self }
    }
}
