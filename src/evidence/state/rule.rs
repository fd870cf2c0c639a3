//! The rules of the log: one table for all their users.

use std::fmt;

use crate::policy::rule::Rule;

/// A user of the rules, who checks whether a record may follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// The harness, before it writes a record. A violation denies the agent's call, and no record is made.
    Harness,
    /// The witness, before it signs a segment. The first violation rejects the segment.
    Witness,
    /// The verifier. Every violation is a finding.
    Verifier,
}

impl User {
    /// Every user.
    pub const ALL: [Self; 3] = [Self::Harness, Self::Witness, Self::Verifier];

    /// Returns the bit of this user in a rule's row.
    const fn bit(self) -> u8 {
        match self {
            Self::Harness => H,
            Self::Witness => W,
            Self::Verifier => V,
        }
    }
}

const H: u8 = 1;
const W: u8 = 2;
const V: u8 = 4;

macro_rules! rules {
    ($($(#[doc = $doc:literal])+ $variant:ident = $id:literal, $section:literal, $denial:ident, $users:expr;)+) => {
        /// What must hold about a record, given the records before it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum LogRule {
            $($(#[doc = $doc])+ $variant),+
        }

        impl LogRule {
            /// Every rule, in the order in which the rules are checked.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Returns the stable identifier.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $id),+ }
            }

            /// Returns what must hold, in one sentence.
            pub fn summary(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+)),+ }
            }

            /// Returns the part of docs/evidence-format.md that requires the rule; empty if none does.
            pub fn section(self) -> &'static str {
                match self { $(Self::$variant => $section),+ }
            }

            /// Returns the rule that the denial of a violating record names.
            pub fn denial(self) -> Rule {
                match self { $(Self::$variant => Rule::$denial),+ }
            }

            const fn users(self) -> u8 {
                match self { $(Self::$variant => $users),+ }
            }
        }
    };
}

rules! {
    /// A record is of a version that this Belay knows.
    RecordVersion = "record.version", "section 5", LogSegment, W | V;
    /// A record's time is RFC 3339 in UTC to the millisecond, of a year from 1970 to 9998.
    RecordTime = "record.time", "section 5", LogSegment, W | V;
    /// Every digest and commitment in a record is 64 hex digits.
    RecordDigest = "record.digest", "section 5", LogSegment, H | W | V;
    /// Nothing follows `task.closed`.
    AfterEnd = "task.after-end", "rule 1", LogSegment, H | W | V;
    /// The gateway writes `task.closed` and nothing else; the harness writes everything else.
    Writer = "record.writer", "rule 1", LogSegment, W | V;
    /// The number of the attempt never goes down, and begins at 1.
    AttemptOrder = "attempt.order", "rule 2", IdentityAttempt, H | W | V;
    /// The harness writes between `attempt.opened` and `attempt.closed` of its own attempt.
    AttemptOpen = "attempt.open", "rule 2", LogSegment, H | W | V;
    /// An attempt that a limit has ended does not open again.
    AttemptOver = "attempt.over", "", LogSegment, H | W;
    /// The attempt's key is a log key named after origin and attempt.
    AttemptKey = "attempt.key", "rule 3", LogSegment, H | W | V;
    /// The pod is contained when its attempt opens.
    AttemptContained = "attempt.contained", "rule 3", ContainmentLost, H | W | V;
    /// The policy is the one of this log's task.
    AttemptTask = "attempt.task", "rule 3", LogSegment, H | W | V;
    /// The expressions and patterns of the policy's pack compile.
    AttemptPolicy = "attempt.policy", "after rule 17", LogSegment, V;
    /// A rollback has the plan that it began with, for the task that it undoes; no other task has a plan.
    RollbackPlan = "rollback.plan", "rule 17", LogSegment, H | W | V;
    /// The names in an intent, open calls and tools stay within the bounds of a reader's memory.
    CallBounds = "call.bounds", "", LogSegment, H | W;
    /// A reservation is not negative.
    CallReservation = "call.reservation", "rule 4", LogSegment, H | W | V;
    /// Each call has one intent.
    CallUnique = "call.unique", "rule 5", LogSegment, H | W | V;
    /// No call follows the loss of containment.
    ContainmentLost = "call.contained", "rule 7", ContainmentLost, H | V;
    /// Tool calls stay within `limits.toolCalls`.
    LimitToolCalls = "limit.tool-calls", "rule 6", ToolCalls, H | W | V;
    /// Reserved tokens stay within `limits.tokens`.
    LimitTokens = "limit.tokens", "rule 6", Tokens, H | W | V;
    /// Calls of a tool stay within its contract's `limits.calls`.
    LimitTool = "limit.tool", "rule 8", ToolLimitCalls, H | W | V;
    /// An attempt calls a tool by one definition.
    CallDefinition = "call.definition", "rule 9", ToolChanged, H | W | V;
    /// Reserved cost stays within `limits.costMicros`.
    LimitCost = "limit.cost", "rule 8", Cost, H | W | V;
    /// No call follows once as many calls were refused as `limits.denials` says.
    LimitDenials = "limit.denials", "rule 8", Denials, H | W | V;
    /// A tool call is of a tool of the policy, with an effect that contract and class allow, its definition and its bytes; a price is the policy's.
    CallPolicy = "call.policy", "rules 6, 8, 9, 10", LogSegment, H | W | V;
    /// A call has an idempotency key exactly if its contract makes one, and a key of all arguments is the one that they make.
    KeyMade = "key.made", "rule 11", LogSegment, H | W | V;
    /// No other call has the key, but one that did nothing, is older than the window, or is repeated to an upstream that tells repeats.
    KeyFree = "key.free", "rule 11", ToolIdempotency, H | W | V;
    /// A rollback makes the calls of its plan, each in time and once, and reads; nothing else undoes anything.
    RollbackCall = "rollback.call", "rule 17", ToolRollback, H | W | V;
    /// The approvals of a call were given for this very call, and are in no other.
    ApprovalUsed = "approval.used", "rule 14", ToolApproval, H | W | V;
    /// Only tool calls have approvals and an assessment.
    CallAccess = "call.access", "rules 14, 16", LogSegment, H | W | V;
    /// The assessment says which data the task has seen.
    DataSeen = "data.seen", "rule 15", LogSegment, H | W;
    /// The pack lets the call pass by what its record says of data, rules and risk.
    CallAssessment = "call.assessment", "rules 15, 16", LogSegment, V;
    /// A tool call has the approval that its contract asks for without a condition.
    ApprovalByContract = "approval.contract", "rule 14", ToolApproval, H | W | V;
    /// A tool call has the approval that the pack asks for.
    ApprovalByPack = "approval.pack", "rules 14, 16", ToolApproval, V;
    /// An outcome is of an open call of its attempt.
    OutcomeOpen = "outcome.open", "rule 5", LogSegment, H | W | V;
    /// An outcome has no negative tokens and no negative cost.
    OutcomeAmount = "outcome.amount", "rule 4", LogSegment, H | W | V;
    /// A result is at least as sensitive as its contract says.
    OutcomeData = "outcome.data", "rule 15", LogSegment, H | W | V;
    /// Only an applied call of a tool with a compensation, outside a rollback, names what undoes it.
    OutcomeUndo = "outcome.undo", "rule 17", LogSegment, H | W | V;
    /// A replayed result is that of the call that was made under the key.
    Replayed = "call.replayed", "rule 12", LogSegment, H | W | V;
    /// A call of unknown fate is resolved by a later, applied read of the tool that its contract names.
    Resolved = "call.resolved", "rules 5, 13", LogSegment, H | W | V;
    /// A record of refusals counts one, or several without a digest.
    DenialCount = "denial.count", "section 5", LogSegment, H | W | V;
    /// Only connections are ignored, by a policy that lists hosts to ignore.
    DenialIgnored = "denial.ignored", "rule 8", LogSegment, H | W | V;
    /// An approval request is for one call, and a denial of it stays.
    ApprovalRequest = "approval.request", "rule 14", LogSegment, H | W | V;
    /// An approval expires at an RFC 3339 time in UTC.
    ApprovalTime = "approval.time", "section 5", LogSegment, H | W | V;
    /// An approval is one that the policy asks for, and its state follows from the votes.
    ApprovalVotes = "approval.votes", "rule 14", LogSegment, H | W | V;
    /// The counters follow from the events.
    Counters = "usage.count", "rule 4", LogSegment, W | V;
}

