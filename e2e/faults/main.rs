//! What becomes of calls and evidence when things break: the real harness, the real gateway and a real S3 store with Object Lock, each a
//! process that can be killed, with wires between them that can be cut, an agent's MCP client, and an upstream that counts.
//!
//! Each world has network, mount and process namespaces of its own ([`alone`]): ports are fixed, nothing leaves, and what it started
//! ends with it. Only the API server is scripted ([`api`]). What must hold of every world, whatever happened in it, is [`judge`]'s:
//! no effect without an intent that lay in the store before, no record lost that was acknowledged, and a log that is valid.
//!
//! It needs root, strace, faketime and versitygw: `e2e/checks/faults` has them. A plain `cargo test` leaves it out.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a world says is all that its test learns of it")]

mod alone;
mod api;
mod clocks;
mod disk;
mod judge;
mod kills;
mod process;
mod relay;
mod stores;
mod upstream;
mod world;
