//! `belay run`: a task on this machine, shown as it happens.
//!
//! Promises: nothing starts before all that can be found wrong has been said; whatever the agent and its upstreams say reaches the terminal
//! through `Safe` alone; the exit code says how the task ended. Refuses: to ask anybody where there is no terminal, and to be root's
//! if it need not: the sandbox's walls are the same, but what is behind them is the whole machine.

use std::{
    collections::HashMap,
    fs,
    io::{self, BufRead, IsTerminal, Write},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use clap::ValueEnum;
use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc::{self, UnboundedReceiver},
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::{
    CliError, EXIT_ERROR, approve,
    terminal::{Paint, Safe},
    watch::{
        screen::{Screen, width},
        view::View,
    },
};
use crate::{
    api::{
        ApprovalRequest,
        agent_task::{AgentTaskStatus, FailureClass, Phase},
    },
    evidence::{
        note::{SELF_WITNESS_NAME, Signer, generate_pkcs8},
        record::{Event, Local},
        store::{Location, log_prefix, s3},
    },
    gateway::{options::NameServer, run::S3Buckets},
    lifecycle::decide::class_of,
    policy::{approval::Answer, hostname::Hostname},
    run::{
        self, Options, Outcome, RunError, Told, gateway,
        objects::Api,
        sandbox::{Kind, Runtime, root::Image},
        store::{Kept, Place, Troubles},
    },
};

/// Objects from files.
mod files;

/// The log could not be ended: it is incomplete.
const EXIT_UNSEALED: u8 = 3;
/// Between two drawings of the panel.
const TICK: Duration = Duration::from_millis(500);

/// Run a task on this machine: no cluster, the same decisions.
///
/// Gateway and harness run in this process, the agent in a sandbox: gVisor where it is installed, else bubblewrap. It sees this
/// machine's programs and the task's folder (/workspace), read-only; it can write where the task says; it can reach the harness and
/// nothing else. Containment is proven before it starts, every decision is in the evidence, and the evidence verifies.
///
/// The task's `image` is not pulled: `agent.command` runs with this machine's programs, or with those of --root. An OCI bundle there, as
/// `umoci unpack` makes one, says by itself what to run, where and in which environment, as the image does in a cluster.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay run hello/task.yaml
      A task whose contracts and pack lie beside it.
  belay run task.yaml --packs policy-packs/dev --contracts contracts/ --credential model-key/token=env:OPENAI_API_KEY
      Pack and contracts from elsewhere, and the key that the pack's class names.
  belay run task.yaml --resolve localhost=127.0.0.1:11434
      A model on this machine: it has to be named, since loopback is never dialled otherwise. The class must list the host.
  skopeo copy docker://registry.example.com/agent:1 oci:agent:1 && umoci unpack --rootless --image agent:1 bundle
  belay run task.yaml --root bundle
      A task of a cluster with its own image, unpacked by other tools.
  belay run task.yaml --store s3://evidence/laptops --output json
      Evidence in a bucket, and a line of JSON for each event.

What a laptop cannot give: nobody else holds the witness's key, and a folder has no locks. `belay verify` says so:
VALID, self-witnessed, unlocked store.

Exit codes:
  0    the task succeeded
  1    its agent failed (class Agent)
  2    nothing was run: a file, an option or the sandbox is not as it should be
  3    the log could not be ended: what is there verifies as INCOMPLETE
  4    class Policy: too many refused calls, or a call that nobody approved
  5    class Budget: the wall time is over
  6    class Infrastructure: the sandbox, the harness or the evidence store failed; containment could not be proven
  130  it was stopped (Ctrl-C, SIGTERM): the agent first, then the log was ended")]
pub(super) struct Args {
    /// File with the AgentTask
    task: PathBuf,
    /// Folder or file with ToolContracts; may be given again [default: the task's folder]
    #[arg(long, value_name = "PATH")]
    contracts: Vec<PathBuf>,
    /// Folder or file with PolicyPacks; may be given again [default: the task's folder]
    #[arg(long, value_name = "PATH")]
    packs: Vec<PathBuf>,
    /// Which PolicyPack, where there are several
    #[arg(long, value_name = "NAME")]
    pack: Option<String>,
    /// Folder for evidence [default: ~/.local/state/belay/evidence]
    #[arg(long, value_name = "DIR", conflicts_with = "store")]
    evidence: Option<PathBuf>,
    /// Bucket for evidence, s3://BUCKET or s3://BUCKET/PREFIX; with Object Lock it is locked as the pack says
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
    /// Which sandbox
    #[arg(long, value_enum, default_value_t = Sandbox::Auto)]
    sandbox: Sandbox,
    /// Folder of an unpacked image whose programs the agent has, in place of this machine's: an OCI bundle, or the bare root
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Further folder of this machine that the agent sees, read-only, at the same place; may be given again
    #[arg(long, value_name = "DIR")]
    ro: Vec<PathBuf>,
    /// The folder that the agent sees as /workspace, read-only [default: the task's folder]
    #[arg(long, value_name = "DIR")]
    workspace: Option<PathBuf>,
    /// The address of a host, whatever it is, as HOST=ADDRESS[:PORT]; may be given again. It is recorded
    #[arg(long, value_name = "HOST=ADDR")]
    resolve: Vec<Resolved>,
    /// A key for an upstream, as SECRET/KEY=env:VARIABLE or SECRET/KEY=file:PATH; may be given again
    #[arg(long, value_name = "SECRET/KEY=FROM")]
    credential: Vec<Credential>,
    /// File with certificates (PEM) to trust for upstreams, beside the web's
    #[arg(long, value_name = "FILE")]
    upstream_ca: Option<PathBuf>,
    /// A name server, ADDRESS or ADDRESS:PORT, in place of this machine's; may be given again
    #[arg(long, value_name = "ADDR")]
    nameserver: Vec<NameServer>,
    /// Say yes beforehand to calls of this tool that need approval; may be given again. It is recorded as your decision
    #[arg(long, value_name = "TOOL")]
    approve: Vec<String>,
    /// The name under which you decide [default: your user name]
    #[arg(long = "as", value_name = "NAME")]
    by: Option<String>,
    /// How to say what happens
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sandbox {
    /// gVisor where it is installed, else bubblewrap
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
    /// For people
    Text,
    /// A JSON object a line
    Json,
}

/// `HOST=ADDRESS[:PORT]`.
#[derive(Clone, Debug)]
struct Resolved {
    host: Hostname,
    /// With port 0 where none was given.
    address: SocketAddr,
}

impl FromStr for Resolved {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected HOST=ADDRESS or HOST=ADDRESS:PORT, found {text:?}");
        let (host, address) = text.split_once('=').ok_or_else(expected)?;
        let host = Hostname::parse(host).map_err(|error| error.to_string())?;
        let alone = address.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 0));
        let address = alone.or_else(|_| address.parse()).map_err(|_| expected())?;
        Ok(Self { host, address })
    }
}

