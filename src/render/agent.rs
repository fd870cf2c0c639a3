//! Describes the agent of an attempt as plain data. The pod's container and the sandbox of `belay run` are built from it.
//!
//! Guarantees: Belay's variables come first, and the task's variables cannot replace them. Paths that a runtime leaves writable, and that
//! the task does not declare, are among the paths to cover.
//!
//! Non-goals: Knowledge of what runs the agent.

use super::{
    quantity::Quantity,
    validated::{OPEN_PATHS, ReadOnlyMount, Scope, Validated, Workload},
};

/// The harness's port for agents, on localhost.
pub const PORT: u16 = 9900;
/// The agent's user, whatever its image says. It is never the harness's user.
pub const UID: i64 = 1000;

/// The agent of one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent<'a> {
    /// What runs in the agent container.
    pub workload: &'a Workload,
    /// The environment variables, in order.
    pub env: Vec<(String, String)>,
    /// CPU.
    pub cpu: &'a Quantity,
    /// Memory, in bytes.
    pub memory: &'a Quantity,
    /// Ephemeral storage, in bytes.
    pub ephemeral_storage: &'a Quantity,
    /// The read-only mounts.
    pub mounts: &'a [ReadOnlyMount],
    /// The directories that the agent may write to.
    pub write_scopes: &'a [Scope],
    /// The open paths that the task does not declare.
    pub covered: Vec<&'static str>,
}

impl Validated {
    /// Returns the agent of the attempt with this number.
    pub fn agent(&self, number: i64) -> Agent<'_> {
        Agent {
            workload: &self.workload,
            env: self.environment(number),
            cpu: &self.resources.cpu,
            memory: &self.resources.memory,
            ephemeral_storage: &self.resources.ephemeral_storage,
            mounts: &self.mounts,
            write_scopes: &self.write_scopes,
            covered: OPEN_PATHS.into_iter().filter(|open| !self.declares(open)).collect(),
        }
    }

    fn declares(&self, path: &str) -> bool {
        let mounts = self.mounts.iter().map(|one| &one.path);
        mounts.chain(self.write_scopes.iter().map(|one| &one.path)).any(|declared| declared.as_str() == path)
    }

    fn environment(&self, number: i64) -> Vec<(String, String)> {
        let base = format!("http://127.0.0.1:{PORT}");
        let own = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut env = vec![
            own("OPENAI_BASE_URL", &format!("{base}/v1")),
            own("OPENAI_API_KEY", "belay"),
            own("ANTHROPIC_BASE_URL", &base),
            own("ANTHROPIC_API_KEY", "belay"),
            own("BELAY_MCP_URL", &format!("{base}/mcp")),
        ];
        env.extend(["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"].map(|name| own(name, &base)));
        env.extend(["NO_PROXY", "no_proxy"].map(|name| own(name, "127.0.0.1,localhost")));
        env.push(own("BELAY_OBJECTIVE", &self.objective));
        env.push(own("BELAY_TASK", &self.owner.name));
        env.push(own("BELAY_ATTEMPT", &number.to_string()));
        env.extend(self.env.iter().map(|(name, value)| (name.as_str().to_owned(), value.clone())));
        env
    }
}
