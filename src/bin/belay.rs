//! Watch AI agents on their rope, decide what waits for people, and verify what was done.

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

#[tokio::main(flavor = "current_thread")]
async fn run(args: Vec<OsString>, inherited: std::io::Result<Vec<Descriptor>>) -> ExitCode {
    // rustls takes no guesses between providers. Only fails if there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    belay::cli::run(args, inherited).await
}
