//! `belay init`: a folder that `belay run` runs at once, to begin from.
//!
//! Promises: what is written is examples/hello, as the tests run it, but for the model that `--model` names. Refuses: to overwrite anything;
//! nothing is written where a file is there already.

use std::{io::Write, path::PathBuf};

use self::model::{Model, Provider};
use super::{CliError, folder, terminal::Safe};

/// What follows from the model.
mod model;

const TASK: &str = include_str!("../../examples/hello/task.yaml");
const CONTRACTS: &str = include_str!("../../examples/hello/contracts.yaml");
const PACK: &str = include_str!("../../examples/hello/policy-pack.yaml");
const AGENT: &str = include_str!("../../examples/hello/agent.py");
const AGENT_MESSAGES: &str = include_str!("../../examples/hello/agent_messages.py");
const STANDIN: &str = include_str!("../../examples/hello/standin.py");

/// Make a folder with a task, contracts, a pack and an agent, which `belay run` runs at once.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay init hello && belay run hello/task.yaml --upstream shop.test='python3 hello/standin.py'
      An agent on its rope: what it may do, it does; what it may not, it is told, and the evidence says so.
  belay init hello --model openai
      The same with a real model, whose key is in OPENAI_API_KEY: the command that runs it is said.
  belay init hello --model http://localhost:8000/v1 --model-name qwen3-8b
      A server of yours that speaks OpenAI's API: vLLM, llama.cpp, LiteLLM and others.

Exit codes:
  0  the folder is there
  2  it is not: a file is there already, or cannot be written")]
pub(super) struct Args {
    /// The folder; it is made unless it is there
    #[arg(default_value = "hello")]
    folder: PathBuf,
    /// Whose model the agent asks: openai, anthropic, ollama, or the base URL of a server that speaks OpenAI's API [default: one that stands in]
    #[arg(long, value_name = "PROVIDER|URL")]
    model: Option<Provider>,
    /// The model's name, in place of the provider's usual one
    #[arg(long, value_name = "NAME", requires = "model")]
    model_name: Option<String>,
}

/// Runs the command and gives the exit code.
pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<u8, CliError> {
    let model = args.model.clone().map(|provider| Model::new(provider, args.model_name.as_deref()));
    let model = model.transpose().map_err(CliError::new)?;
    let files = files(model.as_ref());
    folder::fill(&args.folder, files.iter().map(|(name, text, _)| (*name, text.as_str())))?;
    for (name, _, what) in files {
        let path = args.folder.join(name).display().to_string();
        writeln!(out, "{:<30} {what}", Safe(&path).to_string())?;
    }
    let folder = Safe(&args.folder.display().to_string()).to_string();
    let options = model.map(|model| model.options()).unwrap_or_default();
    writeln!(
        out,
        "\nRun it:\n  belay run {folder}/task.yaml --upstream shop.test='python3 {folder}/standin.py'{options}"
    )?;
    Ok(0)
}

/// Name, content, and what it is.
fn files(model: Option<&Model>) -> [(&'static str, String, &'static str); 5] {
    let agent = if model.is_some_and(Model::speaks_messages) { AGENT_MESSAGES } else { AGENT };
    let (task, pack) = match model {
        Some(model) => (model.task(TASK), model.pack(PACK)),
        None => (TASK.to_owned(), PACK.to_owned()),
    };
    let stands_in = match model {
        Some(_) => "stands in for the shop",
        None => "stands in for a model and a shop, so that no key is needed",
    };
    [
        ("task.yaml", task, "what the agent is to do, and its limits"),
        ("contracts.yaml", CONTRACTS.to_owned(), "its tools, and what calls have to be like"),
        ("policy-pack.yaml", pack, "what tasks like it may do at all"),
        ("agent.py", agent.to_owned(), "the agent: forty lines that know nothing of Belay"),
        ("standin.py", STANDIN.to_owned(), stands_in),
    ]
}
