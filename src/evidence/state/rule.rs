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
    /// Belay knows the version of the record.
    RecordVersion = "record.version", "section 5", LogSegment, W | V;
    /// The time of a record is an RFC 3339 time in UTC to the millisecond, in a year from 1970 to 9998.
    RecordTime = "record.time", "section 5", LogSegment, W | V;
    /// Every digest and commitment in a record has 64 hex digits.
    RecordDigest = "record.digest", "section 5", LogSegment, H | W | V;
    /// No record follows `task.closed`.
    AfterEnd = "task.after-end", "rule 1", LogSegment, H | W | V;
    /// The gateway writes `task.closed`. The harness writes all other records.
    Writer = "record.writer", "rule 1", LogSegment, W | V;
    /// The numbers of attempts start at 1 and never decrease.
    AttemptOrder = "attempt.order", "rule 2", IdentityAttempt, H | W | V;
    /// The harness writes only between `attempt.opened` and `attempt.closed` of its own attempt.
    AttemptOpen = "attempt.open", "rule 2", LogSegment, H | W | V;
    /// An attempt that a limit ended does not open again.
    AttemptOver = "attempt.over", "", LogSegment, H | W;
    /// The key of an attempt is a log key. Its name has the origin and the attempt's number.
    AttemptKey = "attempt.key", "rule 3", LogSegment, H | W | V;
    /// The pod is contained when its attempt opens.
    AttemptContained = "attempt.contained", "rule 3", ContainmentLost, H | W | V;
    /// The policy belongs to the task of this log.
    AttemptTask = "attempt.task", "rule 3", LogSegment, H | W | V;
    /// The expressions and patterns of the policy's pack compile.
    AttemptPolicy = "attempt.policy", "after rule 17", LogSegment, V;
    /// All attempts of a rollback have the same plan, for the task that it rolls back. Other tasks have no plan.
    RollbackPlan = "rollback.plan", "rule 17", LogSegment, H | W | V;
    /// The length of names, the number of open calls and the number of tools are limited, because readers hold them in memory.
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
    /// All calls of a tool in one attempt have the same definition.
    CallDefinition = "call.definition", "rule 9", ToolChanged, H | W | V;
    /// Reserved cost stays within `limits.costMicros`.
    LimitCost = "limit.cost", "rule 8", Cost, H | W | V;
    /// No call follows after the number of denials has reached `limits.denials`.
    LimitDenials = "limit.denials", "rule 8", Denials, H | W | V;
    /// The tool of a call, its side effect, definition and size follow the policy. The cost of a model call follows the policy's prices.
    CallPolicy = "call.policy", "rules 6, 8, 9, 10", LogSegment, H | W | V;
    /// A call has an idempotency key if, and only if, its contract has `idempotency`. A key of all arguments follows from their commitment.
    KeyMade = "key.made", "rule 11", LogSegment, H | W | V;
    /// No other call has the same key, except one that did nothing, is older than the window, or has an upstream that deduplicates.
    KeyFree = "key.free", "rule 11", ToolIdempotency, H | W | V;
    /// A rollback makes only reads and the compensations of its plan, each once and before its deadline. Other tasks make no compensations.
    RollbackCall = "rollback.call", "rule 17", ToolRollback, H | W | V;
    /// Each approval of a call was given for this exact call, and no other call uses it.
    ApprovalUsed = "approval.used", "rule 14", ToolApproval, H | W | V;
    /// Only tool calls have approvals and an assessment.
    CallAccess = "call.access", "rules 14, 16", LogSegment, H | W | V;
    /// The assessment has the sensitivity of the data that the task has seen.
    DataSeen = "data.seen", "rule 15", LogSegment, H | W;
    /// The pack allows the call, according to the data, the rules and the risk score in its record.
    CallAssessment = "call.assessment", "rules 15, 16", LogSegment, V;
    /// A tool call has the approval that its contract requires without a condition.
    ApprovalByContract = "approval.contract", "rule 14", ToolApproval, H | W | V;
    /// A tool call has the approval that the pack requires.
    ApprovalByPack = "approval.pack", "rules 14, 16", ToolApproval, V;
    /// An outcome belongs to an open call of the same attempt.
    OutcomeOpen = "outcome.open", "rule 5", LogSegment, H | W | V;
    /// The tokens and the cost of an outcome are not negative.
    OutcomeAmount = "outcome.amount", "rule 4", LogSegment, H | W | V;
    /// A result is at least as sensitive as the contract says.
    OutcomeData = "outcome.data", "rule 15", LogSegment, H | W | V;
    /// An outcome names a compensation only if the call was applied, its tool has a compensation, and the task is not a rollback.
    OutcomeUndo = "outcome.undo", "rule 17", LogSegment, H | W | V;
    /// A replayed result is the result of the call with the same key.
    Replayed = "call.replayed", "rule 12", LogSegment, H | W | V;
    /// A later, applied read resolves a call with an unknown outcome. The tool of the read is the one that the contract names.
    Resolved = "call.resolved", "rules 5, 13", LogSegment, H | W | V;
    /// A record of denials counts one call, or several calls without a digest.
    DenialCount = "denial.count", "section 5", LogSegment, H | W | V;
    /// Only connections are ignored, and only if the policy lists hosts to ignore.
    DenialIgnored = "denial.ignored", "rule 8", LogSegment, H | W | V;
    /// An approval request is for one call. A denied request stays denied.
    ApprovalRequest = "approval.request", "rule 14", LogSegment, H | W | V;
    /// The expiry of an approval request is an RFC 3339 time in UTC.
    ApprovalTime = "approval.time", "section 5", LogSegment, H | W | V;
    /// The policy requires the approval, and its state follows from the approvers' decisions.
    ApprovalVotes = "approval.votes", "rule 14", LogSegment, H | W | V;
    /// The counters follow from the records.
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

These rules decide whether a record may follow the records before it. `src/evidence/state` defines them once, for three users:

- The **harness** checks a record before it writes the record. A violation denies the call or ends the log.
- The **witness** checks a segment before it signs the segment. The first violation rejects the segment.
- The **verifier** checks the whole log. Every violation is a finding.

*Format* names the part of [evidence-format.md](evidence-format.md) that requires the rule. A rule without such a part limits memory, or
keeps an ended attempt closed.

A user without a *yes* does not check the rule. The harness fills in version, time, writer and counters itself. The witness signs the record
of a loss of containment and the records after it, so that the evidence has them. Harness and gateway evaluate the pack before the call
leaves. The verifier evaluates the pack from the record.

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
