//! `belay run`: runs a task on this machine and shows it live.
//!
//! Guarantees: everything that can be found wrong is reported before anything starts. Text from the agent and its upstreams reaches the
//! terminal only through `Safe`. The exit code says how the task ended. Without a terminal nothing is asked.
//!
//! Non-goals: running as root where that is not needed. The isolation is the same, but an escape would reach the whole machine.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::ValueEnum;
use kube::ResourceExt;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use self::{
    front::{Front, Person},
    given::{Credential, From, Resolved, Server},
    home::{Folder, Home},
};
use super::{CliError, EXIT_ERROR, terminal::Safe};
use crate::{
    ends::FailureClass,
    evidence::{
        record::Local,
        store::{Location, log_prefix},
    },
    gateway::options::NameServer,
    policy::hostname::Hostname,
    run::{
        self, Options, Outcome, RunError, gateway,
        objects::Api,
        sandbox::{Kind, Runtime, root::Image, view},
        store::{Kept, Place, Troubles},
        upstream::Upstream,
    },
};

/// Checks the options against the files.
mod before;
/// Reads the objects from files.
mod files;
/// The output and the questions.
mod front;
/// The values of options.
mod given;
/// What is stored for the user.
mod home;

/// The exit code for a log that could not be sealed: it is incomplete.
const EXIT_UNSEALED: u8 = 3;
/// Run a task on this machine: no cluster, the same decisions.
///
/// Gateway and harness run in this process. The agent runs in a sandbox: gVisor if it is installed, bubblewrap otherwise. The agent sees
/// this machine's programs and the task's folder (/workspace), read-only. It can write where the task says. It can reach the harness and
/// nothing else. The containment probe runs before the agent starts, and every decision is in the evidence. If the task mounts or writes
/// something at /workspace or below, its folder is /task. What the agent writes is deleted at the end of the run.
///
/// The agent inherits nothing from this command: no descriptor, variable or signal. It does not see the files of Secrets and of
/// --credential, evidence, or Belay's own files. In a folder with such a file, it sees the entries that existed at the start. It does see
/// other secrets in a folder that is shown (.env, .git): keep them elsewhere.
///
/// `belay run` does not pull the task's `image`. `agent.command` runs with this machine's programs, or with those of --root. An OCI bundle
/// in --root, as `umoci unpack` makes one, says what to run, where and in which environment, as the image does in a cluster.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay run hello/task.yaml
      A task with its contracts and its pack in the same folder.
  belay run task.yaml --packs policy-packs/dev --contracts contracts/ --credential model-key/token=env:OPENAI_API_KEY
      Pack and contracts from elsewhere, and the credential that the pack's class names.
  belay run task.yaml --resolve model.localhost=127.0.0.1:11434
      A model on this machine. Belay dials loopback addresses only if you name them. The class must list the host.
  belay run hello/task.yaml --upstream shop.test='python3 hello/standin.py'
      Your own server in place of an upstream. It starts and ends with the run.
  skopeo copy docker://registry.example.com/agent:1 oci:agent:1 && umoci unpack --rootless --image agent:1 bundle
  belay run task.yaml --root bundle
      A task from a cluster with its own image, unpacked by other tools.
  belay run task.yaml --store s3://evidence/laptops --output json
      Evidence in a bucket, and a line of JSON for each event.

On a laptop, you hold the witness's key yourself, and a folder has no Object Lock. `belay verify` says so:
VALID, self-witnessed, unlocked store.

Exit codes:
  0    the task succeeded
  1    its agent failed (class Agent)
  2    nothing was run: a file, an option or the sandbox is wrong
  3    the log could not be sealed: it verifies as INCOMPLETE
  4    class Policy: too many denials, or a call that was not approved
  5    class Budget: the wall time is over
  6    class Infrastructure: the sandbox, the harness or the evidence store failed; isolation could not be proven
  130  the run was stopped (Ctrl-C, SIGTERM): first the agent, then the log was sealed")]
