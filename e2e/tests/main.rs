//! Belay on a real cluster: tests from outside, of what a user sees.
//!
//! `e2e/test` runs them inside the test cluster's network, with the chart installed. Each test has a namespace of its own and leaves
//! nothing behind. They run one after the other, because two cores can run only one sandboxed agent beside the cluster.
#![allow(clippy::print_stderr, reason = "progress of long tests")]

mod approval;
mod attack;
mod bad_input;
mod canaries;
mod chaos;
mod compare;
mod completion;
mod disruption;
mod escape;
mod injected;
mod laptop;
mod lifecycle;
mod locks;
mod private;
mod rollback;
#[path = "../secrets.rs"]
mod secrets;
mod support;
