//! Belay runs AI agents under enforced limits: a Kubernetes operator, a harness, a policy gateway, and evidence that can be verified.
//!
//! Data flows in one direction: [`api`] → [`policy`] → [`render`] → [`operator`], and
//! [`api`] → [`policy`] → [`harness`] → [`gateway`] → [`evidence`] → [`verify`]. Cargo features separate the parts: the harness is built
//! without a Kubernetes client, and the verifier without Kubernetes or S3.
#![doc(html_no_source)]

/// Health, readiness and metrics endpoints of Belay's processes.
#[cfg(feature = "net")]
pub mod admin;
/// Evaluations on separate threads, with a time limit.
#[cfg(any(feature = "gateway", feature = "harness"))]
pub mod apart;
/// The custom resources: data types and validation rules.
#[cfg(feature = "kube")]
pub mod api;
/// RFC 8785 canonical JSON and its SHA-256.
pub mod canonical;
/// The serving certificates of the gateway and the webhook.
#[cfg(any(feature = "gateway", feature = "operator"))]
pub mod certificate;
/// The `belay` command.
#[cfg(feature = "cli")]
pub mod cli;
/// The connection of a process to the API server.
#[cfg(any(feature = "gateway", feature = "operator"))]
pub mod contact;
/// The ends of attempts and what follows from them.
pub mod ends;
/// Records, Merkle logs, checkpoints, segments and stores.
pub mod evidence;
/// Bodies whose frames are written before the error that ends them.
#[cfg(feature = "net")]
pub mod flushed;
/// The only way out of an agent's pod, and the witness of the evidence.
#[cfg(feature = "gateway")]
pub mod gateway;
/// The sidecar that enforces contracts and limits.
#[cfg(feature = "harness")]
pub mod harness;
/// Connections between a harness and a gateway in one process.
#[cfg(feature = "net")]
pub mod in_process;
/// The file descriptors that a process inherited.
pub mod inherited;
/// Decoding that survives objects from newer or older versions.
#[cfg(feature = "kube")]
pub mod lenient;
/// Decisions about the next step of a task, from the observed state of its pods.
#[cfg(feature = "kube")]
pub mod lifecycle;
/// The tools that an MCP server lists.
#[cfg(any(feature = "harness", feature = "mcp-client"))]
pub mod listed;
/// The reconciler: resolve, validate, render, apply, status.
#[cfg(feature = "operator")]
pub mod operator;
/// The output of a process, written by a separate thread.
pub mod output;
/// Pure decisions about tasks and calls.
pub mod policy;
/// Turns a validated task into the objects that run it.
#[cfg(feature = "kube")]
pub mod render;
/// The pauses between the tries of a request.
#[cfg(feature = "net")]
pub mod retry;
/// Limits the memory for bodies that are held in memory as a whole.
#[cfg(feature = "net")]
pub mod room;
/// Runs a task on this machine, without a cluster.
#[cfg(feature = "run")]
pub mod run;
/// Asks the gateway to seal a task's log.
#[cfg(feature = "net")]
pub mod seal;
/// Runs recursive work on a thread with a large stack.
#[cfg(feature = "kube")]
pub mod stack;
/// Logs and traces of Belay's processes.
#[cfg(feature = "telemetry")]
pub mod telemetry;
/// Runs a program to its end beside the threads of another runtime.
#[cfg(feature = "net")]
pub mod threads;
/// Recomputes a log from its leaves and reports every violation.
pub mod verify;
/// The protocol between harness, operator and gateway.
pub mod wire;