pub(super) struct Args {
    /// File with the AgentTask
    task: PathBuf,
    /// Folder or file with ToolContracts; repeatable [default: the task's folder]
    #[arg(long, value_name = "PATH")]
    contracts: Vec<PathBuf>,
    /// Folder or file with PolicyPacks; repeatable [default: the task's folder]
    #[arg(long, value_name = "PATH")]
    packs: Vec<PathBuf>,
    /// Name of the PolicyPack, if there are several
    #[arg(long, value_name = "NAME")]
    pack: Option<String>,
    /// Folder for evidence [default: ~/.local/state/belay/evidence]
    #[arg(long, value_name = "DIR", conflicts_with = "store")]
    evidence: Option<PathBuf>,
    /// Bucket for evidence, s3://BUCKET or s3://BUCKET/PREFIX. With Object Lock, objects are locked as the pack says
    #[arg(long, value_name = "URL")]
    store: Option<Location>,
    /// URL of the object store, unless it is AWS
    #[arg(long, value_name = "URL", env = "AWS_ENDPOINT_URL_S3")]
    endpoint: Option<String>,
    /// Region of the bucket
    #[arg(long, env = "AWS_REGION")]
    region: Option<String>,
    /// File with certificates (PEM) to trust for the object store
    #[arg(long, value_name = "FILE", env = "AWS_CA_BUNDLE")]
    ca_bundle: Option<PathBuf>,
    /// The sandbox
    #[arg(long, value_enum, default_value_t = Sandbox::Auto)]
    sandbox: Sandbox,
    /// Folder of an unpacked image whose programs the agent gets instead of this machine's: an OCI bundle, or a bare root
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Another folder of this machine that the agent sees, read-only, at the same path; repeatable
    #[arg(long, value_name = "DIR")]
    ro: Vec<PathBuf>,
    /// The folder that the agent sees as /workspace, read-only [default: the task's folder]
    #[arg(long, value_name = "DIR")]
    workspace: Option<PathBuf>,
    /// Any address for a host, as HOST=ADDRESS[:PORT]; repeatable. The evidence records it
    #[arg(long, value_name = "HOST=ADDR")]
    resolve: Vec<Resolved>,
    /// A command that serves a host, started for the run with PORT in its environment; repeatable
    ///
    /// The server runs outside the sandbox, with your permissions. It must listen on 127.0.0.1:$PORT. It ends with the run.
    #[arg(long, value_name = "HOST=COMMAND")]
    upstream: Vec<Server>,
    /// A credential for an upstream, as SECRET/KEY=env:VARIABLE or SECRET/KEY=file:PATH; repeatable
    #[arg(long, value_name = "SECRET/KEY=FROM")]
    credential: Vec<Credential>,
    /// File with certificates (PEM) to trust for upstreams, in addition to the public ones
    #[arg(long, value_name = "FILE")]
    upstream_ca: Option<PathBuf>,
    /// A name server, ADDRESS or ADDRESS:PORT, instead of this machine's; repeatable
    #[arg(long, value_name = "ADDR")]
    nameserver: Vec<NameServer>,
    /// Approve calls of this tool in advance; repeatable. The evidence records it as your decision
    #[arg(long, value_name = "TOOL")]
    approve: Vec<String>,
    /// The name under which you decide [default: your user name]
    #[arg(long = "as", value_name = "NAME")]
    by: Option<String>,
    /// Format of the output
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sandbox {
    /// gVisor if it is installed, bubblewrap otherwise
    Auto,
    /// gVisor
    #[value(alias = "gvisor")]
    Runsc,
    /// bubblewrap
    #[value(alias = "bubblewrap")]
    Bwrap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Human-readable text
    Text,
    /// One JSON object a line
    Json,
}

impl Args {
    /// Returns whether traffic to the host stays on this machine, by the same rule as the gateway's dialer.
    fn stays_here(&self, host: &Hostname) -> bool {
        let mut resolved =
            self.resolve.iter().filter(|one| one.host == *host).map(|one| one.address.ip().is_loopback());
        self.upstream.iter().any(|one| one.host == *host) || resolved.next_back().unwrap_or(false)
    }
}

/// Runs the task and returns the exit code.
pub(super) async fn run(args: &Args) -> Result<u8, CliError> {
    let asked =
        files::Asked { task: &args.task, contracts: &args.contracts, packs: &args.packs, pack: args.pack.as_deref() };
    let files::Loaded { mut objects, secret_files, warnings } = files::load(&asked)?;
    for credential in &args.credential {
        files::add_credential(&mut objects, &credential.secret, &credential.key, credential.value()?);
    }
    if let Some(Location { bucket, prefix }) = &args.store {
        let prefix = prefix.trim_end_matches('/');
        objects.pack.spec.evidence.bucket.clone_from(bucket);
        objects.pack.spec.evidence.prefix = (!prefix.is_empty()).then(|| prefix.to_owned());
    }
    let root = args.root.as_deref().map(|folder| Image::open(whole(folder)?).map_err(trouble)).transpose()?;
    let validated = run::validate(&objects, root.as_ref()).map_err(trouble)?;
    let missing: Vec<_> = files::missing_credentials(&objects)
        .into_iter()
        .map(|(host, one)| {
            format!(
                "expected a key for {host}, by which the pack's class reaches it, found none; add --credential {}/{}=env:VARIABLE, or a Secret `{}` with the label belay.dev/upstream-credential: \"true\"",
                one.secret, one.key, one.secret
            )
        })
        .chain(files::unfit_credentials(&objects))
        .chain(before::unlisted(&objects, &args.resolve, &args.upstream))
        .chain(before::in_the_clear(&objects, &warnings, &|host| args.stays_here(host)))
        .collect();
    if !missing.is_empty() {
        return Err(CliError::Listed(missing));
    }
    for note in before::unused(&objects, &args.credential) {
        crate::output::stderr().say(format!("note: {}\n", Safe(&note)).into_bytes());
    }
    let wanted = match args.sandbox {
        Sandbox::Auto => None,
        Sandbox::Runsc => Some(Kind::Gvisor),
        Sandbox::Bwrap => Some(Kind::Bubblewrap),
    };
    let runtime = Runtime::find(wanted).map_err(trouble)?;
    let workspace = whole(args.workspace.as_deref().unwrap_or(&files::folder_of(&args.task)))?;
    let read_only = args.ro.iter().map(|path| whole(path)).collect::<Result<Vec<_>, _>>()?;
    if let Some(top) = read_only.iter().find(|path| path.parent().is_none()) {
        let top = top.display();
        return Err(CliError::new(format!(
            "--ro: expected a folder that the agent needs, found {top}, which is all of this machine; name the folder"
        )));
    }
    if let Some(finding) = run::program::wrong(&validated, root.as_ref(), (&workspace, &read_only)).map_err(trouble)? {
        return Err(CliError::new(finding.to_string()));
    }

    let home = Home::find()?;
    let signer = home.signer()?;
    let witness = signer.verifier();
    let uid = objects.task.uid().unwrap_or_default();
    let evidence = args.evidence.clone().unwrap_or_else(|| home.state.join("evidence"));
    let place = place(args, &evidence)?;
    let store = args.store.as_ref().map_or(Local::FOLDER.to_owned(), |at| format!("s3://{}", at.bucket));
    let credentials = args.credential.iter().filter_map(|one| match &one.from {
        From::File(path) => Some(path),
        From::Variable(_) => None,
    });
    let mut hidden: Vec<PathBuf> = secret_files.iter().chain(credentials).flat_map(|file| view::names(file)).collect();
    if args.store.is_none() {
        fs::create_dir_all(&evidence)
            .map_err(|e| CliError::new(format!("--evidence: cannot make {}: {e}", evidence.display())))?;
        hidden.extend(view::names(&evidence));
    }
    hidden.extend(view::names(&home.state));
    let shown: Vec<_> =
        read_only.iter().chain([&workspace]).chain(root.iter().map(Image::root)).map(PathBuf::as_path).collect();
    let others = view::other_names(&hidden, &shown).map_err(|e| {
        CliError::new(format!(
            "cannot look for other names of a file that is hidden from the agent: {e}; remove its other names"
        ))
    })?;
    hidden.extend(others);
    let folder = Folder::make(&home.state.join("runs"), &uid)?;

    #[expect(clippy::disallowed_methods, reason = "permits bound what the agent prints, and limits bound its calls")]
    let (tell, mut told) = mpsc::unbounded_channel();
    let api = Arc::new(Api::new(&objects, tell.clone()));
    let kept = Kept {
        place,
        evidence: objects.pack.spec.evidence.bucket.clone(),
        state: home.state.join("state"),
        troubles: Troubles::new(tell.clone()),
    };
    let belay = std::env::current_exe().map_err(|e| CliError::new(format!("cannot find this program: {e}")))?;
    let mut upstreams = Vec::new();
    for Server { host, command } in &args.upstream {
        upstreams.push(Upstream::start(&belay, host, command, &folder.path).await.map_err(trouble)?);
    }
    let own = upstreams.iter().map(|one| Resolved { host: one.host().clone(), address: one.address() });
    let resolved: Vec<_> = args.resolve.iter().cloned().chain(own).collect();
    let settings = gateway::Settings {
        signer,
        resolved: resolved.iter().map(|one| (one.host.clone(), one.address)).collect::<HashMap<_, _>>(),
        nameservers: args.nameserver.iter().map(|server| server.0).collect(),
        upstream_ca: args.upstream_ca.clone(),
        tell: tell.clone(),
    };
    let serving = gateway::start(&api, kept, settings).await.map_err(trouble)?;
    let options = Options {
        runtime,
        root,
        read_only,
        workspace,
        hidden,
        store,
        resolved: resolved.iter().map(Resolved::text).collect(),
        folder: folder.path.clone(),
        belay,
        objects,
    };
    let task = options.objects.task.clone();
    let prefix = options.objects.pack.spec.evidence.prefix.clone();
    let log = log_prefix(prefix.as_deref(), &task.namespace().unwrap_or_default(), &task.name_any(), &uid);
    let log = match &args.store {
        Some(at) => format!("s3://{}/{log}", at.bucket),
        None => evidence.join(log.trim_end_matches('/')).display().to_string(),
    };
    if args.store.is_none() {
        // For recipients of the folder. A user who verifies it here has the key itself.
        let noted = fs::create_dir_all(&log)
            .and_then(|()| home::publish(&Path::new(&log).join("witness.vkey"), &format!("{witness}\n")));
        noted.map_err(|e| {
            CliError::new(format!("cannot write evidence to {log}: {e}; give another folder by --evidence"))
        })?;
    }
    let stop = CancellationToken::new();
    tokio::spawn(signals(stop.clone()));
    let by = args.by.clone().or_else(|| std::env::var("USER").ok()).filter(|name| !name.is_empty());
    let mut person = Person {
        name: by.unwrap_or_else(|| "somebody".to_owned()),
        beforehand: args.approve.clone(),
        api: api.clone(),
    };
    let mut front = Front::new(args.output, &task, &mut person);
    // A task of its own, so that the run continues however much there is to show.
    let running = tokio::spawn(run::run(options, api, serving, tell, stop.clone()));
    let broke = |error: tokio::task::JoinError| {
        Err(RunError::Sandbox(format!("the run broke off: {error}; please report this")))
    };
    let running = async move { running.await.unwrap_or_else(broke) };
    let ended = front.show(running, &mut told).await;
    for mut upstream in upstreams {
        if let Some(trouble) = upstream.trouble() {
            for (index, line) in trouble.lines().enumerate() {
                let of = if index == 0 { "note: --upstream " } else { "note: " };
                crate::output::stderr().say(format!("{of}{}\n", Safe(line)).into_bytes());
            }
        }
        upstream.end().await;
    }
    drop(folder);
    let endpoint = args
        .endpoint
        .as_ref()
        .filter(|_| args.store.is_some())
        .map(|url| format!(" --endpoint {url}"))
        .unwrap_or_default();
    let check = format!("belay verify {log} --witness-key {}{endpoint}", home.vkey().display());
    front.end(&ended, &log, &check);
    crate::output::stderr().end();
    Ok(match &ended {
        Ok(outcome) => exit_code(outcome),
        Err(RunError::Seal(_)) => EXIT_UNSEALED,
        Err(_) => EXIT_ERROR,
    })
}

fn exit_code(outcome: &Outcome) -> u8 {
    if outcome.closed.has_succeeded() {
        return 0;
    }
    outcome.closed.class().map_or(EXIT_ERROR, FailureClass::exit_code)
}

fn trouble(error: RunError) -> CliError {
    match error {
        RunError::Findings(findings) => CliError::Listed(findings.iter().map(ToString::to_string).collect()),
        // The output of a program, one message a line.
        other => CliError::Listed(other.to_string().lines().map(str::to_owned).collect()),
    }
}

fn whole(path: &Path) -> Result<PathBuf, CliError> {
    let whole = fs::canonicalize(path)
        .and_then(|path| if path.is_dir() { Ok(path) } else { Err(io::ErrorKind::NotADirectory.into()) });
    whole.map_err(|e| CliError::new(format!("expected a folder, found {}: {e}", path.display())))
}

fn place(args: &Args, evidence: &Path) -> Result<Place, CliError> {
    if args.store.is_none() { Ok(Place::Folder(evidence.to_owned())) } else { buckets(args) }
}

#[cfg(not(feature = "s3"))]
fn buckets(_: &Args) -> Result<Place, CliError> {
    Err(CliError::left_out("--store"))
}

#[cfg(feature = "s3")]
fn buckets(args: &Args) -> Result<Place, CliError> {
    use crate::{evidence::store::s3, gateway::run::S3Buckets};
    let ca = args
        .ca_bundle
        .as_deref()
        .map(|file| fs::read(file).map_err(|e| CliError::new(format!("cannot read {}: {e}", file.display()))));
    Ok(Place::Buckets(Arc::new(S3Buckets::new(s3::Options {
        bucket: String::new(),
        endpoint: args.endpoint.clone(),
        path_style: args.endpoint.is_some(),
        region: args.region.clone(),
        ca: ca.transpose()?,
    }))))
}

/// Cancels `stop` on the first signal, and exits on the second.
async fn signals(stop: CancellationToken) {
    let caught = |kind| signal(kind).ok();
    let (Some(mut interrupt), Some(mut terminate), Some(mut hangup)) =
        (caught(SignalKind::interrupt()), caught(SignalKind::terminate()), caught(SignalKind::hangup()))
    else {
        return;
    };
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        if stop.is_cancelled() {
            #[expect(clippy::disallowed_methods, reason = "a second signal asks to end at once")]
            std::process::exit(130);
        }
        stop.cancel();
    }
}
