//! Approvals that a call waits for before it leaves.
//!
//! Guarantees: there is one request for one exact call, however often and by however many concurrent callers it is made. The decision is in
//! the log before the call's intent. Contract and pack request approval at the same time, each separately. An approval is used once. A
//! denial by an approver, an expired request and a gateway that denies the request all deny the call. The [`Clock`] stops while a request
//! is pending.
//!
//! Non-goals: knowing who may approve what. The gateway creates the request, counts the decisions, and checks them again before the call
//! leaves.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::{
    clock::Clock,
    gateway_client::{CallError, GatewayClient},
    journal::Journal,
};
use crate::{
    evidence::record::{Approval as Said, Event},
    policy::{
        approval::{ApprovalSource, ApprovalState, CallKey, LONGEST_ARGUMENTS, PENDING},
        config::{Approval, OnTimeout, SideEffect},
        decide::Denial,
        rule::Rule,
    },
    wire::{ApprovalAsk, ApprovalReply},
};

/// How many seconds the gateway may wait before it replies. It replies at once when there is a decision.
const HOLD: i64 = 20;
/// The number of calls that are remembered. Beyond it, further calls are denied without a request.
const REMEMBERED: usize = 4_096;
/// The pause before the gateway is asked again after an error or when it lags.
const PAUSE: Duration = Duration::from_millis(250);

/// What is known about one exact call.
type Known = Option<Result<ApprovalReply, Denial>>;

/// A call that needs approval.
#[derive(Clone, Debug)]
pub struct Question {
    /// The tool.
    pub tool: String,
    /// What the call may change.
    pub side_effect: SideEffect,
    /// The arguments, RFC 8785 JSON.
    pub arguments: String,
    /// The commitment to the arguments, hex.
    pub digest: String,
}

/// The pending and decided approvals of this attempt.
pub struct Approvals {
    link: Arc<GatewayClient>,
    journal: Arc<Journal>,
    clock: Arc<Clock>,
    asked: Mutex<HashMap<CallKey, watch::Receiver<Known>>>,
    ended: Notify,
}

/// The result of a request for approval.
pub enum Answered {
    /// The call may be made.
    Approved {
        /// The names of the ApprovalRequests.
        names: Vec<String>,
        /// The pack's reasons that the approvers have seen.
        reasons: Vec<String>,
    },
    /// There is no decision yet. The text is for the agent.
    Pending(String),
    /// The call is denied.
    Refused(Denial),
}

impl Approvals {
    /// Creates the state without any requests.
    pub fn new(link: Arc<GatewayClient>, journal: Arc<Journal>, clock: Arc<Clock>) -> Arc<Self> {
        Arc::new(Self { link, journal, clock, asked: Mutex::default(), ended: Notify::new() })
    }

    /// Waits until a request with `onTimeout: EndTask` expires.
    pub async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Requests approval of one exact call for each of these policies, or joins callers that already have, and waits as long as all of them
    /// hold calls.
    pub async fn ask(self: &Arc<Self>, call: &Question, needs: &[(ApprovalSource, &Approval)]) -> Answered {
        let hold = needs.iter().map(|(_, approval)| approval.hold_seconds).min().unwrap_or_default();
        let until = tokio::time::Instant::now() + Duration::from_secs(u64::try_from(hold).unwrap_or_default());
        loop {
            let mut all = Vec::new();
            for (by, approval) in needs {
                let exact = CallKey { by: *by, tool: call.tool.clone(), digest: call.digest.clone() };
                match self.join(&exact, approval, call) {
                    Ok(known) => all.push((exact, known)),
                    Err(denial) => return Answered::Refused(denial),
                }
            }
            let mut replies = Vec::new();
            for ((exact, known), (_, approval)) in all.iter_mut().zip(needs) {
                let decided = match tokio::time::timeout_at(until, known.wait_for(Option::is_some)).await {
                    Ok(Ok(decided)) => decided.clone(),
                    // The watching task is gone, which happens only at the end.
                    Ok(Err(_)) => {
                        return Answered::Refused(denial("the harness ends and requests no approvals any more"));
                    }
                    Err(_) => return Answered::Pending(pending(&call.tool, approval)),
                };
                match decided {
                    Some(Ok(reply)) if reply.state == ApprovalState::Approved => replies.push(reply),
                    Some(Ok(reply)) => return Answered::Refused(denial(&refusal(&reply))),
                    Some(Err(refused)) => {
                        self.take(&[(exact.clone(), known.clone())]);
                        return Answered::Refused(refused);
                    }
                    None => {}
                }
            }
            // Another caller with the same call has used the approvals, so they are requested anew.
            if replies.len() < needs.len() || !self.take(&all) {
                continue;
            }
            if let Some(lapsed) = replies.iter().find(|reply| reply.expired()) {
                return Answered::Refused(denial(&format!(
                    "approval {} expired before the call could be made; the call stays denied for this task",
                    lapsed.name
                )));
            }
            let reasons = replies.iter().flat_map(|reply| reply.reasons.clone()).collect();
            return Answered::Approved { names: replies.into_iter().map(|reply| reply.name).collect(), reasons };
        }
    }

