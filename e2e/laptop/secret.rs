//! What an agent learns about a provider's credential from an upstream that repeats the request, or the credential itself.

use std::{fs, path::Path};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::json;

use crate::world::{Ran, World, ended, once};

const KEY: &str = "sk-live-9fQ2xZ7b-rT5mK1wE";

const PACK: &str = "\
apiVersion: belay.dev/v1alpha1
kind: PolicyPack
metadata: {name: laptop}
spec:
  environment: laptop
  namespaceSelector: {matchLabels: {belay.dev/environment: laptop}}
  workflowClasses:
    - name: small
      allowedEffects: [read, write]
      egress:
        - {host: tools.test, ports: [80], uses: [Tools]}
        - {host: model.test, uses: [Models], credentials: [{secret: model-key, key: token}]}
      limits: {wallTimeSeconds: 600, toolCalls: 20, tokens: 100000000}
      resources: {cpu: \"1\", memory: 512Mi, ephemeralStorage: 64Mi}
  models: {openai: \"https://model.test\"}
  evidence: {bucket: evidence, mode: Compliance, retentionDays: 1}
";

/// Functions for an agent that return everything that is visible of a reply: its head, and the sizes of its chunks.
const ASKING: &str = r#"
import socket, urllib.parse
where = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])

def ask(model, text):
    body = json.dumps({"model": model, "max_tokens": 1, "stream": True, "messages": [{"role": "user", "content": text}]}).encode()
    head = f"POST {where.path.rstrip('/')}/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=20) as agent:
        agent.sendall(head.encode() + body)
        reply = b""
        while piece := agent.recv(65536):
            reply += piece
    head, _, body = reply.partition(b"\r\n\r\n")
    return [line for line in head.split(b"\r\n") if not line.lower().startswith(b"date:")], body

def sizes(body):
    found = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        found.append(int(size, 16))
        body = rest[found[-1] + 2:]
    return found

def seen(model, text):
    head, body = ask(model, text)
    chunked = any(line.lower().startswith(b"transfer-encoding") for line in head)
    assert text.encode() in body, (head, body)
    return head, sizes(body) if chunked else len(body)
"#;

fn asked(world: &World, sandbox: &str, key: &str, python: &str, limits: &str) -> Ran {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["model.test".to_owned()]).unwrap();
    let tls = world.task().parent().unwrap().join("tls");
    fs::create_dir_all(&tls).unwrap();
    fs::write(tls.join("crt.pem"), cert.pem()).unwrap();
    fs::write(tls.join("key.pem"), signing_key.serialize_pem()).unwrap();
    world.write("pack.yaml", PACK);
    world.agent(&format!("{ASKING}\n{python}"), "");
    let task = fs::read_to_string(world.task().join("task.yaml")).unwrap();
    let usual = "limits: {wallTimeSeconds: 30, toolCalls: 5, tokens: 1000}";
    assert!(task.contains(usual));
    world.write("task.yaml", &task.replace(usual, limits));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/laptop/repeating.py");
    let model = format!("model.test=exec python3 {} {1}/crt.pem {1}/key.pem", script.display(), tls.display());
    let mut command = world.belay(&["run", "task.yaml", "--output", "json", "--sandbox", sandbox]);
    command.args(["--upstream", &model, "--upstream-ca", tls.join("crt.pem").to_str().unwrap()]);
    command.args(["--credential", "model-key/token=env:KEY"]).env("KEY", key);
    ended(command.output().unwrap())
}

/// Checks an attack that worked on commit e4d8270: it read the credential letter by letter from the sizes of chunks.
fn guesses(world: &World, sandbox: &str) {
    let python = format!(
        r#"
told, pairs, key = 0, 0, "{KEY}"
for length in range(1, len(key)):
    right, wrong = key[:length], key[:length - 1] + "~"
    for model in ("m", "validator"):
        pairs += 1
        told += seen(model, "." * 50 + right) != seen(model, "." * 50 + wrong)
say(f"told apart: {{told}} of {{pairs}}")
"#
    );
    let ran = asked(world, sandbox, KEY, &python, "limits: {wallTimeSeconds: 300, toolCalls: 5, tokens: 10000000}");
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert!(ran.said().contains("told apart: 0 of 48"), "{ran:#?}");
    world.is_valid(&world.log());
    world.nobody_is_left();
}

/// Checks an upstream that repeats the credential: the reply is withheld, recorded and counted, and the task ends.
fn told(world: &World, sandbox: &str) {
    let python = r#"
for model, text in (("m", "hello"), ("validator", "KEY"), ("m", "KEY"), ("letters", "KEY"), ("m", "hello")):
    try: say(f"{model}: {ask(model, text)}")
    except OSError as error: say(f"{model}: {error}")
time.sleep(20)
"#;
    let ran =
        asked(world, sandbox, KEY, python, "limits: {wallTimeSeconds: 60, toolCalls: 5, tokens: 10000000, denials: 3}");
    let said = ran.said();
    assert!(said.contains("data: [DONE]"), "the control passes: {ran:#?}");
    assert!(said.contains("rule: upstream.secret"), "{ran:#?}");
    assert!(!said.contains(KEY), "{said}");
    let denied: Vec<_> = ran.records("call.denied").iter().map(|record| record["rule"].clone()).collect();
    // After three counted denials the task ends, so a further request is one more denial.
    assert_eq!(denied.get(..3), Some(&vec![json!("upstream.secret"); 3][..]), "{ran:#?}");
    assert!(denied.iter().skip(3).all(|rule| rule == "budget.denials"), "{ran:#?}");
    let outcomes = ran.records("call.outcome");
    let withheld: Vec<_> = outcomes.iter().filter(|one| one["rule"] == "upstream.secret").collect();
    assert_eq!(withheld.len(), 3, "{outcomes:#?}");
    assert!(withheld.iter().all(|one| one["outcome"] == "unknown"), "{withheld:#?}");
    assert_eq!(ran.last()["closed"]["failureClass"], "Policy", "{ran:#?}");
    assert!(!String::from_utf8_lossy(&world.all_that_is_kept()).contains(KEY));
    world.is_valid(&world.log());
    world.nobody_is_left();
}

#[test]
fn a_key_that_could_be_found_by_trying_is_not_used() {
    once(|world| {
        let ran = asked(
            world,
            "bwrap",
            "123456",
            "say('begun')",
            "limits: {wallTimeSeconds: 30, toolCalls: 5, tokens: 1000}",
        );
        assert_ne!(ran.code, 0);
        assert!(ran.stderr.contains("model-key/token for model.test is 6 bytes long"), "{ran:#?}");
        assert!(!ran.stderr.contains("123456"));
    });
}

with_both! {
    guesses_of_a_key => guesses;
    a_key_that_is_told => told;
}
