//! Belay on a real cluster: what a user would notice, asserted from outside.
//!
//! Run by `make test` inside the test cluster's network, with the chart installed. Each test has a namespace of its own
//! and leaves nothing behind. They run one after the other: two cores hold one sandboxed agent and its cluster.
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
mod rollback;
#[path = "../secrets.rs"]
mod secrets;
mod support;
