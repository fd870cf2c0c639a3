//! Run and watch AI agents, approve their calls, and verify their evidence.

use std::{ffi::OsString, process::ExitCode};

use belay::inherited::Descriptor;

fn main() -> ExitCode {
    // Before anything is opened, and before there is a thread or a child process: descriptors beyond standard error belong to the caller.
    let inherited = belay::inherited::descriptors();
    let args: Vec<OsString> = std::env::args_os().collect();
    if !belay::cli::hands_on(&args) {
        belay::inherited::keep_from_children();
    }
    run(args, inherited)
}

/// The number of threads in addition to the first one, which draws the screen and reads the keyboard.
const THREADS: usize = 2;

fn run(args: Vec<OsString>, inherited: std::io::Result<Vec<Descriptor>>) -> ExitCode {
    // rustls needs one explicit provider. Installing fails only if there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            belay::output::stderr().say(format!("error: cannot start threads: {error}\n").into_bytes());
            belay::output::stderr().end();
            return ExitCode::FAILURE;
        }
    };
    belay::threads::run_until_exit(runtime, belay::cli::run(args, inherited))
}
