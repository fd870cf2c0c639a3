//! What a reply of an MCP server says about the effect of a call.
//!
//! Guarantees: everything here is a pure function over plain data. A reply that proves that the server did not run the tool means *not
//! applied*. A reply that proves that the server ran the tool means *applied*. Everything else means *unknown*. Only a call that certainly
//! did not run may be sent once more. The table in `docs/tool-contracts.md` has the same rows, and a test compares the two.
//!
//! Non-goals: reading a reply, see [`answer`](super::answer).

use crate::evidence::record::CallOutcome;

/// The JSON-RPC errors that a server returns before it runs a method: the message is not JSON, is no request, names an unknown method, or
/// has parameters that the method does not take.
const REFUSALS: [i64; 4] = [-32700, -32600, -32601, -32602];
/// The JSON-RPC error of a server that failed at an unknown point of its work.
const INTERNAL_ERROR: i64 = -32603;

/// The answer in the body of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A JSON-RPC result for the request.
    Result(Finish),
    /// A JSON-RPC error.
    Error {
        /// The error's code.
        code: i64,
        /// Whether the error has the request's id. Servers that do not read a request answer with `null` or a word in its place.
        has_id: bool,
        /// Whether the error is about the session.
        about_session: bool,
    },
    /// Something that is no JSON-RPC answer.
    Other {
        /// Whether the text is about the session.
        about_session: bool,
    },
    /// No body.
    Nothing,
}

/// How a result ends a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    /// The tool ran.
    Success,
    /// The tool ran and reports an error.
    Error,
    /// The server has not finished: it asks for input or refers to a task.
    Unfinished,
}

/// A kind of reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// A result.
    Result,
    /// A result with `isError`.
    ToolError,
    /// A result that asks for more.
    Unfinished,
    /// A JSON-RPC error of [`REFUSALS`].
    Refused,
    /// Another JSON-RPC error.
    Failed,
    /// The server has forgotten the session.
    SessionLost,
    /// Another HTTP 4xx.
    NotTaken,
    /// An HTTP 4xx that proxies also send while the server is at work.
    GivenUp,
    /// A redirect that says that the resource is elsewhere.
    Moved,
    /// A redirect that can follow a request that was served.
    SeeOther,
    /// An HTTP 5xx.
    ServerError,
    /// A success without an answer.
    NoAnswer,
    /// A body that is no answer.
    Unreadable,
    /// A reply that ended early.
    BrokeOff,
    /// A reply that is longer than the contract allows.
    TooLong,
    /// A reply that repeats the credential of the request.
    Withheld,
    /// No reply in time.
    Late,
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meaning {
    /// The kind of reply, in the words of the documentation.
    pub(super) words: &'static str,
    /// What became of the call.
    pub(super) outcome: CallOutcome,
    /// What Belay does next.
    pub(super) next: Next,
}

/// What Belay does with a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The agent gets the result.
    Pass,
    /// The agent gets the result, and the call cannot be compensated.
    PassAlone,
    /// The agent gets the reason.
    Tell,
    /// The agent gets the reason, and the read of the contract finds out what became of the call.
    Verify,
    /// The call is sent once more.
    SendAgain,
    /// The agent gets the URL for the contract.
    Correct,
}

#[cfg(test)]
impl Next {
    /// Returns the words of the documentation.
    fn words(self) -> &'static str {
        match self {
            Self::Pass => "the agent gets the result",
            Self::PassAlone => "the agent gets the result; no compensation is stored",
            Self::Tell => "the agent gets the reason",
            Self::Verify => "the agent gets the reason; `verify` finds out",
            Self::SendAgain => "Belay opens another session and sends the call once more",
            Self::Correct => "the agent gets the URL for the contract",
        }
    }
}

impl Reply {
    /// All kinds, in the order of the documentation.
    #[cfg(test)]
    const ALL: [Self; 17] = [
        Self::Result,
        Self::ToolError,
        Self::Unfinished,
        Self::Refused,
        Self::Failed,
        Self::SessionLost,
        Self::NotTaken,
        Self::GivenUp,
        Self::Moved,
        Self::SeeOther,
        Self::ServerError,
        Self::NoAnswer,
        Self::Unreadable,
        Self::BrokeOff,
        Self::TooLong,
        Self::Withheld,
        Self::Late,
    ];

