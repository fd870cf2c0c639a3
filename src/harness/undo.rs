//! Rolling back a task: the calls of its plan, newest first.
//!
//! Promises: each goes through the same pipeline as an agent's call, with the arguments that were kept and no others; one that fails does
//! not keep the others from being made; what is left to people is named with its reason. Refuses: to run in an attempt that is no
//! rollback. Asked twice, it makes no call twice.

use std::{net::SocketAddr, path::Path, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    body::{Body, boxed},
    mcp::Tools,
};
use crate::{
    evidence::rollback::{By, Standing, Undo},
    wire::KeptOf,
};

/// Where the harness is asked to roll back. It answers when it is done, which may take as long as people do to approve.
pub const PATH: &str = "/rollback";
/// Longest answer: a line for each step.
const LONGEST: usize = 8 << 20;
/// So often calls are tried that fail and certainly did nothing.
const ROUNDS: u32 = 3;
/// Between two tries.
const BETWEEN_ROUNDS: Duration = Duration::from_secs(5);
/// Between two questions to a harness that is being started again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// So often it is asked.
const QUESTIONS: u32 = 60;
/// Longest text for the kubelet to keep, which cuts what is longer than 4 KiB.
const LONGEST_MESSAGE: usize = 4000;

/// What a rollback came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Calls that are undone, by their names in the other task's log.
    pub undone: Vec<String>,
    /// Calls that are left to people.
    pub left: Vec<Left>,
}

/// A call that is left to people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The call.
    pub call: String,
    /// Its tool.
    pub tool: String,
    /// Why, or how to undo it.
    pub why: String,
    /// Whether that was so from the start.
    pub by_people: bool,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} calls undone", self.undone.len(), self.undone.len().saturating_add(self.left.len()))?;
        self.left.iter().try_for_each(|left| write!(f, "\nleft to people: {} {}: {}", left.call, left.tool, left.why))
    }
}

/// Rolls back, and answers with the [`Report`].
pub async fn handle(tools: &Tools) -> Response<Body> {
    let Some(report) = run(tools).await else {
        return reply(StatusCode::NOT_FOUND, "this task is no rollback\n".into());
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

/// Makes the calls that are due, and those that fail and are still due some more times. `None` if there is nothing to roll back.
async fn run(tools: &Tools) -> Option<Report> {
    let mut report = round(tools).await?;
    for _ in 1..ROUNDS {
        let due = |left: &Left| standing(tools, &left.call) == Some(Standing::Due) && !left.by_people;
        if !report.left.iter().any(due) {
            break;
        }
        tokio::time::sleep(BETWEEN_ROUNDS).await;
        report = round(tools).await?;
    }
    Some(report)
}

fn standing(tools: &Tools, call: &str) -> Option<Standing> {
    tools.gate().standing(call)
}

async fn round(tools: &Tools) -> Option<Report> {
    let plan = tools.gate().rollback_plan()?;
    let mut report = Report::default();
    for step in plan.steps {
        let undone = match (&step.by, standing(tools, &step.call)) {
            (By::People(why), _) => Err(why.clone()),
            (By::Call(_), Some(Standing::Undone)) => Ok(()),
            (By::Call(_), Some(Standing::Unknown)) => Err("whether it was undone is not known".into()),
            (By::Call(undo), _) => match arguments(tools, &step.call, undo).await {
                Ok(arguments) => tools.undo(&step.call, undo, arguments).await,
                Err(reason) => Err(reason),
            },
        };
        match undone {
            Ok(()) => report.undone.push(step.call),
            Err(why) => {
                tracing::warn!(call = step.call, tool = step.tool, why, "left to people");
                let by_people = matches!(step.by, By::People(_));
                report.left.push(Left { call: step.call, tool: step.tool, why, by_people });
            }
        }
    }
    Some(report)
}

/// The arguments that were kept, if they are those of the plan.
async fn arguments(tools: &Tools, call: &str, undo: &Undo) -> Result<Map<String, Value>, String> {
    let of = KeptOf { call: call.to_owned(), digest: undo.request_digest.clone() };
    let kept = tools.gate().link().kept(&of).await.map_err(|error| error.to_string())?;
    let arguments: Value = serde_json::from_str(&kept).map_err(|error| format!("what was kept is no JSON: {error}"))?;
    let found = tools.gate().salt().value(&arguments).map_err(|error| error.to_string())?;
    match arguments {
        Value::Object(arguments) if found == undo.request_digest => Ok(arguments),
        _ => Err(format!("expected arguments of digest {}, found {found}", undo.request_digest)),
    }
}

/// Has the harness of this pod roll back, and says what came of it: to whoever reads the log, and for the pod's status. It is asked again
/// where it does not answer: it may have been started again, and goes on then.
///
/// # Errors
/// If the harness cannot be asked.
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
        tracing::warn!(%error, "the pod's status will not say what is left to people");
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
