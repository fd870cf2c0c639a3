//! Belay puts AI agents on a rope: a Kubernetes operator, a harness, a policy gateway and evidence that verifies.
//!
//! Data flows one way: [`api`] → [`policy`] → [`plan`] → [`operator`], and
//! [`api`] → [`policy`] → [`harness`] → [`gateway`] → [`evidence`] → [`verify`]. Features are walls: the harness is built
//! without a Kubernetes client, the verifier without Kubernetes or S3.
#![doc(html_no_source)]

/// Health, readiness and metrics of our own processes.
#[cfg(feature = "net")]
pub mod admin;
/// Judgments on threads of their own.
#[cfg(any(feature = "gateway", feature = "harness"))]
pub mod apart;
/// The custom resources: data and validation rules.
#[cfg(feature = "kube")]
pub mod api;
/// RFC 8785 canonical JSON and its SHA-256.
pub mod canonical;
/// The serving certificates of gateway and webhook.
#[cfg(any(feature = "gateway", feature = "operator"))]
pub mod certificate;
/// The `belay` command.
#[cfg(feature = "cli")]
pub mod cli;
/// How a process stands to the API server.
#[cfg(any(feature = "gateway", feature = "operator"))]
pub mod contact;
/// Records, Merkle log, checkpoints, segments, stores.
pub mod evidence;
/// Bodies that break off after what came before has been written.
#[cfg(feature = "net")]
pub mod flushed;
/// The only way out of an agent's pod, and the witness of its evidence.
#[cfg(feature = "gateway")]
pub mod gateway;
/// The sidecar that enforces contracts and budgets.
#[cfg(feature = "harness")]
pub mod harness;
/// What a process was given by whoever started it.
pub mod inherited;
/// Objects that may not be what this version expects.
#[cfg(feature = "kube")]
pub mod lenient;
/// From what is seen of a task's pods to what comes next.
#[cfg(feature = "kube")]
pub mod lifecycle;
/// The reconciler: resolve, validate, plan, apply, status.
#[cfg(feature = "operator")]
pub mod operator;
/// What processes say, by threads of their own.
pub mod output;
/// A validated task becomes the objects that run it.
#[cfg(feature = "kube")]
pub mod plan;
/// Pure decisions.
pub mod policy;
/// Room for bodies that are held in memory whole.
#[cfg(feature = "net")]
pub mod room;
/// A task on this machine, without a cluster.
#[cfg(feature = "run")]
pub mod run;
/// Has the gateway end a task's log.
#[cfg(feature = "net")]
pub mod seal;
/// Room for recursion.
#[cfg(feature = "kube")]
pub mod stack;
/// Logs and traces of our own processes.
#[cfg(feature = "telemetry")]
pub mod telemetry;
/// Recomputes a log from its leaves and reports what does not hold.
pub mod verify;
/// What harness, operator and gateway say to each other.
pub mod wire;
