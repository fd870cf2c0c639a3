//! What runs in the agent's place, as plain data: the pod's container and the sandbox of `belay run` are made of the same.
//!
//! Promises: Belay's variables come first and the user's cannot take their place; what a runtime leaves writable and nobody has
//! declared is among what is to be covered. Refuses: to know who runs it.

use super::{
    quantity::Quantity,
    validated::{OPEN_PATHS, ReadOnlyMount, Scope, Validated, Workload},
};

/// Port of the harness for agents, on localhost.
pub const PORT: u16 = 9900;
/// User of the agent, whatever its image says: never the harness's.
pub const UID: i64 = 1000;

/// The agent of one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent<'a> {
    /// What to run.
    pub workload: &'a Workload,
    /// Its environment, in order.
    pub env: Vec<(String, String)>,
    /// Processors.
    pub cpu: &'a Quantity,
    /// Bytes of memory.
    pub memory: &'a Quantity,
    /// Bytes on disk.
    pub ephemeral_storage: &'a Quantity,
    /// What it sees.
    pub mounts: &'a [ReadOnlyMount],
    /// Where it may write.
    pub write_scopes: &'a [Scope],
    /// Open paths that the task declares nothing for.
    pub covered: Vec<&'static str>,
}

impl Validated {
    /// The agent of the attempt of this number.
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