impl Resolved {
    /// As it is recorded.
    fn text(&self) -> String {
        let Self { host, address } = self;
        if address.port() == 0 { format!("{host}={}", address.ip()) } else { format!("{host}={address}") }
    }
}

/// `SECRET/KEY=env:VARIABLE` or `SECRET/KEY=file:PATH`.
#[derive(Clone, Debug)]
struct Credential {
    secret: String,
    key: String,
    from: From,
}

#[derive(Clone, Debug)]
enum From {
    Variable(String),
    File(PathBuf),
}

impl FromStr for Credential {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            "expected SECRET/KEY=env:VARIABLE or SECRET/KEY=file:PATH; a value itself would be seen by all who list processes".to_owned()
        };
        let (name, from) = text.split_once('=').ok_or_else(expected)?;
        let (secret, key) = name.split_once('/').ok_or_else(expected)?;
        let from = match from.split_once(':') {
            Some(("env", variable)) if !variable.is_empty() => From::Variable(variable.to_owned()),
            Some(("file", path)) if !path.is_empty() => From::File(path.into()),
            _ => return Err(expected()),
        };
        Ok(Self { secret: secret.to_owned(), key: key.to_owned(), from })
    }
}

impl Credential {
    fn value(&self) -> Result<Vec<u8>, CliError> {
        let named = format!("--credential {}/{}", self.secret, self.key);
        let value = match &self.from {
            From::Variable(name) => std::env::var(name)
                .map_err(|_| {
                    CliError::new(format!(
                        "{named}: expected a key in the environment variable {name}, found none; set it"
                    ))
                })?
                .into_bytes(),
            From::File(path) => {
                fs::read(path).map_err(|e| CliError::new(format!("{named}: cannot read {}: {e}", path.display())))?
            }
        };
        let value = value.trim_ascii().to_vec();
        if value.is_empty() { Err(CliError::new(format!("{named}: expected a key, found nothing"))) } else { Ok(value) }
    }
}

