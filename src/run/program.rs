//! Resolves an agent's command in its sandbox: the program, the working folder and the environment.
//!
//! Guarantees: the check before a run and the run itself use the same values, because both take them from here.
//!
//! Non-goals: running anything.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{
    RunError,
    sandbox::{
        command::Shown,
        root::{self, Image},
    },
};
use crate::render::{Finding, agent::Agent, validated::Validated, validated::Workload};

/// The paths of the task's folder in the sandbox. The second is used if the task has something else at the first.
const WORKSPACE: [&str; 2] = ["/workspace", "/task"];
/// The agent's default `PATH`.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The path of the task's folder in the sandbox, and the path of the task that has taken the usual place.
pub(super) struct Workspace {
    pub(super) at: &'static str,
    pub(super) taken_by: Option<String>,
}

/// Returns the path of the task's folder in the sandbox.
pub(super) fn workspace(agent: &Agent<'_>) -> Result<Workspace, RunError> {
    let mounts = agent.mounts.iter().map(|mount| mount.path.as_str());
    let declared: Vec<&str> = mounts.chain(agent.write_scopes.iter().map(|scope| scope.path.as_str())).collect();
    let within = |one: &str, other: &str| one == other || one.starts_with(&format!("{other}/"));
    let taken = |place: &str| declared.iter().find(|path| within(path, place) || within(place, path));
    let at = WORKSPACE.into_iter().find(|place| taken(place).is_none()).ok_or_else(|| {
        RunError::Sandbox(format!(
            "expected {} to be free for the task's folder, found that the task mounts something at each; use other paths",
            WORKSPACE.join(" or ")
        ))
    })?;
    let usual = WORKSPACE.first().filter(|usual| **usual != at);
    Ok(Workspace { at, taken_by: usual.and_then(|usual| taken(usual)).map(|path| (*path).to_owned()) })
}

/// Returns the command: the task's command and arguments, or else those of an unpacked image.
pub(super) fn command(agent: &Agent<'_>, image: Option<&Image>) -> Vec<String> {
    let mut command = match agent.workload {
        Workload::Agent { command, args, .. } => command.iter().chain(args).cloned().collect(),
        Workload::Rollback => Vec::new(),
    };
    if command.is_empty() {
        command.extend(image.iter().flat_map(|image| image.process.args.iter().cloned()));
    }
    command
}

/// Returns the environment. The image's variables override the defaults, and the task's override the image's.
pub(super) fn environment(agent: &Agent<'_>, image: Option<&Image>) -> Vec<(String, String)> {
    // Python buffers its output to a pipe: its lines would appear after the calls that followed them.
    let own = [("PATH", PATH), ("HOME", "/"), ("LANG", "C.UTF-8"), ("PYTHONUNBUFFERED", "1")].into_iter();
    let own = own.chain(image.into_iter().flat_map(|image| image.process.variables()));
    let own = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
    own.chain(agent.env.iter().cloned()).collect::<BTreeMap<_, _>>().into_iter().collect()
}

/// Returns the working folder.
pub(super) fn folder(image: Option<&Image>, workspace: &str) -> String {
    image.and_then(|image| image.process.cwd.as_deref()).unwrap_or(workspace).to_owned()
}

/// Returns what is wrong with the command, or `None` if it is a program in the sandbox.
///
/// # Errors
/// Returns an error if there is no path left for the task's folder.
pub fn wrong(
    validated: &Validated,
    image: Option<&Image>,
    (task, read_only): (&Path, &[PathBuf]),
) -> Result<Option<Finding>, RunError> {
    let agent = validated.agent(1);
    let at = workspace(&agent)?.at;
    let Some(program) = command(&agent, image).into_iter().next() else { return Ok(None) };
    let path = environment(&agent, image).into_iter().find(|(name, _)| name == "PATH").map(|(_, path)| path);
    let mut binds: Vec<(PathBuf, PathBuf)> = match image {
        Some(image) => vec![("/".into(), image.root().clone())],
        None => root::shown().map(|place| (place.into(), place.into())).collect(),
    };
    binds.extend(read_only.iter().map(|folder| (folder.clone(), folder.clone())));
    binds.push((at.into(), task.to_owned()));
    let unknown = agent.mounts.iter().map(|mount| mount.path.as_str());
    let unknown =
        unknown.chain(agent.write_scopes.iter().map(|scope| scope.path.as_str())).map(PathBuf::from).collect();
    let shown = Shown { binds, unknown, cwd: folder(image, at).into(), path: path.unwrap_or_default() };
    Ok(shown.wrong(&program).map(|said| {
        Finding::new(
            "spec.agent.command",
            "a program that the sandbox has",
            said,
            format!("the agent sees the task's folder as {at}, and this machine's /usr"),
        )
    }))
}
