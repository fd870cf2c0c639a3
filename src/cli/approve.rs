//! `belay approvals`, `belay approve` and `belay deny`: the calls that wait for approval, and an approver's decision about one.
//!
//! Guarantees: everything that the decision is about is shown before the decision is written, and the decision is written to nothing else.
//! A decision that admission would deny is denied here, with the reason. A decision is never changed or withdrawn, and never made in
//! another user's name. [`state`] alone evaluates the state of a request.

use std::{
    fmt::Write as _,
    io::{IsTerminal, Write},
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, Patch, PatchParams, PostParams},
    core::DeserializeGuard,
};
use serde_json::{Value, json};

use super::{
    CliError,
    cluster::{Cluster, explain},
    terminal::{Paint, Safe, safe_json},
};
use crate::{
    api::ApprovalRequest,
    canonical,
    policy::approval::{Answer, ApprovalState, ApprovalTerms, Vote, state},
    render::approval::{asked, votes},
};

#[cfg(test)]
mod tests;

/// The maximum length of a reason, in characters, as in the CRD.
const LONGEST_REASON: usize = 1024;
/// The maximum number of tries: other approvers may decide at the same time.
const TRIES: usize = 5;
/// The number of requests on a page.
const PAGE: u32 = 100;

/// The API of requests. A request that this version does not understand does not affect the others.
type Requests = Api<DeserializeGuard<ApprovalRequest>>;

/// List the calls that wait for approval.
///
/// Shows the requests that are neither decided nor expired, the most urgent first: the call, its arguments, its principal, and the
/// decisions of others.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay approvals -n payments
  kubectl belay approvals -n payments --all

Reads ApprovalRequests (list).

Exit codes:
  0  the requests were listed, even if there are none
  2  the requests could not be listed, or the command line is wrong")]
pub(super) struct List {
    #[command(flatten)]
    cluster: Cluster,
    /// Also list requests that are decided or expired
    #[arg(long)]
    all: bool,
}

/// Approve one call that waits for approval.
///
/// Shows the call and adds your decision: this call may be made once, before the request expires. You cannot withdraw the decision. Until
/// the call is made, a denial by another approver still stops it.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay approvals -n payments
  belay approve refund-5b1c6a0d9e2f -n payments --reason 'the order was cancelled'

Needs the ClusterRole belay-approver in the namespace, and your name or one of your groups among the contract's approvers. The task's
principal, and the user who asked for the task, cannot approve.

Exit codes:
  0  your decision was written
  1  your decision was not written: you may not decide, you have decided already, or there is nothing left to decide
  2  the request could not be read or written, or the command line is wrong")]
pub(super) struct Approve {
    #[command(flatten)]
    decision: Decision,
}

/// Deny one call that waits for approval.
///
/// Shows the call and adds your decision: this call may not be made, whatever others decide. You cannot withdraw the decision.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay deny refund-5b1c6a0d9e2f -n payments --reason 'this is the wrong order'
      The agent gets the reason.

Needs the ClusterRole belay-approver in the namespace, and your name or one of your groups among the contract's approvers.

Exit codes:
  0  your decision was written
  1  your decision was not written: you may not decide, you have decided already, or there is nothing left to decide
  2  the request could not be read or written, or the command line is wrong")]
pub(super) struct Deny {
    #[command(flatten)]
    decision: Decision,
}

#[derive(Debug, clap::Args)]
struct Decision {
    /// Name of the request, as `belay approvals` lists it
    name: String,
    /// The reason. The agent gets it, and the evidence has it
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: Option<String>,
    #[command(flatten)]
    cluster: Cluster,
}

/// Parses a reason that the API server accepts.
fn reason(text: &str) -> Result<String, String> {
    let text = text.trim();
    match text.chars().count() {
        0 => Err("expected a reason, found none; leave --reason out, or write one".into()),
        1..=LONGEST_REASON => Ok(text.to_owned()),
        found => Err(format!("expected at most {LONGEST_REASON} characters, found {found}; shorten it")),
    }
}

/// Lists the requests and returns the exit code.
pub(super) async fn list(args: &List, out: &mut dyn Write, notes: &mut dyn Write) -> Result<u8, CliError> {
    let (client, namespace) = args.cluster.connect().await?;
    let paint = Paint::new(std::io::stdout().is_terminal());
    let requests = Api::namespaced(client, &namespace);
    listed(&requests, &namespace, args.all, paint, out, notes).await
}