/// Where things of this user's are.
struct Home {
    state: PathBuf,
}

impl Home {
    fn find() -> Result<Self, CliError> {
        let own = std::env::var_os("XDG_STATE_HOME").filter(|path| Path::new(path).is_absolute()).map(PathBuf::from);
        let own = own.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state")));
        let state = own.ok_or_else(|| {
            CliError::new("expected HOME or XDG_STATE_HOME in the environment, found neither; set one")
        })?;
        Ok(Self { state: state.join("belay") })
    }

    /// The witness's key, made when it is first needed.
    fn signer(&self) -> Result<Signer, CliError> {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
        let file = self.state.join("witness.pk8");
        let failed = |error: &dyn std::fmt::Display| {
            CliError::new(format!("cannot use the witness's key {}: {error}", file.display()))
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.state).map_err(|e| failed(&e))?;
        match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file) {
            Ok(mut new) => {
                let key = generate_pkcs8().map_err(|e| failed(&e))?;
                new.write_all(&key).and_then(|()| new.sync_all()).map_err(|e| failed(&e))?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(&error)),
        }
        let mode = fs::metadata(&file).map_err(|e| failed(&e))?.permissions().mode();
        if mode & 0o077 != 0 {
            let message = format!(
                "expected mode 0600, found {:04o}: others may have it; remove it, and another is made",
                mode & 0o7777
            );
            return Err(failed(&message));
        }
        let key = fs::read(&file).map_err(|e| failed(&e))?;
        let signer = Signer::from_pkcs8(SELF_WITNESS_NAME, &key).map_err(|e| failed(&e))?;
        fs::write(self.vkey(), format!("{}\n", signer.verifier())).map_err(|e| failed(&e))?;
        Ok(signer)
    }

    fn vkey(&self) -> PathBuf {
        self.state.join("witness.vkey")
    }
}

