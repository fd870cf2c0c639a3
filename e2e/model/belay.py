"""Runs an agent under `belay run` against the model of this folder, and collects Belay's records and the model's account."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import server  # noqa: E402
from tally import Tally  # noqa: E402, F401: the users of this module import it from here

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECOND_VERIFIER = ROOT / "docs/verifier/belay_verify.py"

PACK = """\
apiVersion: belay.dev/v1alpha1
kind: PolicyPack
metadata: {name: models}
spec:
  environment: laptop
  namespaceSelector: {matchLabels: {belay.dev/environment: laptop}}
  models: {openai: "http://model.test", anthropic: "http://model.test"}
  workflowClasses:
    - name: agents
      allowedEffects: [read]
      egress: [{host: model.test, ports: [80], uses: [Models]}]
      limits: {wallTimeSeconds: 3600, toolCalls: 10, tokens: 1000000000}
      resources: {cpu: "2", memory: 4Gi, ephemeralStorage: 512Mi}
  evidence: {bucket: evidence, mode: Governance, retentionDays: 30}
"""


def task(name, command, env, scopes, memory, tokens):
    spec = {
        "objective": "Do what the documentation's first example does.",
        "workflowClass": "agents",
        "principal": "you@example.com",
        "agent": {
            "image": "registry.example.com/agent:1",
            "command": [str(part) for part in command],
            "env": [{"name": key, "value": value} for key, value in env.items()],
            "resources": {"cpu": "2", "memory": memory, "ephemeralStorage": "256Mi"},
        },
        "tools": [],
        "workspace": {"writeScopes": [{"path": path, "size": "64Mi"} for path in scopes]},
        "limits": {"wallTimeSeconds": 1800, "toolCalls": 1, "tokens": tokens},
    }
    return {"apiVersion": "belay.dev/v1alpha1", "kind": "AgentTask", "metadata": {"name": name}, "spec": spec}


class Ran:
    """A finished run."""

    def __init__(self, name, command, workspace, *, env=None, shown=(), scopes=(), memory="2Gi", tokens=2_000_000, patience=360, port=None):
        """`port` is the port of another model on this machine, whose account is not known."""
        self.tokens = tokens
        provider = server.serve(0)
        threading.Thread(target=provider.serve_forever, daemon=True).start()
        with tempfile.TemporaryDirectory() as folder:
            home = pathlib.Path(folder)
            (home / "pack.yaml").write_text(PACK)
            (home / "task.yaml").write_text(json.dumps(task(name, command, env or {}, scopes, memory, tokens)))
            belay = [os.environ["BELAY"], "run", "task.yaml", "--workspace", str(workspace), "--sandbox", "bwrap", "--output", "json"]
            belay += ["--resolve", f"model.test=127.0.0.1:{port or provider.server_address[1]}", "--evidence", str(home / "evidence")]
            for one in shown:
                belay += ["--ro", str(one)]
            ran = subprocess.run(belay, cwd=home, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=patience)
            self.code, self.stderr = ran.returncode, ran.stderr
            self.events = [json.loads(line) for line in ran.stdout.splitlines()]
            self.verify(home)
        provider.shutdown()
        self.lines = provider.account.lines

    def verify(self, home):
        """Collects the verdicts of both verifiers on the log."""
        log = next((home / "evidence").glob("default/*/*"), "no log")
        self.verdicts = []
        for program in ([os.environ["BELAY"], "verify"], ["/usr/bin/python3", str(SECOND_VERIFIER)]):
            said = subprocess.run([*program, str(log)], cwd=home, capture_output=True, text=True)
            self.verdicts.append((said.stdout + said.stderr).strip())
        self.valid = all(verdict.startswith("VALID") for verdict in self.verdicts)

    def said(self):
        return [event["line"] for event in self.events if event["event"] == "said"]

    def all_records(self):
        return [event["record"] for event in self.events if event["event"] == "record"]

    def records(self, kind):
        return [record for record in self.all_records() if record["kind"] == kind]

    def account(self):
        """Returns the lines of the model's account for calls that have a cost."""
        return [line for line in self.lines if line["api"] in ("chat", "responses", "messages")]

    def denied(self):
        return [(record["target"], record["rule"], record["reason"]) for record in self.records("call.denied")]

    def counter(self):
        """Returns Belay's token counter at the end of the run."""
        return self.all_records()[-1]["usage"]["tokens"] if self.all_records() else 0

    def billed(self):
        return sum(line["billed"] for line in self.account())

    def calls(self):
        """Returns the intent (reservation, length of the request) and the outcome (counted tokens) of each model call."""
        outcomes = {record["call"]: record for record in self.records("call.outcome")}
        intents = [record for record in self.records("call.intent") if record["channel"] == "model"]
        return [(intent, outcomes.get(intent["call"])) for intent in intents]

    def by_size(self):
        """Groups Belay's calls and the lines of the account by the length of the request, because only the length links them."""
        groups = defaultdict(lambda: ([], []))
        for intent, outcome in self.calls():
            groups[intent["requestBytes"]][0].append((intent, outcome))
        for line in self.account():
            groups[int(line["headers"]["content-length"])][1].append(line)
        return list(groups.values())

    def write(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as out:
            for event in self.events:
                out.write(json.dumps(event) + "\n")
            out.write(f"--- stderr\n{self.stderr}\n--- verdicts\n" + "\n".join(self.verdicts) + "\n--- the model's account\n")
            for line in self.lines:
                out.write(json.dumps(line) + "\n")
