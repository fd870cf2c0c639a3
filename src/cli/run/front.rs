//! The output of a run, and the questions to the approver at the terminal.
//!
//! Guarantees: records, output of the agent and questions appear in the order in which they happened. Text goes through `Safe`. JSON output
//! is one line for each event. Nothing waits for the reader of the output (see [`Output`](crate::output::Output)): lost lines are counted.
//! Without a terminal nothing is asked, and silence is never an approval.

use std::{
    io::{self, BufRead, IsTerminal},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::json;
use tokio::{
    sync::mpsc::{self, Receiver, UnboundedReceiver},
    time::{MissedTickBehavior, interval},
};

use super::Output as Form;
use crate::{
    api::{
        AgentTask, ApprovalRequest,
        agent_task::{AgentTaskStatus, Phase},
    },
    cli::{
        approve,
        terminal::{Paint, Safe},
        watch::{
            screen::{Screen, width},
            view::View,
        },
    },
    ends::TIME_OVER,
    evidence::record::{Event, Record},
    output::{Kept, Output},
    policy::approval::Answer,
    run::{Outcome, RunError, RunEvent, objects::Api},
};

/// The reason of an attempt whose wall time is over.
const OUT_OF_TIME: &str = TIME_OVER.1;
/// The time between two redraws of the panel.
const TICK: Duration = Duration::from_millis(500);

/// The approver at this terminal.
pub(super) struct Person {
    /// Their name.
    pub(super) name: String,
    /// The tools whose calls they have approved in advance.
    pub(super) beforehand: Vec<String>,
    /// Where their decisions are stored.
    pub(super) api: Arc<Api>,
}

/// The output and its state.
pub(super) struct Front<'p> {
    output: Form,
    view: View,
    screen: Screen<Vec<u8>>,
    out: Output,
    /// The permits of lines that are written next.
    slots: Vec<Kept>,
    paint: Paint,
    terminal: bool,
    task: AgentTask,
    person: &'p mut Person,
    /// The requests that wait for an answer. The first one is asked about.
    questions: Vec<ApprovalRequest>,
    answers: Option<Receiver<String>>,
}

impl<'p> Front<'p> {
    pub(super) fn new(output: Form, task: &AgentTask, person: &'p mut Person) -> Self {
        let out = io::stdout();
        let terminal =
            output == Form::Text && out.is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let paint = Paint::new(terminal);
        let (namespace, name) = (task.namespace().unwrap_or_default(), task.name_any());
        let mut view = View::new(&namespace, &name, paint);
        view.task(task);
        // Without a terminal there are no answers.
        let answers = (terminal && io::stdin().is_terminal()).then(lines);
        Self {
            output,
            view,
            screen: Screen::new(Vec::new(), terminal),
            out: Output::to(out, if output == Form::Json { missing_as_json } else { missing }),
            slots: Vec::new(),
            paint,
            terminal,
            task: task.clone(),
            person,
            questions: Vec::new(),
            answers,
        }
    }

    /// Shows events until the run has ended.
    pub(super) async fn show(
        &mut self,
        running: impl Future<Output = Result<Outcome, RunError>>,
        told: &mut UnboundedReceiver<RunEvent>,
    ) -> Result<Outcome, RunError> {
        let mut running = std::pin::pin!(running);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let ended = loop {
            tokio::select! {
                Some(one) = told.recv() => self.told(one),
                Some(answer) = next(&mut self.answers) => self.answer(&answer),
                ended = &mut running => break ended,
                _ = tick.tick() => self.overdue(),
            }
            self.draw();
        };
        while let Ok(one) = told.try_recv() {
            self.told(one);
        }
        self.draw();
        ended
    }

