//! The containment probe of a run: the harness's own probe, from within the sandbox, with controls from outside.
//!
//! Guarantees: before the agent starts, `belay` itself runs in the sandbox that the agent gets. It reaches the harness, and neither the
//! gateway, the canary nor a public address. At the same time a process outside reaches the gateway and the canary, so their silence is due
//! to the sandbox. The probe has no file descriptor, terminal, capability or key of the caller. It is shown a folder in the same way as the
//! agent's folders. There it does not reach sockets and FIFOs of processes outside, whenever they were created, and does not see hidden
//! files, whenever they are replaced. A probe that did not run is an error, never a sign of isolation.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::{net::TcpStream, process::Command};

use self::shown::{Inside, Outside};

use super::{
    RunError,
    sandbox::{Bind, Cell, Runtime, hold::Hold},
};
use crate::{
    evidence::record::Containment,
    harness::{
        probe::{self, Looking, Targets, Timing, distrust},
        server,
    },
    inherited::{self, Descriptor},
    policy::config::Probe,
};

/// What a sandbox is shown, seen from outside and from within.
mod shown;

/// The hidden subcommand of `belay` that runs the probe.
pub const PROBE: &str = "__probe";
/// The folder of `belay` and its libraries in the sandbox that it probes.
const PLACE: &str = "/.belay";
/// Other addresses: a public host, a resolver, and the metadata service of a cloud. The probe only connects and sends nothing.
const PUBLIC: [&str; 3] = ["1.1.1.1:443", "8.8.8.8:53", "169.254.169.254:80"];
/// The timing before the agent starts. Nothing has to settle here, unlike the network of a cluster.
const START: Timing = Timing { patience: Duration::from_secs(3), ..Timing::START };
/// The time limit of the whole probe, including a slow start of the sandbox.
const LONGEST: Duration = Duration::from_secs(60);

/// The argument of the hidden subcommand.
#[derive(Serialize, Deserialize)]
struct Question {
    targets: Targets,
    timing: Timing,
    /// What to check for inside, if the probe runs in a sandbox like the agent's.
    inside: Option<Inside>,
}

/// Addresses that answer outside and must not answer inside.
#[derive(Clone, Debug)]
pub struct Controls {
    /// The gateway and the canary.
    pub outside: Vec<SocketAddr>,
}

impl Controls {
    /// Returns them in the form of an attempt's wiring.
    pub fn wiring(&self) -> Probe {
        let outside = self.outside.iter().map(SocketAddr::to_string);
        Probe { reachable: server::AGENT.to_string(), unreachable: outside.chain(PUBLIC.map(str::to_owned)).collect() }
    }

    /// Returns those that do not answer from outside.
    async fn silent(&self) -> Vec<String> {
        let mut silent = Vec::new();
        for address in &self.outside {
            let answers = tokio::time::timeout(Duration::from_secs(2), TcpStream::connect(address)).await;
            if !matches!(answers, Ok(Ok(_))) {
                silent.push(format!(
                    "{address} does not answer outside the sandbox, so its silence inside proves nothing"
                ));
            }
        }
        silent
    }
}

/// Runs the probe in a sandbox like the agent's, and returns what it saw.
///
/// # Errors
/// Returns an error if the probe did not run.
pub async fn from_within(
    (runtime, cell): (&Runtime, &Cell),
    hold: &Hold,
    controls: &Controls,
    (belay, folder): (&Path, &Path),
) -> Result<Containment, RunError> {
    let (folder, shown) = (&folder.join("probe"), folder.join("shown"));
    let failed = |what: String| RunError::Sandbox(format!("the containment probe did not run in the sandbox: {what}"));
    let (command, mut binds) = ourselves(belay).map_err(|error| failed(error.to_string()))?;
    let outside = Outside::make(&shown).map_err(|error| failed(format!("{}: {error}", shown.display())))?;
    let inside = Inside { folder: format!("{PLACE}/shown").into() };
    binds.push(outside.bind(&inside));
    let question = question(&Targets::new(&controls.wiring(), None), START, Some(inside))?;
    let command = command.into_iter().chain([PROBE.to_owned(), question]).collect();
    let before = controls.silent().await;
    let child = runtime.start(&cell.running(command, binds), hold, (belay, folder))?;
    let ended = tokio::select! {
        ended = tokio::time::timeout(LONGEST, child.wait_with_output()) => ended,
        error = outside.change() => return Err(failed(format!("{}: {error}", shown.display()))),
    };
    let said = ended.map_err(|_| failed(format!("no answer in {LONGEST:?}")))?.map_err(|e| failed(e.to_string()))?;
    runtime.clear(folder);
    let mut seen =
        read(&said.stdout).ok_or_else(|| failed(String::from_utf8_lossy(&said.stderr).trim().replace('\n', "; ")))?;
    distrust(&mut seen, before.into_iter().chain(controls.silent().await).chain(outside.silent()));
    drop(outside);
    let _ = fs::remove_dir_all(&shown);
    Ok(seen)
}