/// Runs, and gives the exit code.
pub(super) async fn run(args: &Args) -> Result<u8, CliError> {
    let asked =
        files::Asked { task: &args.task, contracts: &args.contracts, packs: &args.packs, pack: args.pack.as_deref() };
    let files::Loaded { mut objects, secret_files } = files::load(&asked)?;
    for credential in &args.credential {
        files::add_credential(&mut objects, &credential.secret, &credential.key, credential.value()?);
    }
    if let Some(Location { bucket, prefix }) = &args.store {
        let prefix = prefix.trim_end_matches('/');
        objects.pack.spec.evidence.bucket.clone_from(bucket);
        objects.pack.spec.evidence.prefix = (!prefix.is_empty()).then(|| prefix.to_owned());
    }
    let root = args.root.as_deref().map(|folder| Image::open(whole(folder)?).map_err(trouble)).transpose()?;
    run::validate(&objects, root.as_ref()).map_err(trouble)?;
    let missing: Vec<_> = files::missing_credentials(&objects)
        .into_iter()
        .map(|(host, one)| {
            format!(
                "expected a key for {host}, by which the pack's class reaches it, found none; add --credential {}/{}=env:VARIABLE, or a Secret `{}` with the label belay.dev/upstream-credential: \"true\"",
                one.secret, one.key, one.secret
            )
        })
        .collect();
    if !missing.is_empty() {
        return Err(CliError::Listed(missing));
    }
    let wanted = match args.sandbox {
        Sandbox::Auto => None,
        Sandbox::Runsc => Some(Kind::Gvisor),
        Sandbox::Bwrap => Some(Kind::Bubblewrap),
    };
    let runtime = Runtime::find(wanted).map_err(trouble)?;
    let workspace = whole(args.workspace.as_deref().unwrap_or(&files::folder_of(&args.task)))?;
    let read_only = args.ro.iter().map(|path| whole(path)).collect::<Result<Vec<_>, _>>()?;

    let home = Home::find()?;
    let signer = home.signer()?;
    let witness = signer.verifier();
    let uid = objects.task.uid().unwrap_or_default();
    let evidence = args.evidence.clone().unwrap_or_else(|| home.state.join("evidence"));
    let place = place(args, &evidence)?;
    let store = args.store.as_ref().map_or(Local::FOLDER.to_owned(), |at| format!("s3://{}", at.bucket));
    let mut hidden: Vec<PathBuf> = secret_files.iter().filter_map(|file| fs::canonicalize(file).ok()).collect();
    hidden.extend(args.credential.iter().filter_map(|one| match &one.from {
        From::File(path) => fs::canonicalize(path).ok(),
        From::Variable(_) => None,
    }));
    if args.store.is_none() {
        fs::create_dir_all(&evidence)
            .map_err(|e| CliError::new(format!("--evidence: cannot make {}: {e}", evidence.display())))?;
        hidden.extend(fs::canonicalize(&evidence).ok());
    }
    hidden.extend(fs::canonicalize(&home.state).ok());
    let folder = Folder::make(&home.state.join("runs"), &uid)?;

    let (tell, mut told) = mpsc::unbounded_channel();
    let api = Arc::new(Api::new(&objects, tell.clone()));
    let kept = Kept {
        place,
        evidence: objects.pack.spec.evidence.bucket.clone(),
        state: home.state.join("state"),
        troubles: Troubles::new(tell.clone()),
    };
    let settings = gateway::Settings {
        signer,
        resolved: args.resolve.iter().map(|one| (one.host.clone(), one.address)).collect::<HashMap<_, _>>(),
        nameservers: args.nameserver.iter().map(|server| server.0).collect(),
        upstream_ca: args.upstream_ca.clone(),
    };
    let serving = gateway::start(&api, kept, settings).await.map_err(trouble)?;
    let belay = std::env::current_exe().map_err(|e| CliError::new(format!("cannot find this program: {e}")))?;
    let options = Options {
        runtime,
        root,
        read_only,
        workspace,
        hidden,
        store,
        resolved: args.resolve.iter().map(Resolved::text).collect(),
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
        // For whoever is given the folder; whoever checks it here has the key itself.
        let noted = fs::create_dir_all(&log)
            .and_then(|()| fs::write(Path::new(&log).join("witness.vkey"), format!("{witness}\n")));
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
    let running = run::run(options, api, serving, tell, stop.clone());
    let ended = front.show(running, &mut told).await?;
    drop(folder);
    let endpoint = args
        .endpoint
        .as_ref()
        .filter(|_| args.store.is_some())
        .map(|url| format!(" --endpoint {url}"))
        .unwrap_or_default();
    let check = format!("belay verify {log} --witness-key {}{endpoint}", home.vkey().display());
    front.end(&ended, &log, &check)?;
    Ok(match &ended {
        Ok(outcome) => exit_code(outcome),
        Err(RunError::Seal(_)) => EXIT_UNSEALED,
        Err(_) => EXIT_ERROR,
    })
}

fn exit_code(outcome: &Outcome) -> u8 {
    if outcome.closed.phase == "Succeeded" {
        return 0;
    }
    match class_of(&outcome.closed.failure_class) {
        Some(FailureClass::Agent) => 1,
        Some(FailureClass::Policy) => 4,
        Some(FailureClass::Budget) => 5,
        Some(FailureClass::Infrastructure | FailureClass::Dependency) => 6,
        Some(FailureClass::Cancelled) => 130,
        None => EXIT_ERROR,
    }
}

fn trouble(error: RunError) -> CliError {
    match error {
        RunError::Findings(findings) => CliError::Listed(findings.iter().map(ToString::to_string).collect()),
        other => CliError::new(other.to_string()),
    }
}

fn whole(path: &Path) -> Result<PathBuf, CliError> {
    let whole = fs::canonicalize(path)
        .and_then(|path| if path.is_dir() { Ok(path) } else { Err(io::ErrorKind::NotADirectory.into()) });
    whole.map_err(|e| CliError::new(format!("expected a folder, found {}: {e}", path.display())))
}

fn place(args: &Args, evidence: &Path) -> Result<Place, CliError> {
    if args.store.is_none() {
        return Ok(Place::Folder(evidence.to_owned()));
    }
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

/// A folder that ends with the run.
struct Folder {
    path: PathBuf,
    /// Locked for as long as the run lives.
    _lock: fs::File,
}

/// The file by which a folder's run is known to live.
const LOCK: &str = "lock";

impl Folder {
    /// One of its own among those of all runs. What runs that were killed have left goes.
    fn make(runs: &Path, uid: &str) -> Result<Self, CliError> {
        use std::os::unix::fs::DirBuilderExt;
        let path = runs.join(uid);
        let failed = |e: io::Error| CliError::new(format!("cannot make {}: {e}", path.display()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed)?;
        let lock = fs::File::create(path.join(LOCK)).map_err(failed)?;
        lock.lock().map_err(failed)?;
        for other in
            fs::read_dir(runs).map_err(failed)?.flatten().map(|entry| entry.path()).filter(|other| *other != path)
        {
            // One without a lock is being made just now.
            if fs::File::open(other.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_ok()) {
                let _ = fs::remove_dir_all(other);
            }
        }
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The first asks for an end in order, the second takes what there is.
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
            std::process::exit(130);
        }
        stop.cancel();
    }
}

/// Whoever decides at this terminal.
struct Person {
    name: String,
    /// Tools whose calls they have said yes to beforehand.
    beforehand: Vec<String>,
    api: Arc<Api>,
}

/// What is shown, and how.
struct Front<'p> {
    output: Output,
    view: View,
    screen: Screen<io::Stdout>,
    paint: Paint,
    terminal: bool,
    task: crate::api::AgentTask,
    person: &'p mut Person,
    /// Requests that wait for an answer, the one that is asked about first.
    questions: Vec<ApprovalRequest>,
    answers: Option<UnboundedReceiver<String>>,
}

impl<'p> Front<'p> {
    fn new(output: Output, task: &crate::api::AgentTask, person: &'p mut Person) -> Self {
        let out = io::stdout();
        let terminal =
            output == Output::Text && out.is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let paint = Paint::new(terminal);
        let (namespace, name) = (task.namespace().unwrap_or_default(), task.name_any());
        let mut view = View::new(&namespace, &name, paint);
        view.task(task);
        // Without somebody to type there are no answers.
        let answers = (terminal && io::stdin().is_terminal()).then(lines);
        Self {
            output,
            view,
            screen: Screen::new(out, terminal),
            paint,
            terminal,
            task: task.clone(),
            person,
            questions: Vec::new(),
            answers,
        }
    }

    /// Shows what is told until the run has ended.
    async fn show(
        &mut self,
        running: impl Future<Output = Result<Outcome, RunError>>,
        told: &mut UnboundedReceiver<Told>,
    ) -> Result<Result<Outcome, RunError>, CliError> {
        let mut running = std::pin::pin!(running);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let ended = loop {
            tokio::select! {
                biased;
                Some(one) = told.recv() => self.told(one)?,
                Some(answer) = next(&mut self.answers) => self.answer(&answer)?,
                ended = &mut running => break ended,
                _ = tick.tick() => self.overdue(),
            }
            self.draw()?;
        };
        while let Ok(one) = told.try_recv() {
            self.told(one)?;
        }
        self.draw()?;
        Ok(ended)
    }

    fn told(&mut self, told: Told) -> Result<(), CliError> {
        if let Told::Asked(request) = &told {
            self.asked(request);
        }
        if self.output == Output::Json {
            return self.told_as_json(&told);
        }
        match told {
            Told::Step(step) => self.view.notice(&step),
            Told::Started { attempt } => {
                self.task.status = Some(AgentTaskStatus {
                    phase: Some(Phase::Running),
                    attempt: Some(attempt),
                    ..AgentTaskStatus::default()
                });
                self.view.task(&self.task);
            }
            Told::Record(record) => self.view.record(record.attempt, &record),
            Told::Said { line, .. } => self.view.said(&line),
            Told::Asked(_) => {}
            Told::Trouble(trouble) => self.view.notice(&trouble),
            Told::Pause(until) => self.view.notice(&format!("another attempt at {until:.0}")),
        }
        Ok(())
    }

    fn told_as_json(&mut self, told: &Told) -> Result<(), CliError> {
        let line = match told {
            Told::Step(step) => json!({"event": "step", "step": step}),
            Told::Started { attempt } => json!({"event": "started", "attempt": attempt}),
            Told::Record(record) => json!({"event": "record", "record": brief(record)}),
            Told::Said { error, line } => {
                json!({"event": "said", "stream": if *error { "stderr" } else { "stdout" }, "line": line})
            }
            Told::Asked(request) => json!({"event": "approval", "name": request.name_any(), "request": request.spec}),
            Told::Trouble(trouble) => json!({"event": "trouble", "trouble": trouble}),
            Told::Pause(until) => json!({"event": "pause", "until": until.to_string()}),
        };
        writeln!(io::stdout(), "{line}")?;
        Ok(())
    }

    /// Somebody has to say yes or no.
    fn asked(&mut self, request: &ApprovalRequest) {
        let spec = &request.spec;
        let barred =
            [Some(spec.principal.as_str()), spec.requester.as_deref()].contains(&Some(self.person.name.as_str()));
        if self.person.beforehand.contains(&spec.tool) && !barred {
            let reason = "said beforehand, by --approve".to_owned();
            self.person.api.decide(&request.name_any(), &self.person.name, Answer::Approve, Some(reason));
            return;
        }
        if self.output == Output::Text {
            for line in approve::describe(request, Timestamp::now(), self.paint).lines() {
                self.view.line(line.to_owned());
            }
            if barred {
                self.view.notice(&format!(
                    "{} may not approve, since the agent acts for them or they asked for the task: say who you are by --as NAME; a no counts",
                    self.person.name
                ));
            }
            if !barred && !spec.approvers.users.contains(&self.person.name) {
                self.view.notice(&format!(
                    "nobody checks here that {} is one of those who may decide: the record names you, as you say it",
                    self.person.name
                ));
            }
            if spec.required > 1 {
                self.view.notice(&format!("it needs {} people, and one is here: it can only be denied", spec.required));
            }
            if self.answers.is_none() {
                self.view.notice(&format!(
                    "nobody is here to ask: it is denied at {:.0}; --approve {} says yes beforehand",
                    spec.expires_at.0, spec.tool
                ));
            }
        }
        if self.answers.is_some() {
            self.questions.push(request.clone());
        }
    }

    fn answer(&mut self, answer: &str) -> Result<(), CliError> {
        let Some(request) = self.questions.first() else { return Ok(()) };
        let (word, reason) = answer.trim().split_once(char::is_whitespace).unwrap_or((answer.trim(), ""));
        let decision = match word.to_lowercase().as_str() {
            "y" | "yes" => Answer::Approve,
            "n" | "no" => Answer::Deny,
            _ => {
                self.view.notice("expected y or n, and a reason if you like, such as `n this is the wrong order`");
                return Ok(());
            }
        };
        let reason = Some(reason.trim().chars().take(1024).collect::<String>()).filter(|reason| !reason.is_empty());
        self.person.api.decide(&request.name_any(), &self.person.name, decision, reason);
        self.questions.remove(0);
        Ok(())
    }

    /// What nobody has answered in time is not asked about any more.
    fn overdue(&mut self) {
        let now = Timestamp::now();
        self.questions.retain(|request| request.spec.expires_at.0 > now);
    }

    fn draw(&mut self) -> Result<(), CliError> {
        if self.output == Output::Json {
            return Ok(());
        }
        let mut panel = if self.terminal { self.view.panel(width()) } else { Vec::new() };
        if let Some(request) = self.questions.first() {
            let question = format!("? {}: y or n, and why", Safe(&request.spec.tool));
            panel.push(self.paint.warn(question));
        }
        self.screen.show(&self.view.take_lines(), &panel)?;
        Ok(())
    }

    fn end(&mut self, ended: &Result<Outcome, RunError>, log: &str, check: &str) -> Result<(), CliError> {
        if self.output == Output::Json {
            let line = match ended {
                Ok(Outcome { closed, sealed, trouble }) => json!({
                    "event": "ended", "closed": closed, "usage": sealed.usage, "size": sealed.size, "root": sealed.root,
                    "evidence": log, "verify": check, "trouble": trouble,
                }),
                Err(error) => json!({"event": "failed", "error": error.to_string(), "evidence": log, "verify": check}),
            };
            writeln!(io::stdout(), "{line}")?;
            return Ok(());
        }
        match ended {
            Ok(Outcome { closed, trouble, .. }) => {
                if let Some(trouble) = trouble {
                    self.view.notice(trouble);
                }
                let phase = if closed.phase == "Succeeded" { Phase::Succeeded } else { Phase::Failed };
                let class =
                    if closed.failure_class.is_empty() { String::new() } else { format!("{}, ", closed.failure_class) };
                let attempt = self.task.status.as_ref().and_then(|status| status.attempt);
                self.task.status = Some(AgentTaskStatus {
                    phase: Some(phase),
                    reason: Some(format!("{class}{}", closed.reason)),
                    attempt,
                    ..AgentTaskStatus::default()
                });
                self.view.task(&self.task);
                self.view.finish();
            }
            Err(error) => self.view.notice(&format!("error: {error}")),
        }
        self.view.line(format!("{:<11}{}", self.paint.dim("evidence"), Safe(log)));
        self.view.line(format!("{:<11}{}", self.paint.dim("verify"), Safe(check)));
        self.screen.show(&self.view.take_lines(), &[])?;
        self.screen.flush()?;
        Ok(())
    }
}

/// A record as JSON. The policy, which the first has with it, is in the evidence.
fn brief(record: &crate::evidence::record::Record) -> serde_json::Value {
    debug_assert!(!matches!(&record.event, Event::AttemptOpened(opened) if opened.key.is_empty()));
    serde_json::to_value(record).unwrap_or_default()
}

/// The next answer, or none ever.
async fn next(answers: &mut Option<UnboundedReceiver<String>>) -> Option<String> {
    match answers {
        Some(answers) => answers.recv().await,
        None => std::future::pending().await,
    }
}

/// What is typed, line by line. The thread ends with the process: nothing wakes it but another line.
fn lines() -> UnboundedReceiver<String> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("localhost=127.0.0.1:11434", Some("localhost=127.0.0.1:11434"))]
    #[case("models.example.com=10.0.0.7", Some("models.example.com=10.0.0.7"))]
    #[case("m.example.com=[::1]:80", Some("m.example.com=[::1]:80"))]
    #[case("127.0.0.1=127.0.0.1", None)]
    #[case("localhost", None)]
    #[case("localhost=example.com", None)]
    fn an_address_by_hand(#[case] text: &str, #[case] expected: Option<&str>) {
        assert_eq!(text.parse::<Resolved>().ok().map(|one| one.text()).as_deref(), expected);
    }

    #[test]
    fn a_key_is_never_an_argument() {
        assert!("model/token=env:KEY".parse::<Credential>().is_ok());
        assert!("model/token=file:key".parse::<Credential>().is_ok());
        for wrong in ["model/token=sk-123", "model=env:KEY", "model/token=env:", "model/token"] {
            assert!(wrong.parse::<Credential>().is_err(), "{wrong}");
        }
    }
}
