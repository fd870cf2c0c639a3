//! Run and watch AI agents, approve their calls, and verify their evidence.

use std::{ffi::OsString, process::ExitCode};

use belay::inherited::Descriptor;

fn main() -> ExitCode {
    // Before anything is opened, and before there is a thread or a child: what lies beyond standard error is somebody else's.
    let inherited = belay::inherited::descriptors();
    let args: Vec<OsString> = std::env::args_os().collect();
    if !belay::cli::hands_on(&args) {
        belay::inherited::keep_from_children();
    }
    run(args, inherited)
}

/// Threads beside the first, which shows what happens and hears who types.
const THREADS: usize = 2;

fn run(args: Vec<OsString>, inherited: std::io::Result<Vec<Descriptor>>) -> ExitCode {
    // rustls takes no guesses between providers. Only fails if there is one already.
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
    let code = runtime.block_on(belay::cli::run(args, inherited));
    // A disk that does not answer keeps a thread, and must not keep us.
    runtime.shutdown_background();
    code
}
