//! Finds a task's evidence: in the bucket of a task in the cluster, in a folder, or in a named bucket. Also finds the witness's key.

use std::{
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;

use super::{
    CliError,
    cluster::{Cluster, explain},
};
use crate::{
    api::{AgentTask, agent_task::EvidenceStatus},
    evidence::{
        folder,
        log::Log,
        note::{Checkpoint, VerifierKey, origin},
        store::{Location, Store, dir::Dir},
    },
    verify::Expected,
};

/// The folder in a log that contains the segments.
const SEGMENTS: &str = "segments";
/// The number of folder levels between the evidence folder and the folder of a log.
const DEEPEST: usize = 2;
/// The maximum number of logs that an error lists.
const MOST_LOGS: usize = 10;
/// The file with the witness's public key in a downloaded log.
const KEY_FILE: &str = "witness.vkey";
/// The namespace where the operator publishes the witness's key.
const KEY_NAMESPACE: &str = "belay-system";
/// The ConfigMap with the witness's key.
const KEY_CONFIG_MAP: &str = "belay-witness-key";
/// The entry of that ConfigMap.
const KEY_ENTRY: &str = "vkey";

/// Options that select the log and its key.
#[derive(Debug, clap::Args)]
pub(super) struct Source {
    /// Name of a task, a folder, or s3://bucket/prefix
    ///
    /// With --namespace, it is a task. Otherwise it is a folder, if a folder of that name exists.
    pub(super) target: String,
    #[command(flatten)]
    cluster: Cluster,
    /// The witness's public key, or a file with it (C2SP vkey)
    ///
    /// Required for buckets, and for folders without a witness.vkey. For tasks, the default is the key that the cluster publishes.
    #[arg(long, value_name = "VKEY|FILE")]
    witness_key: Option<String>,
    /// URL of the object store, unless it is AWS or the task's status names it
    #[arg(long, value_name = "URL", env = "AWS_ENDPOINT_URL_S3")]
    endpoint: Option<String>,
    /// Whether the bucket is in the path instead of the host name [default: true if there is an endpoint]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    path_style: Option<bool>,
    /// Region of the bucket [default: us-east-1]
    #[arg(long, env = "AWS_REGION")]
    region: Option<String>,
    /// File with certificates (PEM) to trust for the object store
    #[arg(long, value_name = "FILE", env = "AWS_CA_BUNDLE")]
    ca_bundle: Option<PathBuf>,
}

impl Source {
    /// Returns the given key of the witness, for cases in which there is no log with a key.
    pub(super) fn given_key(&self) -> Result<VerifierKey, CliError> {
        let given = self.witness_key.as_ref();
        given_key(given.ok_or_else(|| CliError::new("expected --witness-key: a proof cannot vouch for itself"))?)
    }
}

/// Where a witness's key comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeySource {
    /// The command line.
    Given,
    /// The folder of the log itself.
    Folder,
    /// The cluster.
    Cluster,
}

/// A log and what it is verified against.
pub(super) struct Evidence {
    /// The location of the log.
    pub(super) place: String,
    /// The log.
    pub(super) log: Log,
    /// The witness's key.
    pub(super) key: VerifierKey,
    /// Where the key comes from.
    pub(super) source: KeySource,
    /// What is known about the log from elsewhere.
    pub(super) expected: Expected,
}

/// Finds the log that the target names, and the key for it.
pub(super) async fn find(args: &Source) -> Result<Evidence, CliError> {
    if let Ok(location) = args.target.parse::<Location>() {
        return bucket(args, &location).await;
    }
    let folder = Path::new(&args.target);
    if args.cluster.namespace.is_none() && (folder.is_dir() || args.target.contains('/')) {
        return in_folder(args, folder);
    }
    match task(args).await {
        Ok(found) => Ok(found),
        // The name may be that of a task that ran on this machine, without a cluster.
        Err(error) => match logs_here(args) {
            logs if logs.is_empty() => Err(error),
            logs => Err(CliError::new(format!(
                "{error}; the logs of `belay run` on this machine, the newest first:\n{}",
                logs.iter().map(|log| format!("  belay verify {}", log.display())).collect::<Vec<_>>().join("\n")
            ))),
        },
    }
}

/// Returns the logs on this machine of runs of a task of that name.
fn logs_here(args: &Source) -> Vec<PathBuf> {
    let Some(state) = state_folder() else { return Vec::new() };
    let namespace = args.cluster.namespace.as_deref().unwrap_or("default");
    let plain = |name: &str| !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    if !plain(namespace) || !plain(&args.target) {
        return Vec::new();
    }
    logs_below(&state.join("evidence").join(namespace).join(&args.target))
}

