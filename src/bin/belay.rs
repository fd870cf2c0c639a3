//! Watch AI agents on their rope, decide what waits for people, and verify what was done.

use std::process::ExitCode;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // rustls takes no guesses between providers. Only fails if there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    belay::cli::run(std::env::args_os()).await
}