/// Approves the request and returns the exit code.
pub(super) async fn approve(args: &Approve, out: &mut dyn Write, notes: &mut dyn Write) -> Result<u8, CliError> {
    decide(&args.decision, Answer::Approve, out, notes).await
}

/// Denies the request and returns the exit code.
pub(super) async fn deny(args: &Deny, out: &mut dyn Write, notes: &mut dyn Write) -> Result<u8, CliError> {
    decide(&args.decision, Answer::Deny, out, notes).await
}

async fn decide(args: &Decision, answer: Answer, out: &mut dyn Write, notes: &mut dyn Write) -> Result<u8, CliError> {
    let (client, namespace) = args.cluster.connect().await?;
    let paint = Paint::new(std::io::stdout().is_terminal());
    let ballot = Ballot { namespace: &namespace, name: &args.name, answer, reason: args.reason.as_deref() };
    ballot.cast(client, paint, out, notes).await
}

async fn listed(
    requests: &Requests,
    namespace: &str,
    all: bool,
    paint: Paint,
    out: &mut dyn Write,
    notes: &mut dyn Write,
) -> Result<u8, CliError> {
    let mut found = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let some = requests.list(&page).await.map_err(|e| {
            CliError::new(format!("cannot list ApprovalRequests of namespace {namespace}: {}", explain(&e)))
        })?;
        for DeserializeGuard(request) in some.items {
            match request {
                Ok(request) => found.push(request),
                Err(e) => {
                    let name = e.metadata.name.unwrap_or_default();
                    writeln!(notes, "left out: {}", Safe(&not_understood(namespace, &name, &e.error)))?;
                }
            }
        }
        match some.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => break,
        }
    }
    let now = Timestamp::now();
    found.retain(|request| all || stands(request, now) == ApprovalState::Pending);
    found.sort_by_key(|request| request.spec.expires_at.0);
    for request in &found {
        writeln!(out, "{}", describe(request, now, paint))?;
    }
    let what = if all { "" } else { "pending " };
    match found.len() {
        0 => writeln!(notes, "no {what}ApprovalRequests in namespace {}", Safe(namespace))?,
        count => writeln!(notes, "{count} in namespace {}", Safe(namespace))?,
    }
    Ok(0)
}

/// An approver's decision about one request.
struct Ballot<'a> {
    namespace: &'a str,
    name: &'a str,
    answer: Answer,
    reason: Option<&'a str>,
}

/// A user, as the API server authenticates them.
#[derive(Debug, PartialEq, Eq)]
struct Person {
    name: String,
    groups: Vec<String>,
}

impl Ballot<'_> {
    /// Shows the request, writes the decision and reports the result.
    async fn cast(
        &self,
        client: Client,
        paint: Paint,
        out: &mut dyn Write,
        notes: &mut dyn Write,
    ) -> Result<u8, CliError> {
        let requests: Requests = Api::namespaced(client.clone(), self.namespace);
        let mut request = self.read(&requests).await?;
        let shown = request.clone();
        write!(out, "{}", describe(&request, Timestamp::now(), paint))?;
        out.flush()?;
        let person = whoami(client).await?;
        for _ in 0..TRIES {
            if (request.uid(), &request.spec) != (shown.uid(), &shown.spec) {
                return Err(CliError::new(format!(
                    "expected the ApprovalRequest {}/{} that is shown above, found another with that name; read it, and decide again",
                    self.namespace, self.name
                )));
            }
            if let Some(why) = refusal(&request, &person, self.answer, Timestamp::now()) {
                writeln!(notes, "not written: {}", Safe(&why))?;
                return Ok(1);
            }
            match self.write(&requests, &request, &person).await {
                Ok(DeserializeGuard(Ok(after))) => {
                    let state = words(&after, Timestamp::now());
                    writeln!(out, "your decision is written; it is now {}", paint.strong(Safe(&state)))?;
                    return Ok(0);
                }
                Ok(DeserializeGuard(Err(e))) => {
                    return Err(CliError::new(not_understood(self.namespace, self.name, &e.error)));
                }
                // Another approver decided meanwhile, so there may be nothing left to decide.
                Err(kube::Error::Api(status)) if status.is_conflict() => request = self.read(&requests).await?,
                // Admission or RBAC denied it. They have the last word.
                Err(kube::Error::Api(status)) if status.is_forbidden() => {
                    writeln!(notes, "not written: {}", Safe(&status.message))?;
                    return Ok(1);
                }
                Err(e) => {
                    return Err(CliError::new(format!(
                        "cannot write to ApprovalRequest {}/{}: {}; run belay approvals to see whether it was written",
                        self.namespace,
                        self.name,
                        explain(&e)
                    )));
                }
            }
        }
        Err(CliError::new(format!(
            "expected ApprovalRequest {}/{} to stay unchanged for a moment, found {TRIES} changes; try again",
            self.namespace, self.name
        )))
    }

    async fn read(&self, requests: &Requests) -> Result<ApprovalRequest, CliError> {
        let (namespace, name) = (self.namespace, self.name);
        let unreadable = |e| CliError::new(format!("cannot read ApprovalRequest {namespace}/{name}: {}", explain(&e)));
        match requests.get_opt(name).await.map_err(unreadable)? {
            Some(DeserializeGuard(Ok(request))) => Ok(request),
            Some(DeserializeGuard(Err(e))) => Err(CliError::new(not_understood(namespace, name, &e.error))),
            None => Err(CliError::new(format!(
                "there is no ApprovalRequest {name} in namespace {namespace}; see belay approvals, or give another -n"
            ))),
        }
    }

    /// Adds the decision to the decisions that were read, if the request has not changed since.
    async fn write(
        &self,
        requests: &Requests,
        request: &ApprovalRequest,
        person: &Person,
    ) -> kube::Result<DeserializeGuard<ApprovalRequest>> {
        let mut decisions = votes(request).to_vec();
        let reason = self.reason.map(str::to_owned);
        decisions.push(Vote { by: person.name.clone(), decision: self.answer, reason });
        let patch = json!({
            "metadata": {"uid": request.uid(), "resourceVersion": request.resource_version()},
            "status": {"decisions": decisions},
        });
        requests.patch_status(self.name, &PatchParams::default(), &Patch::Merge(&patch)).await
    }
}

