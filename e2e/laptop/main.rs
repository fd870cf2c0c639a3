//! `belay run` on this machine: a real gateway, harness and sandbox, agents that try to get out, and runs that do not end well.
//!
//! Each story is told in namespaces of its own, in which the addresses of the internet are somebody's on loopback, and in which whoever
//! is left behind is seen.

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