/// Repeats the probe while the agent runs, from the network namespace of the agent.
pub struct Again {
    /// The process that holds the namespace.
    pub pid: u32,
    /// The controls.
    pub controls: Controls,
    /// The path of this program.
    pub belay: PathBuf,
}

impl Looking for Again {
    fn look(&self, timing: Timing) -> BoxFuture<'_, Containment> {
        Box::pin(async move {
            let targets = Targets::new(&self.controls.wiring(), None);
            let mut seen = match self.ask(&targets, timing).await {
                Ok(seen) => seen,
                Err(error) => Containment {
                    contained: false,
                    rounds: 0,
                    millis: 0,
                    reachable: self.controls.wiring().reachable,
                    unreachable: self.controls.wiring().unreachable,
                    breaches: vec![error.to_string()],
                },
            };
            distrust(&mut seen, self.controls.silent().await);
            seen
        })
    }
}

impl Again {
    async fn ask(&self, targets: &Targets, timing: Timing) -> Result<Containment, RunError> {
        let failed = |what: String| RunError::Sandbox(format!("the containment probe did not run: {what}"));
        let mut command = Command::new("nsenter");
        command.args(["--preserve-credentials", "--user", "--net", "--target", &self.pid.to_string(), "--"]);
        command.arg(&self.belay).arg(PROBE).arg(question(targets, timing, None)?);
        command.kill_on_drop(true).process_group(0).stdin(std::process::Stdio::null());
        let ended = tokio::time::timeout(LONGEST, command.output()).await;
        let said = ended.map_err(|_| failed("no answer".into()))?.map_err(|error| failed(error.to_string()))?;
        read(&said.stdout).ok_or_else(|| failed(String::from_utf8_lossy(&said.stderr).trim().to_owned()))
    }
}

fn question(targets: &Targets, timing: Timing, inside: Option<Inside>) -> Result<String, RunError> {
    serde_json::to_string(&Question { targets: targets.clone(), timing, inside })
        .map_err(|e| RunError::Sandbox(e.to_string()))
}

/// Returns the last line that parses as an answer.
fn read(said: &[u8]) -> Option<Containment> {
    said.split(|byte| *byte == b'\n').rev().find_map(|line| serde_json::from_slice(line).ok())
}

/// Runs the hidden subcommand on its question, and returns the answer.
///
/// # Errors
/// Returns an error if the question cannot be parsed.
pub async fn answer(question: &str, inherited: &std::io::Result<Vec<Descriptor>>) -> Result<String, String> {
    let Question { targets, timing, inside } = serde_json::from_str(question).map_err(|error| error.to_string())?;
    let mut seen = probe::run(&targets, timing).await;
    if let Some(inside) = inside {
        distrust(&mut seen, inherited::breaches(inherited).into_iter().chain(inside.breaches().await));
    }
    serde_json::to_string(&seen).map_err(|error| error.to_string())
}

/// Returns the command and the binds that start `belay` in a sandbox that may lack everything else: `belay` and the libraries that it has
/// loaded now.
fn ourselves(belay: &Path) -> std::io::Result<(Vec<String>, Vec<Bind>)> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let loaded: BTreeSet<&str> = maps.lines().filter_map(|line| Some(line.get(line.find('/')?..)?.trim())).collect();
    let libraries = loaded.into_iter().filter(|path| path.rsplit('/').next().is_some_and(|name| name.contains(".so")));
    let program = format!("{PLACE}/belay");
    let mut binds = vec![Bind::new(belay, program.clone())];
    let mut loader = None;
    for path in libraries {
        let name = path.rsplit('/').next().unwrap_or_default();
        let to = format!("{PLACE}/{name}");
        if name.starts_with("ld-") {
            loader = Some(to.clone());
        }
        binds.push(Bind::new(path, to));
    }
    let command = match loader {
        Some(loader) => vec![loader, "--library-path".into(), PLACE.into(), program],
        None => vec![program],
    };
    Ok((command, binds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_control_that_is_silent_outside_proves_nothing() {
        let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = gone.local_addr().unwrap();
        let controls = Controls { outside: vec![address] };
        assert_eq!(controls.silent().await, Vec::<String>::new());
        drop(gone);
        let mut seen = Containment {
            contained: true,
            rounds: 3,
            millis: 1,
            reachable: String::new(),
            unreachable: vec![],
            breaches: vec![],
        };
        distrust(&mut seen, controls.silent().await);
        assert!(!seen.contained && seen.breaches.len() == 1, "{seen:?}");
    }
}
