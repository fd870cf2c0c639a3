use parking_lot::Mutex;

use super::*;
use crate::gateway::testing;

/// Records what was written.
#[derive(Default)]
struct Written(Mutex<Vec<Usage>>);

impl WriteUsage for Written {
    fn write<'a>(&'a self, _: &'a str, _: &'a str, _: &'a str, usage: Usage) -> BoxFuture<'a, Result<(), String>> {
        self.0.lock().push(usage);
        Box::pin(async { Ok(()) })
    }
}

fn task(usage: Option<Usage>) -> AgentTask {
    serde_json::from_value(json!({
        "metadata": { "namespace": "team", "name": "t", "uid": testing::UID },
        "spec": {
            "objective": "x", "workflowClass": "support", "principal": "jane", "agent": { "image": "a" },
            "limits": { "wallTimeSeconds": 1, "toolCalls": 4, "tokens": 0 },
        },
        "status": { "usage": usage },
    }))
    .unwrap()
}

fn calls(tool_calls: i64) -> Usage {
    Usage { tool_calls, ..Usage::default() }
}

#[tokio::test]
async fn a_running_task_is_written_once_at_half_of_a_limit() {
    let written = Arc::new(Written::default());
    let status = UsageStatus::new(written.clone(), testing::metrics());
    for n in 0..4 {
        status.running(&task(None), calls(n)).await;
    }
    assert_eq!(*written.0.lock(), [calls(2)]);
    // Another replica has written the usage.
    let other = UsageStatus::new(written.clone(), testing::metrics());
    other.running(&task(Some(calls(2))), calls(3)).await;
    assert_eq!(written.0.lock().len(), 1);
}

#[tokio::test]
async fn an_ended_task_is_written_if_that_changes_anything() {
    let written = Arc::new(Written::default());
    let status = UsageStatus::new(written.clone(), testing::metrics());
    status.ended(&task(None), Usage::default()).await;
    status.ended(&task(Some(calls(3))), calls(3)).await;
    assert!(written.0.lock().is_empty());
    status.ended(&task(Some(calls(2))), calls(3)).await;
    assert_eq!(*written.0.lock(), [calls(3)]);
}