    fn told(&mut self, told: RunEvent) {
        if let RunEvent::Asked(request) = &told {
            self.asked(request);
        }
        if self.output == Form::Json {
            return self.told_as_json(told);
        }
        match told {
            RunEvent::Step(step) => self.view.notice(&step),
            RunEvent::Started { attempt } => {
                self.task.status = Some(AgentTaskStatus {
                    phase: Some(Phase::Running),
                    attempt: Some(attempt),
                    ..AgentTaskStatus::default()
                });
                self.view.task(&self.task);
            }
            RunEvent::Record(record) => self.view.record(record.attempt, &record),
            RunEvent::Said { line, slot, .. } => {
                self.view.said(&line);
                self.slots.push(Box::new(slot));
            }
            RunEvent::Lost(lines) => self.view.notice(missing(lines).trim_end()),
            RunEvent::Asked(_) => {}
            RunEvent::Unmade { call, reason } => self.view.unmade(&call, reason),
            RunEvent::Trouble(trouble) => self.view.notice(&trouble),
            RunEvent::Pause(until) => self.view.notice(&format!("another attempt at {until:.0}")),
        }
    }

    fn told_as_json(&mut self, told: RunEvent) {
        let line = match &told {
            RunEvent::Step(step) => json!({"event": "step", "step": step}),
            RunEvent::Started { attempt } => json!({"event": "started", "attempt": attempt}),
            RunEvent::Record(record) => json!({"event": "record", "record": brief(record)}),
            RunEvent::Said { error, line, goes_on, .. } => {
                let mut said =
                    json!({"event": "said", "stream": if *error { "stderr" } else { "stdout" }, "line": line});
                if let Some(said) = said.as_object_mut().filter(|_| *goes_on) {
                    said.insert("goesOn".to_owned(), true.into());
                }
                said
            }
            RunEvent::Lost(lines) => json!({"event": "lost", "lines": lines}),
            RunEvent::Asked(request) => {
                json!({"event": "approval", "name": request.name_any(), "request": request.spec})
            }
            RunEvent::Unmade { call, reason } => json!({"event": "unmade", "call": call, "reason": reason}),
            RunEvent::Trouble(trouble) => json!({"event": "trouble", "trouble": trouble}),
            RunEvent::Pause(until) => json!({"event": "pause", "until": until.to_string()}),
        };
        let kept: Vec<Kept> = match told {
            RunEvent::Said { slot, .. } => vec![Box::new(slot)],
            _ => vec![],
        };
        self.out.say_kept(format!("{line}\n").into_bytes(), kept);
    }

    /// Handles a request for approval.
    fn asked(&mut self, request: &ApprovalRequest) {
        let spec = &request.spec;
        let barred =
            [Some(spec.principal.as_str()), spec.requester.as_deref()].contains(&Some(self.person.name.as_str()));
        if self.person.beforehand.contains(&spec.tool) && !barred {
            let reason = "approved in advance with --approve".to_owned();
            self.person.api.decide(&request.name_any(), &self.person.name, Answer::Approve, Some(reason));
            return;
        }
        if self.output == Form::Text {
            for line in approve::describe(request, Timestamp::now(), self.paint).lines() {
                self.view.line(line.to_owned());
            }
            if barred {
                self.view.notice(&format!(
                    "{} may not approve, because the agent acts for them or they created the task: name yourself with --as NAME; a denial counts",
                    self.person.name
                ));
            }
            if !barred && !spec.approvers.users.contains(&self.person.name) {
                self.view.notice(&format!(
                    "this machine does not check that {} is an approver: the record has the name that you gave",
                    self.person.name
                ));
            }
            if spec.required > 1 {
                self.view.notice(&format!(
                    "the call needs {} approvers, and only one is here: the call can only be denied",
                    spec.required
                ));
            }
            if self.answers.is_none() {
                self.view.notice(&format!(
                    "no approver is here: the call is denied at {:.0}; --approve {} approves it in advance",
                    spec.expires_at.0, spec.tool
                ));
            }
        }
        if self.answers.is_some() {
            self.questions.push(request.clone());
        }
    }

    fn answer(&mut self, answer: &str) {
        let Some(request) = self.questions.first() else { return };
        let (word, reason) = answer.trim().split_once(char::is_whitespace).unwrap_or((answer.trim(), ""));
        let decision = match word.to_lowercase().as_str() {
            "y" | "yes" => Answer::Approve,
            "n" | "no" => Answer::Deny,
            _ => {
                self.view.notice("expected y or n, and a reason if you like, such as `n this is the wrong order`");
                return;
            }
        };
        let reason = Some(reason.trim().chars().take(1024).collect::<String>()).filter(|reason| !reason.is_empty());
        self.person.api.decide(&request.name_any(), &self.person.name, decision, reason);
        self.questions.remove(0);
    }

