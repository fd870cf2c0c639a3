//! The rollback of a task: makes the compensations of its plan, newest call first.
//!
//! Guarantees: each compensation goes through the same pipeline as an agent's call, with the stored arguments and no others. A failed
//! compensation does not stop the others. Calls that are left for manual action are listed with the reason. An attempt that is not a
//! rollback makes none. A repeated request makes no call twice.

use std::{net::SocketAddr, path::Path, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    body::{Body, boxed},
    tools::Tools,
};
use crate::{
    evidence::rollback::{By, CompensationState, Undo},
    wire::StateRef,
};

/// The path of the request to roll back. The reply comes when the rollback is done, which may take as long as approvers need.
pub const PATH: &str = "/rollback";
/// The longest reply, in bytes. It has one entry for each step.
const LONGEST: usize = 8 << 20;
/// How often compensations are made that failed and certainly had no effect.
const ROUNDS: u32 = 3;
/// The pause between two rounds.
const BETWEEN_ROUNDS: Duration = Duration::from_secs(5);
/// The pause between two requests to a harness that is restarting.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How often the request is repeated.
const QUESTIONS: u32 = 60;
/// The longest text for the pod's status. The kubelet cuts texts above 4 KiB.
const LONGEST_MESSAGE: usize = 4000;

/// The result of a rollback.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The calls that are compensated, by their names in the other task's log.
    pub undone: Vec<String>,
    /// The calls that are left for manual action.
    pub left: Vec<Left>,
}

/// A call that is left for manual action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The name of the call.
    pub call: String,
    /// The tool of the call.
    pub tool: String,
    /// The reason, or how to undo the call manually.
    pub why: String,
    /// Whether the plan left the call for manual action from the start.
    pub by_people: bool,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} calls undone", self.undone.len(), self.undone.len().saturating_add(self.left.len()))?;
        self.left
            .iter()
            .try_for_each(|left| write!(f, "\nleft for manual action: {} {}: {}", left.call, left.tool, left.why))
    }
}

/// Rolls back and replies with the [`Report`].
pub async fn handle(tools: &Tools) -> Response<Body> {
    let Some(report) = run(tools).await else {
        return reply(StatusCode::NOT_FOUND, "this task is not a rollback\n".into());
    };
    match serde_json::to_vec(&report) {
        Ok(text) => reply(StatusCode::OK, text.into()),
        Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into()),
    }
}

fn reply(status: StatusCode, text: Bytes) -> Response<Body> {
    let mut reply = Response::new(boxed(Full::from(text).map_err(|error: std::convert::Infallible| match error {})));
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

/// Makes the compensations that are due, and repeats those that failed and are still due. Returns `None` if this task is not a rollback.
async fn run(tools: &Tools) -> Option<Report> {
    let mut report = round(tools).await?;
    for _ in 1..ROUNDS {
        let due = |left: &Left| state(tools, &left.call) == Some(CompensationState::Due) && !left.by_people;
        if !report.left.iter().any(due) {
            break;
        }
        tokio::time::sleep(BETWEEN_ROUNDS).await;
        report = round(tools).await?;
    }
    Some(report)
}

fn state(tools: &Tools, call: &str) -> Option<CompensationState> {
    tools.gate().compensation(call)
}

async fn round(tools: &Tools) -> Option<Report> {
    let plan = tools.gate().rollback_plan()?;
    let mut report = Report::default();
    for step in plan.steps {
        let undone = match (&step.by, state(tools, &step.call)) {
            (By::People(why), _) => Err(why.clone()),
            (By::Call(_), Some(CompensationState::Undone)) => Ok(()),
            (By::Call(_), Some(CompensationState::Unknown)) => Err("whether it was undone is not known".into()),
            (By::Call(undo), _) => match arguments(tools, &step.call, undo).await {
                Ok(arguments) => tools.undo(&step.call, undo, arguments).await,
                Err(reason) => Err(reason),
            },
        };
        match undone {
            Ok(()) => report.undone.push(step.call),
            Err(why) => {
                tracing::warn!(call = step.call, tool = step.tool, why, "left for manual action");
                let by_people = matches!(step.by, By::People(_));
                report.left.push(Left { call: step.call, tool: step.tool, why, by_people });
            }
        }
    }
    Some(report)
}

/// Returns the stored arguments of a compensation, if they match the plan's commitment.
async fn arguments(tools: &Tools, call: &str, undo: &Undo) -> Result<Map<String, Value>, String> {
    let of = StateRef { call: call.to_owned(), digest: undo.request_commitment.clone() };
    let kept = tools.gate().link().get_state(&of).await.map_err(|error| error.to_string())?;
    let arguments: Value =
        serde_json::from_str(&kept).map_err(|error| format!("the stored arguments are not JSON: {error}"))?;
    let found = tools.gate().salt().value(&arguments).map_err(|error| error.to_string())?;
    match arguments {
        Value::Object(arguments) if found == undo.request_commitment => Ok(arguments),
        _ => Err(format!("expected stored arguments with the digest {}, found {found}", undo.request_commitment)),
    }
}

/// Asks the harness of this pod to roll back, and writes the result for the pod's status. Asks again if the harness does not reply, because
/// it may be restarting and continues then.
///
/// # Errors
/// Returns an error if the harness cannot be asked.
pub async fn ask(harness: SocketAddr, message: &Path) -> std::io::Result<Report> {
    let mut questions: u32 = 0;
    let report = loop {
        match question(harness).await {
            Err(error) if questions < QUESTIONS => {
                tracing::warn!(%error, "the harness is asked again");
                questions = questions.saturating_add(1);
                tokio::time::sleep(ASK_AGAIN).await;
            }
            done => break done?,
        }
    };
    let mut told = report.to_string();
    told.truncate(told.floor_char_boundary(LONGEST_MESSAGE));
    if let Err(error) = std::fs::write(message, told) {
        tracing::warn!(%error, "the pod's status will not say what is left for manual action");
    }
    Ok(report)
}

async fn question(harness: SocketAddr) -> std::io::Result<Report> {
    let stream = tokio::net::TcpStream::connect(harness).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(other)?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(Method::POST)
        .uri(PATH)
        .header(header::HOST, harness.to_string())
        .body(Empty::<Bytes>::new())
        .map_err(other)?;
    let answer = sender.send_request(request).await.map_err(other)?;
    let status = answer.status();
    let text = Limited::new(answer.into_body(), LONGEST).collect().await.map_err(std::io::Error::other)?.to_bytes();
    if !status.is_success() {
        return Err(other(format!("the harness answered {status}: {}", String::from_utf8_lossy(&text).trim())));
    }
    serde_json::from_slice(&text).map_err(other)
}

fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> std::io::Error {
    std::io::Error::other(error)
}