/// Returns the current user.
async fn whoami(client: Client) -> Result<Person, CliError> {
    let reviews: Api<SelfSubjectReview> = Api::all(client);
    let review = reviews.create(&PostParams::default(), &SelfSubjectReview::default()).await.map_err(|e| {
        CliError::new(format!("cannot ask the API server who you are (SelfSubjectReview): {}", explain(&e)))
    })?;
    let user = review.status.and_then(|status| status.user_info).unwrap_or_default();
    match user.username.filter(|name| !name.is_empty()) {
        Some(name) => Ok(Person { name, groups: user.groups.unwrap_or_default() }),
        None => Err(CliError::new(
            "expected the API server to say who you are, found no name; log in with credentials that have one",
        )),
    }
}

fn not_understood(namespace: &str, name: &str, error: &dyn std::fmt::Display) -> String {
    format!("this belay cannot read ApprovalRequest {namespace}/{name}: {error}")
}

fn stands(request: &ApprovalRequest, now: Timestamp) -> ApprovalState {
    state(&asked(&request.spec), votes(request), now)
}

/// Returns how many approvals count: the highest required number for which they would be enough.
fn approvals(request: &ApprovalRequest) -> i64 {
    let yes: Vec<_> = votes(request).iter().filter(|vote| vote.decision == Answer::Approve).cloned().collect();
    let enough = |required: &i64| {
        let asked = ApprovalTerms { required: *required, expires: Timestamp::MAX, ..asked(&request.spec) };
        state(&asked, &yes, Timestamp::MIN) == ApprovalState::Approved
    };
    (1..).take_while(enough).last().unwrap_or_default()
}

/// Returns the state of a request, in words. The text is not safe to show yet.
fn words(request: &ApprovalRequest, now: Timestamp) -> String {
    let (has, needs) = (approvals(request), request.spec.required);
    let count = format!("{has} of {needs} approval{}", if needs == 1 { "" } else { "s" });
    match stands(request, now) {
        ApprovalState::Pending => format!("pending, {count}"),
        ApprovalState::Approved => format!("approved, {count}"),
        ApprovalState::Denied => {
            let by: Vec<_> = votes(request).iter().filter(|vote| vote.decision == Answer::Deny).collect();
            format!("denied by {}", by.iter().map(|vote| vote.by.as_str()).collect::<Vec<_>>().join(", "))
        }
        ApprovalState::Expired => format!("expired, {count}"),
    }
}

