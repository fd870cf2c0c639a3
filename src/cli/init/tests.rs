//! Tests of what is written where, and of what stays.

use std::fs;

use rstest::rstest;

use super::*;

fn args(folder: &Path, model: Option<&str>) -> Args {
    Args {
        folder: folder.to_owned(),
        model: model.map(|model| model.parse().unwrap()),
        model_name: Some("m".to_owned()),
    }
}

fn said(args: &Args) -> Result<String, String> {
    let mut out = Vec::new();
    let done = run(args, &mut out).map_err(|error| error.to_string());
    done.map(|_| String::from_utf8(out).unwrap())
}

#[rstest]
#[case("my-agent", "my-agent")]
#[case("My Agent_2", "my-agent-2")]
#[case("--", "hello")]
#[case("...", "hello")]
#[case("\u{e4}gent", "gent")]
#[case("a.b", "a-b")]
#[case("2024", "2024")]
#[case("a-name-that-is-longer-than-any-other-name--of-a-folder", "a-name-that-is-longer-than-any-other-nam")]
fn a_task_is_named_after_its_folder(#[case] folder: &str, #[case] expected: &str) {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join(folder);
    said(&args(&folder, None)).unwrap();
    let task = fs::read_to_string(folder.join("task.yaml")).unwrap();
    assert!(task.contains(&format!("\n  name: {expected}\n")), "{task}");
}

/// The printed command can be pasted, whatever the folder is called.
#[rstest]
#[case("hello", "hello/task.yaml", "python3 hello/standin.py")]
#[case("my agent", "my agent/task.yaml", "python3 'my agent/standin.py'")]
#[case("it's", "it's/task.yaml", r"python3 'it'\''s/standin.py'")]
#[case("$HOME;ls", "$HOME;ls/task.yaml", "python3 '$HOME;ls/standin.py'")]
fn a_command_is_one_for_a_shell(#[case] folder: &str, #[case] task: &str, #[case] server: &str) {
    let home = tempfile::tempdir().unwrap();
    let told = said(&args(&home.path().join(folder), None)).unwrap();
    let command = told.lines().find_map(|line| line.trim().strip_prefix("belay run ")).unwrap();
    let shell = std::process::Command::new("sh").args(["-c", &format!("printf '%s\\n' {command}")]).output().unwrap();
    let words = String::from_utf8(shell.stdout).unwrap().replace(&format!("{}/", home.path().display()), "");
    assert_eq!(words, format!("{task}\n--upstream\nshop.test={server}\n"));
}

#[test]
fn what_is_there_stays_and_the_rest_is_written() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("mine");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("agent.py"), "print('mine')").unwrap();
    fs::write(folder.join("policy-pack.yaml"), "# mine").unwrap();
    // A dangling link also belongs to the user.
    std::os::unix::fs::symlink("/nonexistent/there", folder.join("standin.py")).unwrap();
    let told = said(&args(&folder, Some("http://192.168.1.5:8000/v1"))).unwrap();
    let kept: Vec<_> = told.lines().filter(|line| line.ends_with("existed, and is unchanged")).collect();
    assert_eq!(kept.len(), 3, "{told}");
    assert_eq!(fs::read_to_string(folder.join("agent.py")).unwrap(), "print('mine')");
    assert!(folder.join("task.yaml").is_file() && folder.join("contracts.yaml").is_file());
    // A pack that stays does not know the model: the output says what it needs.
    assert!(told.contains("openai: http://model.internal:8000") && told.contains("- host: model.internal"), "{told}");

    let all = said(&args(&folder, None)).unwrap_err();
    assert!(all.contains("found all") && all.contains("nothing was written"), "{all}");
}