    /// Returns the kind of a whole reply.
    pub(super) fn of(status: u16, in_session: bool, answer: Answer) -> Self {
        match (status, answer) {
            // A result for this very request is one, whatever the status.
            (_, Answer::Result(Finish::Success)) => Self::Result,
            (_, Answer::Result(Finish::Error)) => Self::ToolError,
            (_, Answer::Result(Finish::Unfinished)) => Self::Unfinished,
            (404, _) if in_session => Self::SessionLost,
            (400, Answer::Error { has_id, about_session, .. }) if in_session && (about_session || !has_id) => {
                Self::SessionLost
            }
            (400, Answer::Other { about_session: true }) if in_session => Self::SessionLost,
            (_, Answer::Error { code, .. }) if REFUSALS.contains(&code) => Self::Refused,
            (400..=499, Answer::Error { code: INTERNAL_ERROR, .. }) => Self::Failed,
            (408 | 499, _) => Self::GivenUp,
            (400..=499, _) => Self::NotTaken,
            (_, Answer::Error { .. }) => Self::Failed,
            (301 | 307 | 308, _) => Self::Moved,
            (300..=399, _) => Self::SeeOther,
            (200..=299, Answer::Nothing) => Self::NoAnswer,
            (200..=299, _) => Self::Unreadable,
            _ => Self::ServerError,
        }
    }

    /// Returns whether the call may be sent once more, over a new session.
    pub(super) fn is_sent_again(self) -> bool {
        self.meaning().next == Next::SendAgain
    }

    /// Returns what became of the call.
    pub(super) fn outcome(self) -> CallOutcome {
        self.meaning().outcome
    }

    /// Returns the row of this kind.
    pub(super) const fn meaning(self) -> Meaning {
        use CallOutcome::{Applied, NotApplied, Unknown};
        let (words, outcome, next) = match self {
            Self::Result => ("a result", Applied, Next::Pass),
            Self::ToolError => ("a result with `isError`", Applied, Next::PassAlone),
            Self::Unfinished => ("a result that asks for input or names a task", Unknown, Next::Verify),
            Self::Refused => ("JSON-RPC error -32700, -32600, -32601 or -32602", NotApplied, Next::Tell),
            Self::Failed => ("another JSON-RPC error", Unknown, Next::Verify),
            Self::SessionLost => (
                "in a session: HTTP 404; HTTP 400 with an error without the request's id, or about the session",
                NotApplied,
                Next::SendAgain,
            ),
            Self::NotTaken => ("another HTTP 4xx, unless its error is -32603", NotApplied, Next::Tell),
            Self::GivenUp => ("HTTP 408 or 499", Unknown, Next::Verify),
            Self::Moved => ("HTTP 301, 307 or 308 that is not followed", NotApplied, Next::Correct),
            Self::SeeOther => ("another HTTP 3xx", Unknown, Next::Verify),
            Self::ServerError => ("HTTP 5xx or 1xx", Unknown, Next::Verify),
            Self::NoAnswer => ("no body, with HTTP 202, 204 or another 2xx", Unknown, Next::Verify),
            Self::Unreadable => ("a body that is no JSON-RPC answer, with HTTP 2xx", Unknown, Next::Verify),
            Self::BrokeOff => ("a reply or an event stream that ends early", Unknown, Next::Verify),
            Self::TooLong => ("a reply over `responseBytes`", Unknown, Next::Verify),
            Self::Withheld => ("a reply that repeats the credential", Unknown, Next::Verify),
            Self::Late => ("no reply in `timeoutSeconds`", Unknown, Next::Verify),
        };
        Meaning { words, outcome, next }
    }
}

