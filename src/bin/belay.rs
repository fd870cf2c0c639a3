//! Watch AI agents on their rope, decide what waits for people, and verify what was done.

use std::process::ExitCode;

/// Threads beside the first, which shows what happens and hears who types.
const THREADS: usize = 2;

fn main() -> ExitCode {
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
    let code = runtime.block_on(belay::cli::run(std::env::args_os()));
    // A disk that does not answer keeps a thread, and must not keep us.
    runtime.shutdown_background();
    code
}
