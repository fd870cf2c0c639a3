//! Real shells complete the commands of `belay`, and a real troff renders the manual pages.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn belay(args: &[&str]) -> Vec<u8> {
    run(Command::new(env!("CARGO_BIN_EXE_belay")).args(args)).stdout
}

/// Returns a folder with the completion script of a shell.
fn script(shell: &str, name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), belay(&["completion", shell])).unwrap();
    folder
}

fn lines(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

/// Returns how bash completes the last of these words.
fn by_bash(words: &[&str]) -> Vec<String> {
    let folder = script("bash", "belay");
    let program = r#"source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        completes=$(complete -p belay); completes=${completes##*-F }; completes=${completes%% *}
        "$completes" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"; printf '%s\n' "${COMPREPLY[@]}""#;
    lines(&run(Command::new("bash").args(["-c", program, "bash"]).arg(folder.path().join("belay")).args(words)))
}

#[test]
fn bash_completes_commands_flags_and_values() {
    assert_eq!(by_bash(&["belay", "ver"]), ["verify"]);
    assert_eq!(by_bash(&["belay", "run", "--sand"]), ["--sandbox"]);
    assert_eq!(by_bash(&["belay", "run", "--sandbox", "b"]), ["bwrap"]);
    assert_eq!(by_bash(&["belay", "contract", "in"]), ["init"]);
    assert!(by_bash(&["belay", "nothing-such"]).concat().is_empty());
}

#[test]
fn fish_completes_commands_flags_and_values() {
    let folder = script("fish", "belay.fish");
    let ask = |line: &str| {
        let program = format!("source {}; complete -C '{line}'", folder.path().join("belay.fish").display());
        let output = run(Command::new("fish").args(["--no-config", "-c", &program]).env("HOME", folder.path()));
        lines(&output).iter().map(|line| line.split('\t').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ask("belay ver"), ["verify"]);
    assert_eq!(ask("belay run --sand"), ["--sandbox"]);
    assert_eq!(ask("belay run --sandbox b"), ["bwrap"]);
}

/// zsh completes only at a prompt, so the test gives it one.
#[test]
fn zsh_completes_commands_and_flags() {
    let folder = script("zsh", "_belay");
    let ask = |line: &str| {
        let program = r#"
            zmodload zsh/zpty; zpty shell zsh -f -i
            zpty -w shell "PS1='> '; fpath=($1 \$fpath); autoload -Uz compinit; compinit -u -d $1/dump; stty -echo; print re''ady"
            zpty -r shell text '*ready*'
            zpty -w -n shell "$2"$'\t'
            zpty -w -n shell $' #\C-a: \n'
            zpty -w shell "print do''ne"
            zpty -r shell text '*done*'; print -r -- "$text""#;
        let output = run(Command::new("zsh")
            .args(["-f", "-c", program, "zsh"])
            .arg(folder.path())
            .arg(line)
            .env("TERM", "dumb"));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let said = ask("belay ver");
    assert!(said.contains("belay verify "), "{said}");
    let said = ask("belay run --sand");
    assert!(said.contains("belay run --sandbox"), "{said}");
}

/// kubectl runs an executable beside the plugin for completion, and reads a directive after the answers.
#[test]
fn kubectl_completes_its_plugin() {
    let folder = script("kubectl", "kubectl_complete-belay");
    let ask = |words: &[&str]| {
        lines(&run(Command::new("bash").arg(folder.path().join("kubectl_complete-belay")).args(words)))
    };
    assert_eq!(ask(&["ver"]), ["verify", ":4"]);
    assert_eq!(ask(&["watch", "--name"]), ["--namespace", ":4"]);
    assert_eq!(ask(&["nothing-such"]), [":0"]);

    let plugin = folder.path().join("kubectl-belay");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_belay"), &plugin).unwrap();
    let refused = Command::new(&plugin).args(["completion", "bash"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("kubectl belay completion kubectl") && said.contains("kubectl_complete-belay"), "{said}");
    assert_eq!(run(Command::new(&plugin).args(["completion", "kubectl"])).stdout, belay(&["completion", "kubectl"]));
}

/// Returns the page as a terminal shows it. troff must have no warnings.
fn page(file: &Path) -> String {
    let output = run(Command::new("groff").args(["-man", "-ww", "-Tutf8", "-P-cbou"]).arg(file));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{}", file.display());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn each_command_has_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    belay(&["man", "--out", pages.to_str().unwrap()]);
    let help = String::from_utf8(belay(&["--help"])).unwrap();
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: Vec<_> =
        commands.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect();
    assert!(commands.contains(&"run") && commands.contains(&"man"), "{commands:?}");
    let top = page(&pages.join("belay.1"));
    for command in commands {
        let said = page(&pages.join(format!("belay-{command}.1")));
        // troff fills lines with additional spaces.
        let words = said.split_whitespace().collect::<Vec<_>>().join(" ");
        for part in [format!("belay-{command} - "), format!("belay {command} "), "SEE ALSO belay(1)".into()] {
            assert!(words.contains(&part), "expected {part} in {said}");
        }
        assert!(top.contains(&format!("belay-{command}(1)")), "{top}");
    }
    page(&pages.join("belay-contract-init.1"));
    let run = page(&pages.join("belay-run.1"));
    // The columns are those of `--help`.
    assert!(
        run.contains("EXIT CODES\n") && run.contains("       0    the task succeeded\n       1    its agent failed"),
        "{run}"
    );
    assert_eq!(fs::read(pages.join("belay.1")).unwrap(), belay(&["man"]));
}