/// Returns the folder in which `belay run` stores the user's state.
pub(super) fn state_folder() -> Option<PathBuf> {
    let own = std::env::var_os("XDG_STATE_HOME").filter(|path| Path::new(path).is_absolute()).map(PathBuf::from);
    let own = own.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state")));
    own.map(|own| own.join("belay"))
}

fn in_folder(args: &Source, directory: &Path) -> Result<Evidence, CliError> {
    let place = directory.display().to_string();
    let log = folder::read(directory)
        .map_err(|(path, error)| CliError::new(format!("cannot read {}: {error}", path.display())))?;
    not_empty(&log, &place).map_err(|error| match logs_below(directory).as_slice() {
        [] => error,
        logs => CliError::new(format!(
            "found no segments in {place}, but the logs of tasks below it; name one, the newest first:\n{}",
            logs.iter().map(|log| format!("  {}", log.display())).collect::<Vec<_>>().join("\n")
        )),
    })?;
    let inside = directory.join(KEY_FILE);
    let (key, source) = match &args.witness_key {
        Some(given) => (given_key(given)?, KeySource::Given),
        None if fs::symlink_metadata(&inside).is_ok() => (key_inside(&inside)?, KeySource::Folder),
        None => {
            let message = format!("expected --witness-key, or {KEY_FILE} in {place}: a log cannot vouch for itself");
            return Err(CliError::new(message));
        }
    };
    Ok(Evidence { place, log, key, source, expected: Expected::Anything })
}

async fn bucket(args: &Source, location: &Location) -> Result<Evidence, CliError> {
    let Some(given) = &args.witness_key else {
        return Err(CliError::new("expected --witness-key for a log in a bucket: a log cannot vouch for itself"));
    };
    let key = given_key(given)?;
    let log = read_bucket(args, location, args.endpoint.as_deref()).await?;
    not_empty(&log, &location.to_string())?;
    // The gateway names the folder of a log after the UID of its task.
    let uid = location.prefix.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let looks_like_uid = uid.len() == 36 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    let expected = if looks_like_uid { Expected::Origin(origin(uid)) } else { Expected::Anything };
    Ok(Evidence { place: location.to_string(), log, key, source: KeySource::Given, expected })
}

async fn task(args: &Source) -> Result<Evidence, CliError> {
    let (client, namespace) = args.cluster.connect().await?;
    let name = &args.target;
    let task = Api::<AgentTask>::namespaced(client.clone(), &namespace)
        .get_opt(name)
        .await
        .map_err(|e| CliError::new(format!("cannot read AgentTask {namespace}/{name}: {}", explain(&e))))?;
    let Some(task) = task else {
        return Err(CliError::new(format!(
            "there is no AgentTask {name} in namespace {namespace}, and no folder of that name; give another -n, a folder or s3://bucket/prefix"
        )));
    };
    let Some(status) = task.status.and_then(|s| s.evidence) else {
        return Err(CliError::new(format!(
            "AgentTask {namespace}/{name} has no evidence yet (status.evidence is empty): wait for its first attempt, `belay watch {name} -n {namespace}`"
        )));
    };
    let uid = task.metadata.uid.unwrap_or_default();
    // A log that is not sealed has no head to compare with, and is incomplete.
    let expected =
        if status.root.is_empty() { Expected::Origin(origin(&uid)) } else { Expected::Head(head(&status, &uid)?) };
    let (key, source) = match &args.witness_key {
        Some(given) => (given_key(given)?, KeySource::Given),
        None => (published_key(client).await?, KeySource::Cluster),
    };
    let location =
        status.location.parse::<Location>().map_err(|e| CliError::new(format!("status.evidence.location: {e}")))?;
    let endpoint = args.endpoint.clone().or(status.endpoint);
    let log = read_bucket(args, &location, endpoint.as_deref()).await?;
    Ok(Evidence { place: location.to_string(), log, key, source, expected })
}

/// Returns the head in the task's status, which must belong to this task's log.
fn head(status: &EvidenceStatus, uid: &str) -> Result<Checkpoint, CliError> {
    let text = format!("{}\n{}\n{}\n", status.origin, status.size, status.root);
    let head = Checkpoint::parse(&text).map_err(|e| CliError::new(format!("status.evidence is {e}")))?;
    if head.origin != origin(uid) {
        return Err(CliError::new(format!("expected status.evidence.origin {}, found {}", origin(uid), head.origin)));
    }
    Ok(head)
}

