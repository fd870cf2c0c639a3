//! `belay run` on this machine: a real gateway, harness and sandbox, agents that try to get out, and runs that end badly.
//!
//! Each story runs in namespaces of its own. There the internet's addresses are on loopback, and every process that a run leaves behind is
//! visible.

#[macro_use]
mod world;

mod channels;
mod ends;
mod escape;
mod examples;
mod inherited;
mod mistakes;
mod newcomer;
mod options;
mod people;
mod secret;
mod shells;
mod stuck;
