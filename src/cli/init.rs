//! `belay init`: creates a folder that `belay run` runs at once.
//!
//! Guarantees: the files are those of examples/hello, which the tests run, except for the model that `--model` names and the name of the
//! task, which is the folder's. An existing file stays as it is, and the output says so.
//!
//! Non-goals: changing an existing file so that it fits the others.

use std::{
    io::Write,
    net::{IpAddr, ToSocketAddrs},
    path::{Path, PathBuf},
};

use self::model::{Model, Provider};
use super::{CliError, folder, terminal::Safe};
use crate::policy::hostname::Hostname;

/// What follows from the model.
mod model;

const TASK: &str = include_str!("../../examples/hello/task.yaml");
const CONTRACTS: &str = include_str!("../../examples/hello/contracts.yaml");
const PACK: &str = include_str!("../../examples/hello/policy-pack.yaml");
const AGENT: &str = include_str!("../../examples/hello/agent.py");
const AGENT_MESSAGES: &str = include_str!("../../examples/hello/agent_messages.py");
const STANDIN: &str = include_str!("../../examples/hello/standin.py");
/// The file of the pack.
const PACK_FILE: &str = "policy-pack.yaml";
/// The maximum length of a task name that is made from a folder's name, because pod names are made from it in turn.
const LONGEST_NAME: usize = 40;

/// Make a folder with a task, contracts, a pack and an agent, which `belay run` runs at once.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay init hello && belay run hello/task.yaml --upstream shop.test='python3 hello/standin.py'
      An agent on its rope. Belay allows some of its calls and denies others, and the evidence has every decision.
  belay init hello --model openai
      The same with a real model and the key in OPENAI_API_KEY. The output has the command that runs it.
  belay init hello --model http://localhost:8000/v1 --model-name qwen3-8b
      Your own server that speaks OpenAI's API: vLLM, llama.cpp, LiteLLM and others. A server on another machine of your network
      (http://192.168.1.5:8000/v1, http://gpubox:8000/v1) gets a name in the pack. You pass its address with --resolve.

Then make it yours. The agent is agent.py, or what `command` in task.yaml says. Install Python packages beside it with
`/usr/bin/python3 -m venv FOLDER/.venv && FOLDER/.venv/bin/pip install …`, and set `command: [.venv/bin/python, agent.py]`.
contracts.yaml has the agent's tools. policy-pack.yaml says what tasks may do. `belay lint FOLDER` checks them.

Exit codes:
  0  the files were written
  2  no file was written: all files exist already, or one cannot be written")]
pub(super) struct Args {
    /// The folder. It is created if it does not exist, and existing files stay as they are. The task gets its name
    #[arg(default_value = "hello")]
    folder: PathBuf,
    /// Provider of the model: openai, anthropic, ollama, or the base URL of a server that speaks OpenAI's API [default: a stand-in without
    /// a model]
    #[arg(long, value_name = "PROVIDER|URL")]
    model: Option<Provider>,
    /// Name of the model [default: the provider's usual one]
    #[arg(long, value_name = "NAME", requires = "model")]
    model_name: Option<String>,
}

/// Runs the command and returns the exit code.
pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<u8, CliError> {
    let model =
        args.model.clone().map(|provider| Model::new(provider, args.model_name.as_deref(), &|host| addresses(host)));
    let model = model.transpose().map_err(CliError::new)?;
    let files = files(model.as_ref(), &task_name(&args.folder));
    let kept = folder::complete(&args.folder, files.iter().map(|(name, text, _)| (*name, text.as_str())))?;
    for (name, _, what) in &files {
        let path = args.folder.join(name).display().to_string();
        let what = if kept.contains(name) { "existed, and is unchanged" } else { what };
        writeln!(out, "{:<30} {what}", Safe(&path).to_string())?;
    }
    let file = |name: &str| Safe(&args.folder.join(name).display().to_string()).to_string();
    let server = quoted(&format!("python3 {}", word(&file("standin.py"))));
    let options = model.as_ref().map(Model::options).unwrap_or_default();
    writeln!(out, "\nRun it:\n  belay run {} --upstream shop.test={server}{options}", word(&file("task.yaml")))?;
    for note in model.iter().flat_map(Model::notes) {
        writeln!(out, "note: {}", Safe(&note))?;
    }
    if let Some(model) = model.filter(|_| kept.contains(&PACK_FILE)) {
        writeln!(out, "note: {} existed; for this model it needs", file(PACK_FILE))?;
        for line in model.wanted_of_a_pack().lines() {
            writeln!(out, "{}", Safe(line))?;
        }
    }
    Ok(0)
}

/// Returns a text as one word for a shell, quoted only if needed.
fn word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/+:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.to_owned() } else { quoted(text) }
}

/// Returns a text in a shell's quotes.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Returns the addresses that programs of this machine find for a name, or none.
#[expect(clippy::disallowed_methods, reason = "a person checks the address in the folder's files before a run uses it")]
fn addresses(host: &Hostname) -> Vec<IpAddr> {
    (host.as_str(), 0).to_socket_addrs().map(|found| found.map(|one| one.ip()).collect()).unwrap_or_default()
}

/// Returns the name of the task: the folder's name as a valid object name.
fn task_name(folder: &Path) -> String {
    // The folder may not exist yet, and `.` has no name of its own.
    let whole = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    let whole = std::fs::canonicalize(&whole).unwrap_or(whole);
    let name = whole.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let plain = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
    let name: String = name.chars().map(plain).collect();
    let parts: Vec<_> = name.split('-').filter(|part| !part.is_empty()).collect();
    let name: String = parts.join("-").chars().take(LONGEST_NAME).collect();
    let name = name.trim_end_matches('-');
    if name.is_empty() { "hello".to_owned() } else { name.to_owned() }
}

/// Returns the name, the content and the description of each file.
fn files(model: Option<&Model>, task_name: &str) -> [(&'static str, String, &'static str); 5] {
    let agent = if model.is_some_and(Model::speaks_messages) { AGENT_MESSAGES } else { AGENT };
    let task = TASK.replacen("  name: hello\n", &format!("  name: {task_name}\n"), 1);
    let (task, pack, agent, standin) = match model {
        Some(model) => (model.task(&task), model.pack(PACK), model.agent(agent), model.standin(STANDIN)),
        None => (task, PACK.to_owned(), agent.to_owned(), STANDIN.to_owned()),
    };
    let stands_in = match model {
        Some(_) => "stands in for the shop",
        None => "stands in for a model and a shop, so that no key is needed",
    };
    [
        ("task.yaml", task, "the agent's objective and limits"),
        ("contracts.yaml", CONTRACTS.to_owned(), "its tools, and the rules for their calls"),
        (PACK_FILE, pack, "what tasks of its class may do"),
        ("agent.py", agent, "the agent: forty lines that know nothing of Belay"),
        ("standin.py", standin, stands_in),
    ]
}

#[cfg(test)]
mod tests;