    /// Removes the requests that have expired without an answer.
    fn overdue(&mut self) {
        let now = Timestamp::now();
        self.questions.retain(|request| request.spec.expires_at.0 > now);
    }

    fn draw(&mut self) {
        if self.output == Form::Json {
            return;
        }
        let mut panel = if self.terminal { self.view.panel(width()) } else { Vec::new() };
        if let Some(request) = self.questions.first() {
            let question = format!("? {}: y or n, and why", Safe(&request.spec.tool));
            panel.push(self.paint.warn(question));
        }
        self.show_lines(&panel);
    }

    /// Writes the pending lines and draws the panel below them.
    fn show_lines(&mut self, panel: &[String]) {
        let lines = self.view.take_lines();
        // Writing to memory does not fail.
        let _ = self.screen.show(&lines, panel);
        let text = std::mem::take(self.screen.out());
        if !text.is_empty() {
            self.out.say_kept(text, std::mem::take(&mut self.slots));
        }
    }

    /// Reports how the run ended, and waits a short time for the rest to be read.
    pub(super) fn end(&mut self, ended: &Result<Outcome, RunError>, log: &str, check: &str) {
        if self.output == Form::Json {
            let line = match ended {
                Ok(Outcome { closed, sealed, trouble }) => json!({
                    "event": "ended", "closed": closed, "usage": sealed.usage, "denied": sealed.denied, "size": sealed.size, "root": sealed.root,
                    "evidence": log, "verify": check, "trouble": trouble,
                }),
                Err(error) => json!({"event": "failed", "error": error.to_string(), "evidence": log, "verify": check}),
            };
            self.out.say(format!("{line}\n").into_bytes());
            return self.out.end();
        }
        match ended {
            Ok(Outcome { closed, sealed, trouble }) => {
                if let Some(trouble) = trouble {
                    self.view.notice(trouble);
                }
                let phase = if closed.has_succeeded() { Phase::Succeeded } else { Phase::Failed };
                let class =
                    if closed.failure_class.is_empty() { String::new() } else { format!("{}, ", closed.failure_class) };
                let refused = sealed.denied.in_words().map(|refused| format!("; {refused}")).unwrap_or_default();
                let limit = match closed.reason.as_str() {
                    OUT_OF_TIME => {
                        format!("; spec.limits.wallTimeSeconds is {}", self.task.spec.limits.wall_time_seconds)
                    }
                    _ => String::new(),
                };
                let attempt = self.task.status.as_ref().and_then(|status| status.attempt);
                self.task.status = Some(AgentTaskStatus {
                    phase: Some(phase),
                    reason: Some(format!("{class}{}{limit}{refused}", closed.reason)),
                    attempt,
                    ..AgentTaskStatus::default()
                });
                self.view.task(&self.task);
                self.view.finish();
            }
            Err(error) => self.view.notice(&format!("error: {error}")),
        }
        self.view.line(format!("{:<11}{}", self.paint.dim("evidence"), Safe(log)));
        self.view.line(format!("{:<11}{}", self.paint.dim("verify"), Safe(check)));
        self.show_lines(&[]);
        self.out.end();
    }
}

fn missing(lines: u64) -> String {
    format!("… {lines} lines of output were dropped because they were not read\n")
}

fn missing_as_json(lines: u64) -> String {
    format!("{}\n", json!({"event": "lost", "lines": lines}))
}

/// Returns a record as JSON. The policy that the first record refers to is in the evidence.
fn brief(record: &Record) -> serde_json::Value {
    debug_assert!(!matches!(&record.event, Event::AttemptOpened(opened) if opened.verifier_key.is_empty()));
    serde_json::to_value(record).unwrap_or_default()
}

/// Returns the next answer, or never.
async fn next(answers: &mut Option<Receiver<String>>) -> Option<String> {
    match answers {
        Some(answers) => answers.recv().await,
        None => std::future::pending().await,
    }
}

/// Reads lines from the keyboard. The thread ends with the process, because only another line wakes it.
fn lines() -> Receiver<String> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