impl LogRule {
    /// Returns whether this user checks the rule. The harness cannot break the rules that it does not check, because it fills in these
    /// members itself.
    pub fn is_asked_by(self, user: User) -> bool {
        self.users() & user.bit() != 0
    }
}

/// The text before the table in docs/log-rules.md.
const HEAD: &str = "<!-- Generated by crdgen from src/evidence/state/rule.rs. Do not edit: change the rules and run `make generate`. -->
# Rules of the log

Whether a record may follow is decided by these rules, by what came before it. They are written once, in `src/evidence/state`, for three users: the
**harness** asks before it writes a record, and refuses the call or ends the log; the **witness** asks before it signs a segment, and the first
violation refuses the segment; the **verifier** asks afterwards, and every violation is a finding. *Format* says where
[evidence-format.md](evidence-format.md) asks for the rule. A rule without such a place protects memory, or keeps an ended attempt closed.

A user without a mark does not ask: the harness fills version, time, writer and counters in itself; the witness records that containment was lost,
and what followed, because it is worse lost than seen; what the pack says of a call is judged by harness and gateway before the call leaves, and by
the verifier from the record.

| Rule | What must hold | Format | Harness | Witness | Verifier |
| --- | --- | --- | --- | --- | --- |
";

/// Returns the table of the rules for readers: `docs/log-rules.md`.
pub fn markdown() -> String {
    let row = |rule: &LogRule| {
        let [harness, witness, verifier] = User::ALL.map(|user| if rule.is_asked_by(user) { "yes" } else { "" });
        let (id, summary, section) = (rule.as_str(), rule.summary().trim(), rule.section());
        format!("| `{id}` | {summary} | {section} | {harness} | {witness} | {verifier} |\n")
    };
    std::iter::once(HEAD.to_owned()).chain(LogRule::ALL.iter().map(row)).collect()
}

impl fmt::Display for LogRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A rule that a record violates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The rule.
    pub rule: LogRule,
    /// What was expected and what was found. The text may quote the log.
    pub message: String,
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_document_has_the_table() {
        let found = include_str!("../../../docs/log-rules.md");
        assert!(found == super::markdown(), "docs/log-rules.md is not what the rules say: run `make generate`");
    }
}