/// Returns why a decision would be denied or would change nothing. The gateway checks that the request shows the arguments of the call, and
/// accepts no approval of other arguments.
fn refusal(request: &ApprovalRequest, person: &Person, answer: Answer, now: Timestamp) -> Option<String> {
    let spec = &request.spec;
    if let Some(own) = votes(request).iter().find(|vote| vote.by == person.name) {
        return Some(format!(
            "expected no decision of {} yet, found {:?}; a decision is final",
            person.name, own.decision
        ));
    }
    match (stands(request, now), answer) {
        (ApprovalState::Pending, _) | (ApprovalState::Approved, Answer::Deny) => {}
        (ApprovalState::Approved, Answer::Approve) | (ApprovalState::Denied | ApprovalState::Expired, _) => {
            return Some(format!(
                "expected an undecided request, found it {}; there is nothing left to decide",
                words(request, now)
            ));
        }
    }
    let barred = if spec.principal == person.name {
        Some("on whose behalf the agent acts")
    } else if spec.requester.as_ref() == Some(&person.name) {
        Some("who created the task")
    } else {
        None
    };
    if let (Some(who), Answer::Approve) = (barred, answer) {
        return Some(format!(
            "expected an approval by another user than {}, {who}; have another approver decide, or deny the call",
            person.name
        ));
    }
    let approvers = &spec.approvers;
    let member = person.groups.iter().any(|group| approvers.groups.contains(group));
    if !approvers.users.contains(&person.name) && !member {
        return Some(format!(
            "expected an approver ({}), found {}; have an approver decide, or have the ToolContract name you in approval.approvers",
            who_may(request),
            person.name
        ));
    }
    None
}

fn who_may(request: &ApprovalRequest) -> String {
    let named = |one: &str, names: &[String]| (!names.is_empty()).then(|| format!("{one} {}", names.join(", ")));
    let approvers = &request.spec.approvers;
    let all: Vec<_> = named("user", &approvers.users).into_iter().chain(named("group", &approvers.groups)).collect();
    if all.is_empty() { "no user".to_owned() } else { all.join(" or ") }
}

fn verb(answer: Answer) -> &'static str {
    match answer {
        Answer::Approve => "approved",
        Answer::Deny => "denied",
    }
}

/// Returns everything that an approver needs to decide. Nothing is cut, because the part that is not shown may be the one that matters.
pub(super) fn describe(request: &ApprovalRequest, now: Timestamp, paint: Paint) -> String {
    let spec = &request.spec;
    let (name, words) = (request.name_any(), words(request, now));
    let state = match stands(request, now) {
        ApprovalState::Pending => paint.warn(Safe(&words)),
        ApprovalState::Approved => paint.good(Safe(&words)),
        ApprovalState::Denied | ApprovalState::Expired => paint.bad(Safe(&words)),
    };
    let mut text = format!("{}  {state}\n", paint.strong(Safe(&name)));
    let mut line = |name: &str, value: String| {
        let mut name = name;
        for part in value.split('\n') {
            // Writing to a String does not fail.
            let _ = writeln!(text, "  {}{part}", paint.dim(format_args!("{name:<11}")));
            name = "";
        }
    };
    let task = &spec.task;
    line("task", format!("{}, attempt {}, on behalf of {}", Safe(&task.name), task.attempt, Safe(&spec.principal)));
    if let Some(requester) = &spec.requester {
        line("created by", Safe(requester).to_string());
    }
    let again = match spec.repeats {
        0 => String::new(),
        1 => "; the same call was approved and made once before".to_owned(),
        times => format!("; the same call was approved and made {times} times before"),
    };
    line("tool", format!("{}{again}", Safe(&spec.tool)));
    line("required", format!("by the {}", spec.requested_by.as_str().to_lowercase()));
    for reason in &spec.reasons {
        line("reason", Safe(reason).to_string());
    }
    line("arguments", arguments(&spec.arguments));
    line("may decide", Safe(&who_may(request)).to_string());
    for vote in votes(request) {
        let reason = vote.reason.as_ref().map(|reason| format!(": {}", Safe(reason))).unwrap_or_default();
        line("decided", format!("{} by {}{reason}", verb(vote.decision), Safe(&vote.by)));
    }
    let expires = spec.expires_at.0;
    let left = SignedDuration::from_secs(expires.duration_since(now).as_secs());
    let when = if left.is_positive() { format!("in {left:#}") } else { format!("{:#} ago", left.abs()) };
    line("expires", format!("{when}, at {expires}"));
    text
}

/// Returns the arguments indented if that has the same canonical form, and otherwise as they are.
fn arguments(text: &str) -> String {
    let same = |value: &Value| canonical::to_bytes(value).is_ok_and(|bytes| bytes == text.as_bytes());
    let value: Option<Value> = serde_json::from_str(text).ok().filter(same);
    match value.and_then(|value| serde_json::to_string_pretty(&value).ok()) {
        Some(pretty) => safe_json(&pretty),
        None => Safe(text).to_string(),
    }
}