    /// Returns what is known about a call. Requests approval if no caller has.
    fn join(
        self: &Arc<Self>,
        exact: &CallKey,
        approval: &Approval,
        call: &Question,
    ) -> Result<watch::Receiver<Known>, Denial> {
        if call.arguments.len() > LONGEST_ARGUMENTS {
            return Err(denial(&format!(
                "approvers are shown arguments of at most {LONGEST_ARGUMENTS} bytes, found {}; send less",
                call.arguments.len()
            )));
        }
        let mut asked = self.asked.lock();
        if let Some(known) = asked.get(exact) {
            return Ok(known.clone());
        }
        let undecided = asked.values().filter(|known| known.borrow().is_none()).count();
        if undecided >= PENDING || asked.len() >= REMEMBERED {
            return Err(denial(&format!("{undecided} calls wait for approvers already; wait for one of them")));
        }
        let (sender, known) = watch::channel(None);
        asked.insert(exact.clone(), known.clone());
        let ask = ApprovalAsk {
            by: exact.by,
            tool: call.tool.clone(),
            side_effect: call.side_effect,
            arguments: call.arguments.clone(),
            request_commitment: call.digest.clone(),
            wait: 0,
        };
        tokio::spawn(self.clone().watch(ask, approval.on_timeout, sender));
        Ok(known)
    }

    /// Removes the entries if all of them are still the current ones. Returns whether they were.
    fn take(&self, all: &[(CallKey, watch::Receiver<Known>)]) -> bool {
        let mut asked = self.asked.lock();
        let same = all.iter().all(|(exact, known)| asked.get(exact).is_some_and(|kept| kept.same_channel(known)));
        if same {
            all.iter().for_each(|(exact, _)| drop(asked.remove(exact)));
        }
        same
    }

    /// Asks the gateway until there is a decision, and records it.
    async fn watch(self: Arc<Self>, mut ask: ApprovalAsk, on_timeout: OnTimeout, sender: watch::Sender<Known>) {
        let wait = self.clock.wait();
        let decided = loop {
            match self.link.approval(&ask).await {
                Ok(reply) => {
                    let said = said(&ask, &reply);
                    if !self.journal.look(|task| task.approvals().knows(&reply.name))
                        && let Err(denial) = self.record(pend(&said), Event::ApprovalRequested)
                    {
                        break Err(denial);
                    }
                    if reply.state == ApprovalState::Pending {
                        ask.wait = HOLD;
                        continue;
                    }
                    // The approval is used, but the gateway has not seen the call that used it yet. The next call gets another request.
                    if self.journal.look(|task| task.approvals().is_used(&reply.name)) {
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    }
                    break self.record(said, Event::ApprovalDecided).map(|()| reply);
                }
                Err(CallError::Refused(denial)) => break Err(denial),
                Err(CallError::Unreachable(reason)) => {
                    tracing::warn!(reason, "approval cannot be requested yet");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        };
        drop(wait);
        let expired = decided.as_ref().is_ok_and(|reply| reply.state == ApprovalState::Expired);
        sender.send_replace(Some(decided));
        if expired && on_timeout == OnTimeout::EndTask {
            self.ended.notify_one();
        }
        // Callers that come later still see the decision.
        sender.closed().await;
    }

    /// Records a request or a decision.
    fn record(&self, said: Said, event: fn(Said) -> Event) -> Result<(), Denial> {
        let record = self.journal.record(|_, task| {
            task.approvals().fits(&said.name, &said.call(), said.state).map_err(|reason| denial(&reason))?;
            Ok(event(said))
        });
        record.map(|_| ())
    }
}

/// Returns the approval as it was requested, before any decision.
fn pend(said: &Said) -> Said {
    Said { state: ApprovalState::Pending, decisions: vec![], ..said.clone() }
}

fn said(ask: &ApprovalAsk, reply: &ApprovalReply) -> Said {
    Said {
        name: reply.name.clone(),
        uid: reply.uid.clone(),
        requested_by: ask.by,
        tool: ask.tool.clone(),
        request_commitment: ask.request_commitment.clone(),
        required: reply.required,
        expires: reply.expires.clone(),
        reasons: reply.reasons.clone(),
        state: reply.state,
        decisions: reply.decisions.clone(),
    }
}

fn denial(reason: &str) -> Denial {
    Denial { rule: Rule::ToolApproval, reason: reason.to_owned() }
}

/// Returns why a decided request is not an approval.
fn refusal(reply: &ApprovalReply) -> String {
    use crate::policy::{approval::Answer, shorten::shorten};
    let no = reply.decisions.iter().find(|vote| vote.decision == Answer::Deny);
    match no {
        Some(no) => {
            let why = no.reason.as_deref().map(|why| format!(": {}", shorten(why))).unwrap_or_default();
            format!("{} denied this call{why}; it stays denied for this task", shorten(&no.by))
        }
        None => format!(
            "this call was not approved before {}; it stays denied for this task (ApprovalRequest {})",
            reply.expires, reply.name
        ),
    }
}

fn pending(tool: &str, approval: &Approval) -> String {
    format!(
        "Belay holds this call of {tool}: it is pending until {} approver(s) approve it. Belay did not make the call. Make the same \
         call again, with the same arguments, to wait for the decision; a repeat is not counted. rule: {}.",
        approval.required,
        Rule::ToolApproval
    )
}
