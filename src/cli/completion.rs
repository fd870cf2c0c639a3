//! `belay completion`: prints the scripts with which a shell completes commands and flags.
//!
//! Guarantees: the script is generated from the command line itself, and so covers everything that this version has.
//!
//! Non-goals: installing itself, and asking a cluster for names. For `kubectl belay` there is no script for a shell, because kubectl would
//! never call it.

use std::io::Write;

use clap::{Command, ValueEnum};
use clap_complete::{Shell, generate};

use super::CliError;

/// Print a script that completes commands and flags at a prompt
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Examples:
  belay completion bash > ~/.local/share/bash-completion/completions/belay
      For bash, with the package bash-completion. Without it: `source <(belay completion bash)` in ~/.bashrc.
  belay completion zsh > ~/.zfunc/_belay
      For zsh, with `fpath+=(~/.zfunc); autoload -U compinit; compinit` in ~/.zshrc.
  belay completion fish > ~/.config/fish/completions/belay.fish
      For fish.
  kubectl belay completion kubectl > ~/.local/bin/kubectl_complete-belay && chmod +x ~/.local/bin/kubectl_complete-belay
      For `kubectl belay` in any shell. kubectl calls an executable of this name on PATH, if its own completion is set up. The script needs
      bash.

The folders must exist. Start a new shell to load the scripts.")]
pub(super) struct Args {
    /// The shell, or kubectl for its plugin
    #[arg(value_enum)]
    shell: For,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum For {
    Bash,
    Zsh,
    Fish,
    Kubectl,
}

/// Makes bash complete what kubectl asks about: the words after `kubectl belay`, of which the last is unfinished. The last line is for
/// kubectl: 4 means that files are no answer, and 0 that they are.
const ASKED_BY_KUBECTL: &str = r#"
COMP_WORDS=(belay "$@") COMP_CWORD=$#
_belay belay "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
[ ${#COMPREPLY[@]} = 0 ] && echo :0 && exit
printf '%s\n' "${COMPREPLY[@]}" :4
"#;

/// Writes the script.
pub(super) fn run(args: &Args, mut command: Command, plugin: bool, out: &mut dyn Write) -> Result<u8, CliError> {
    let mut script = Vec::new();
    let mut of = |shell| generate(shell, &mut command, "belay", &mut script);
    match args.shell {
        For::Kubectl => {
            of(Shell::Bash);
            write!(
                out,
                "#!/usr/bin/env bash\n# kubectl_complete-belay: kubectl runs it to complete `kubectl belay`.\n"
            )?;
            script.extend(ASKED_BY_KUBECTL.bytes());
        }
        _ if plugin => {
            return Err(CliError::new(
                "expected `kubectl belay completion kubectl`, found a shell's name: kubectl completes its plugins by an executable `kubectl_complete-belay` on PATH, whatever the shell; for the command `belay`, use `belay completion SHELL`",
            ));
        }
        For::Bash => of(Shell::Bash),
        For::Zsh => of(Shell::Zsh),
        For::Fish => of(Shell::Fish),
    }
    out.write_all(&script)?;
    Ok(0)
}
