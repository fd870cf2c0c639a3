//! The harness's output: each line that is a record of the evidence, one attempt after the other.
//!
//! A missing pod, a container that has not started and a broken stream are retried. Retries stop when a newer attempt or the end of the
//! task shows that nothing more will come. Records that were already shown are left out.

use std::collections::VecDeque;

use futures::{AsyncBufReadExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::LogParams};
use tokio::{
    sync::{mpsc, watch},
    time::{Duration, sleep},
};

use super::super::cluster::explain;
use crate::evidence::record::{DOCUMENTS, Record};

/// The container of the harness.
const CONTAINER: &str = "harness";
/// The pause between two requests for the output of a starting pod.
const PAUSE: Duration = Duration::from_millis(500);
/// The time in which the last output of an ended attempt is still read.
const GRACE: Duration = Duration::from_secs(3);

/// The progress of a task, from its status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// The number of the newest attempt, or 0 before the first.
    pub(super) newest: i64,
    /// Whether the task has ended.
    pub(super) ended: bool,
}

impl Progress {
    /// Returns whether nothing more will come from this attempt.
    fn is_past(self, attempt: i64) -> bool {
        self.ended || self.newest > attempt
    }
}

/// An event for the view.
#[derive(Debug)]
pub(super) enum Event {
    /// A record.
    Record {
        /// The attempt whose pod printed it.
        attempt: i64,
        /// The record.
        record: Box<Record>,
    },
    /// A notice for the user.
    Notice(String),
}

/// The receiver is gone.
struct Gone;

/// Follows every attempt until the task has ended.
pub(super) async fn follow(
    pods: Api<Pod>,
    task: String,
    mut progress: watch::Receiver<Progress>,
    events: mpsc::Sender<Event>,
) {
    for attempt in 1.. {
        if progress.wait_for(|p| p.newest >= attempt || p.ended).await.is_err() {
            return;
        }
        if progress.borrow().newest < attempt {
            return;
        }
        let pod = Follower {
            pods: &pods,
            name: format!("{task}-{attempt}"),
            attempt,
            next: 0,
            before: VecDeque::new(),
            events: &events,
        };
        if pod.run(&mut progress).await.is_err() {
            return;
        }
    }
}

/// The follower of one attempt's pod.
struct Follower<'a> {
    pods: &'a Api<Pod>,
    name: String,
    attempt: i64,
    /// The number of the first record that is not shown yet.
    next: u64,
    /// The last lines, which may contain the documents of the next record.
    before: VecDeque<String>,
    events: &'a mpsc::Sender<Event>,
}

impl Follower<'_> {
    async fn run(mut self, progress: &mut watch::Receiver<Progress>) -> Result<(), Gone> {
        let mut told = None;
        loop {
            let past = progress.borrow_and_update().is_past(self.attempt);
            match self.read(!past, progress).await? {
                Ok(()) => told = None,
                // 404: there is no pod yet, or no longer. 400: its container has not started.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 400) => {}
                Err(kube::Error::Api(status)) if matches!(status.code, 401 | 403) => {
                    self.notice(format!("only the status is shown: {}", status.message)).await?;
                    let attempt = self.attempt;
                    return progress.wait_for(|p| p.is_past(attempt)).await.map(|_| ()).map_err(|_| Gone);
                }
                Err(e) => {
                    let notice = format!("the logs of {}: {}; trying again", self.name, explain(&e));
                    if told.as_ref() != Some(&notice) {
                        self.notice(notice.clone()).await?;
                        told = Some(notice);
                    }
                }
            }
            if past {
                return Ok(());
            }
            sleep(PAUSE).await;
        }
    }

    /// Reads the pod's output from its start and follows it until it ends or the attempt is over.
    async fn read(
        &mut self,
        follow: bool,
        progress: &mut watch::Receiver<Progress>,
    ) -> Result<Result<(), kube::Error>, Gone> {
        let params = LogParams { container: Some(CONTAINER.to_owned()), follow, ..LogParams::default() };
        let stream = match self.pods.log_stream(&self.name, &params).await {
            Ok(stream) => stream,
            Err(e) => return Ok(Err(e)),
        };
        let mut lines = std::pin::pin!(stream.lines());
        let attempt = self.attempt;
        let mut over = std::pin::pin!(async {
            // An error means that the receiver is gone. Sending notices that.
            let _ = progress.wait_for(|p| p.is_past(attempt)).await;
            sleep(GRACE).await;
        });
        loop {
            let line = tokio::select! {
                line = lines.try_next() => line,
                () = &mut over => return Ok(Ok(())),
            };
            match line {
                Ok(Some(line)) => self.line(&line).await?,
                // A broken stream is read again from its start.
                Ok(None) | Err(_) => return Ok(Ok(())),
            }
        }
    }

    async fn line(&mut self, line: &str) -> Result<(), Gone> {
        let record = parse(line, &self.before, self.attempt);
        if self.before.len() == DOCUMENTS.len() {
            self.before.pop_front();
        }
        self.before.push_back(line.to_owned());
        let Some(record) = record else { return Ok(()) };
        if record.seq < self.next {
            return Ok(());
        }
        if self.next > 0 && record.seq > self.next {
            let last = record.seq.saturating_sub(1);
            self.notice(format!("records {} to {last} were not seen here; the evidence has them", self.next)).await?;
        }
        self.next = record.seq.saturating_add(1);
        self.events.send(Event::Record { attempt: self.attempt, record }).await.map_err(|_| Gone)
    }

    async fn notice(&self, notice: String) -> Result<(), Gone> {
        self.events.send(Event::Notice(notice)).await.map_err(|_| Gone)
    }
}

/// Parses the record in a line, if it is one of this attempt. `before` are the lines before it, the newest last, and its documents are the
/// newest of them. All other output of the harness is its own log.
fn parse(line: &str, before: &VecDeque<String>, attempt: i64) -> Option<Box<Record>> {
    let decode = |skip| Record::decode(line.as_bytes(), &mut before.iter().skip(skip).map(String::as_bytes)).ok();
    let record = (0..=before.len()).rev().find_map(decode)?;
    (record.attempt == attempt).then(|| Box::new(record))
}

#[cfg(test)]
mod tests;
