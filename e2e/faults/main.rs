//! Calls and evidence under faults: the real harness, the real gateway and a real S3 store with Object Lock, each a process that can be
//! killed; relays between them that can break connections; an agent's MCP client; and an upstream that counts calls.
//!
//! Each world has network, mount and process namespaces of its own ([`alone`]): its ports are fixed, nothing leaves it, and its processes
//! end with it. Only the API server is scripted ([`api`]). [`judge`] checks what must be true in every world, whatever happened in it:
//! every effect has an intent that was in the store before, no acknowledged record is lost, and the log is valid.
//!
//! The tests need root, strace, faketime and versitygw; `e2e/checks/faults` sets them up. A plain `cargo test` does not run them.
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