async fn published_key(client: kube::Client) -> Result<VerifierKey, CliError> {
    let place = format!("ConfigMap {KEY_NAMESPACE}/{KEY_CONFIG_MAP}");
    let map = Api::<ConfigMap>::namespaced(client, KEY_NAMESPACE).get(KEY_CONFIG_MAP).await.map_err(|e| {
        CliError::new(format!("cannot read the witness's key from {place}: {}; give --witness-key", explain(&e)))
    })?;
    let text = map.data.and_then(|mut data| data.remove(KEY_ENTRY)).unwrap_or_default();
    text.trim().parse().map_err(|e| CliError::new(format!("{place}, key {KEY_ENTRY}: {e}")))
}

#[cfg(not(feature = "s3"))]
async fn read_bucket(_: &Source, location: &Location, _: Option<&str>) -> Result<Log, CliError> {
    Err(CliError::left_out(&location.to_string()))
}

#[cfg(feature = "s3")]
async fn read_bucket(args: &Source, location: &Location, endpoint: Option<&str>) -> Result<Log, CliError> {
    use crate::evidence::store::s3::{self, S3};
    let ca = match &args.ca_bundle {
        Some(file) => Some(fs::read(file).map_err(|e| CliError::new(format!("cannot read {}: {e}", file.display())))?),
        None => None,
    };
    let options = s3::Options {
        bucket: location.bucket.clone(),
        endpoint: endpoint.map(str::to_owned),
        path_style: args.path_style.unwrap_or(endpoint.is_some()),
        region: args.region.clone(),
        ca,
    };
    let store = S3::connect(options).await.map_err(|e| CliError::new(e.to_string()))?;
    if !store.has_credentials().await {
        return Err(CliError::new(format!(
            "found no credentials for {location}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of an identity that may list versions and read objects and their retention there"
        )));
    }
    Log::read(&store, &location.prefix, true).await.map_err(|e| CliError::new(e.to_string()))
}

/// Returns an error for a location without a log, because a wrong path must not pass for an unfinished log.
fn not_empty(log: &Log, place: &str) -> Result<(), CliError> {
    if log.segments.is_empty() && log.odd.is_empty() && log.versions.as_ref().is_none_or(Vec::is_empty) {
        let message = format!(
            "found no segments in {place}: expected the folder of one log, <namespace>/<task>/<uid>, with segments/ in it"
        );
        return Err(CliError::new(message));
    }
    Ok(())
}

fn given_key(given: &str) -> Result<VerifierKey, CliError> {
    match given.parse() {
        Ok(key) => Ok(key),
        Err(_) if Path::new(given).is_file() => read_key(Path::new(given)),
        Err(e) => Err(CliError::new(format!(
            "--witness-key: expected a file or a key (C2SP vkey), found `{given}`, which is not a file, and not a key: {e}"
        ))),
    }
}

/// Returns the logs below a folder, at the depth of `<namespace>/<task>/<uid>` or less, the newest first.
fn logs_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![(directory.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let below = fs::read_dir(&folder).into_iter().flatten().flatten().filter(|entry| {
            // Whoever filled the folder may have put links there.
            entry.file_type().is_ok_and(|is| is.is_dir())
        });
        for path in below.map(|entry| entry.path()) {
            match fs::symlink_metadata(path.join(SEGMENTS)).and_then(|is| is.modified()) {
                Ok(at) => found.push((at, path)),
                Err(_) if depth < DEEPEST => folders.push((path, depth + 1)),
                Err(_) => {}
            }
        }
    }
    found.sort();
    found.into_iter().rev().take(MOST_LOGS).map(|(_, path)| path).collect()
}

fn read_key(file: &Path) -> Result<VerifierKey, CliError> {
    let text = fs::read_to_string(file).map_err(|e| CliError::new(format!("cannot read {}: {e}", file.display())))?;
    text.trim().parse().map_err(|e| CliError::new(format!("{}: {e}", file.display())))
}

/// Reads the key that lies with the log. Whoever filled the folder may have put anything there.
fn key_inside(file: &Path) -> Result<VerifierKey, CliError> {
    let text = folder::key(file).map_err(|e| CliError::new(format!("{}: {e}", file.display())))?;
    text.trim().parse().map_err(|e| CliError::new(format!("{}: {e}", file.display())))
}

/// Writes the log and the key to a new folder.
pub(super) async fn save(evidence: &Evidence, folder: &Path) -> Result<(), CliError> {
    let failed = |e: &dyn std::fmt::Display| CliError::new(format!("cannot save to {}: {e}", folder.display()));
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(failed(&"expected a new or empty folder, so that two logs do not mix"));
    }
    let store = Dir::new(folder);
    for (key, bytes) in evidence.log.objects() {
        store.put_new(key, bytes.clone(), None).await.map_err(|e| failed(&e))?;
    }
    let key = Bytes::from(format!("{}\n", evidence.key));
    store.put_new(KEY_FILE, key, None).await.map_err(|e| failed(&e))?;
    Ok(())
}