/// Returns whether a text of a server is about the session of a request.
pub(super) fn is_about_session(text: &str) -> bool {
    text.to_ascii_lowercase().contains("session")
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const SUCCESS: Answer = Answer::Result(Finish::Success);
    const PLAIN: Answer = Answer::Other { about_session: false };
    const OF_SESSION: Answer = Answer::Other { about_session: true };

    const fn error(code: i64) -> Answer {
        Answer::Error { code, has_id: true, about_session: false }
    }

    const fn without_id(code: i64) -> Answer {
        Answer::Error { code, has_id: false, about_session: false }
    }

    const fn about_session(code: i64) -> Answer {
        Answer::Error { code, has_id: true, about_session: true }
    }

    #[rstest]
    #[case::result(200, false, SUCCESS, Reply::Result)]
    #[case::result_beside_a_failure(500, true, SUCCESS, Reply::Result)]
    #[case::result_beside_a_lost_session(404, true, SUCCESS, Reply::Result)]
    #[case::tool_error(200, false, Answer::Result(Finish::Error), Reply::ToolError)]
    #[case::input(200, false, Answer::Result(Finish::Unfinished), Reply::Unfinished)]
    #[case::parse_error(200, false, error(-32700), Reply::Refused)]
    #[case::invalid_request(400, false, error(-32600), Reply::Refused)]
    #[case::unknown_method(404, false, error(-32601), Reply::Refused)]
    #[case::unknown_tool(200, true, error(-32602), Reply::Refused)]
    #[case::refused_by_a_server_that_says_500(500, true, error(-32602), Reply::Refused)]
    #[case::internal(200, true, error(-32603), Reply::Failed)]
    #[case::internal_beside_400(400, true, error(-32603), Reply::Failed)]
    #[case::internal_beside_500(500, true, without_id(-32603), Reply::Failed)]
    #[case::of_the_server(200, true, error(-32000), Reply::Failed)]
    #[case::session_in_a_success(200, true, about_session(-32001), Reply::Failed)]
    #[case::gone(404, true, PLAIN, Reply::SessionLost)]
    #[case::gone_without_a_body(404, true, Answer::Nothing, Reply::SessionLost)]
    #[case::gone_outside_a_session(404, false, PLAIN, Reply::NotTaken)]
    #[case::no_id(400, true, without_id(-32000), Reply::SessionLost)]
    #[case::about_a_session(400, true, about_session(-32600), Reply::SessionLost)]
    #[case::text_about_a_session(400, true, OF_SESSION, Reply::SessionLost)]
    #[case::no_id_outside_a_session(400, false, without_id(-32000), Reply::NotTaken)]
    #[case::text_outside_a_session(400, false, OF_SESSION, Reply::NotTaken)]
    #[case::about_nothing_known(400, true, PLAIN, Reply::NotTaken)]
    #[case::error_of_the_server_beside_400(400, true, error(-32000), Reply::NotTaken)]
    #[case::unauthorized(401, true, OF_SESSION, Reply::NotTaken)]
    #[case::too_many(429, true, without_id(-32000), Reply::NotTaken)]
    #[case::timeout(408, true, PLAIN, Reply::GivenUp)]
    #[case::client_gone(499, true, error(-32000), Reply::GivenUp)]
    #[case::slash(307, true, Answer::Nothing, Reply::Moved)]
    #[case::for_ever(308, false, PLAIN, Reply::Moved)]
    #[case::moved(301, false, PLAIN, Reply::Moved)]
    #[case::found(302, false, PLAIN, Reply::SeeOther)]
    #[case::see_other(303, false, PLAIN, Reply::SeeOther)]
    #[case::bad_gateway(502, true, OF_SESSION, Reply::ServerError)]
    #[case::unavailable(503, true, Answer::Nothing, Reply::ServerError)]
    #[case::accepted(202, true, Answer::Nothing, Reply::NoAnswer)]
    #[case::empty(200, true, Answer::Nothing, Reply::NoAnswer)]
    #[case::page(200, true, PLAIN, Reply::Unreadable)]
    fn kinds(#[case] status: u16, #[case] in_session: bool, #[case] answer: Answer, #[case] expected: Reply) {
        assert_eq!(Reply::of(status, in_session, answer), expected);
    }

    /// A call is sent again only if it did not run.
    #[test]
    fn only_what_did_not_run_is_sent_again() {
        for reply in Reply::ALL {
            assert!(!reply.is_sent_again() || reply.outcome() == CallOutcome::NotApplied, "{reply:?}");
        }
        assert!(Reply::ALL.iter().any(|reply| reply.is_sent_again()));
    }

    #[test]
    fn the_documentation_has_this_table() {
        let outcome = |outcome| match outcome {
            CallOutcome::Applied => "applied",
            CallOutcome::NotApplied => "not applied",
            CallOutcome::Unknown => "unknown",
        };
        let row = |reply: &Reply| {
            let Meaning { words, outcome: became, next } = reply.meaning();
            format!("| {words} | {} | {} |", outcome(became), next.words())
        };
        let expected: Vec<_> = Reply::ALL.iter().map(row).collect();
        let page = include_str!("../../../../docs/tool-contracts.md");
        let rows = page.lines().skip_while(|line| !line.starts_with("| Reply of the MCP server |")).skip(2);
        let found: Vec<_> = rows.take_while(|line| line.starts_with('|')).collect();
        assert_eq!(found, expected);
    }
}
