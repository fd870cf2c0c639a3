"""Runs third-party agent frameworks, unmodified, through `belay run`: `frameworks.py [--matrix FILE] NAME=FOLDER…`.

Each framework has a folder here with the first example of its documentation (agent.py or agent.mjs). FOLDER has the framework itself. The
model is e2e/model, with gpt-4o's limits. A part passes if the agent reports it as done and the model's account shows it. For each run, a
check compares Belay's counter with what the model would bill. Ends with `N passed, N failed`; --matrix writes the page for docs/.
"""

import argparse
import json
import pathlib
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "model"))
import belay  # noqa: E402

PARTS = ["tools", "streaming", "parallel", "together", "structured"]


@dataclass
class Framework:
    title: str
    package: str  # the version of this package is the framework's version
    apis: str
    # Settings that it needs in a sandbox without a home folder and without the internet. None changes what the framework does.
    env: dict = field(default_factory=dict)
    model: str = "gpt-4o"
    # The framework's own parts, in addition to PARTS.
    more: tuple = ()
    # The members of PARTS that the framework does not have, and why.
    lacks: dict = field(default_factory=dict)
    scopes: tuple = ("/tmp",)
    # What a user must know.
    notes: tuple = ()
    node: bool = False
    memory: str = "2Gi"


CLAUDE = "claude-sonnet-4-5"
FRAMEWORKS = {
    "openai-agents": Framework(
        "OpenAI Agents SDK (Python)",
        "openai-agents",
        "Responses",
        more=("guardrail", "sandbox"),
        notes=(
            "give a SandboxAgent `capabilities=[Filesystem(), Shell()]`: by default the provider shortens the conversation, which is denied "
            "(`compaction`) unless the pack allows it by name",
        ),
    ),
    "anthropic": Framework("Anthropic SDK (Python)", "anthropic", "Messages", model=CLAUDE, scopes=()),
    "langgraph": Framework("LangGraph", "langgraph", "chat completions", scopes=()),
    "pydantic-ai": Framework("pydantic-ai", "pydantic-ai-slim", "chat completions", scopes=()),
    "instructor": Framework("Instructor", "instructor", "chat completions", scopes=()),
    "smolagents": Framework("smolagents", "smolagents", "chat completions", scopes=()),
    "strands": Framework("Strands Agents", "strands-agents", "chat completions", scopes=()),
    "agent-framework": Framework("Microsoft Agent Framework", "agent-framework-core", "chat completions", scopes=()),
    "llama-index": Framework("LlamaIndex", "llama-index-core", "chat completions"),
    "agno": Framework("Agno", "agno", "chat completions", scopes=()),
    "crewai": Framework("CrewAI", "crewai", "chat completions"),
    "google-adk": Framework("Google Agent Development Kit (by LiteLLM)", "google-adk", "chat completions"),
    "mini-swe-agent": Framework(
        "mini-swe-agent",
        "mini-swe-agent",
        "chat completions",
        # Without this, it asks the user for its settings.
        {"MSWEA_CONFIGURED": "true"},
        lacks={
            "streaming": "it does not stream",
            "parallel": "its only tool is the shell",
            "together": "one conversation a program",
            "structured": "it answers by commands",
        },
    ),
    "claude-agent-sdk": Framework(
        "Claude Agent SDK (Claude Code)",
        "claude-agent-sdk",
        "Messages",
        # Without ENABLE_TOOL_SEARCH=false, the model must search for custom tools before it can call them.
        {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "ENABLE_TOOL_SEARCH": "false"},
        model=CLAUDE,
        more=("shell",),
        memory="3Gi",
    ),
    "openai-agents-js": Framework("OpenAI Agents SDK (Node)", "@openai/agents", "Responses", scopes=(), more=("guardrail",), node=True),
    "ai-sdk": Framework(
        "Vercel AI SDK",
        "ai",
        "Responses, Messages",
        {"MODEL_OF_ANTHROPIC": CLAUDE},
        scopes=(),
        notes=(
            "for models of OpenAI set `providerOptions: {openai: {store: false}}`: without it, it refers to messages that OpenAI stored, which is denied "
            "(`item_reference`)",
        ),
        node=True,
    ),
    "codex": Framework(
        "OpenAI Codex",
        "@openai/codex",
        "Responses",
        model="gpt-5-mini",
        notes=(
            "set `-c web_search=disabled`: the provider's own search is denied",
            "set `--dangerously-bypass-approvals-and-sandbox`: it cannot create its sandbox inside Belay's, which contains it already",
            "name the model's address as `-c openai_base_url=$OPENAI_BASE_URL`; it tries a WebSocket first, which is denied, and continues without one",
        ),
        node=True,
        lacks={"parallel": "its shell is one tool", "together": "one conversation a program"},
    ),
    "litellm": Framework("LiteLLM SDK", "litellm", "chat completions, Messages", {"MODEL_OF_ANTHROPIC": CLAUDE}),
}


def version(name, framework):
    """Returns the pinned version of a framework."""
    if framework.node:
        lock = json.loads((HERE / name / "package-lock.json").read_text())
        return lock["packages"][f"node_modules/{framework.package}"]["version"]
    pinned = (HERE / name / "requirements.txt").read_text()
    return re.search(rf"^{re.escape(framework.package)}==(\S+)", pinned, re.M | re.I).group(1)


class Run(belay.Ran):
    """One run of one framework, and its results."""

    def __init__(self, name, folder, node, logs):
        self.name, self.framework, self.log = name, FRAMEWORKS[name], logs / f"{name}.log"
        with tempfile.TemporaryDirectory() as home:
            space = pathlib.Path(home) / "workspace"
            shutil.copytree(HERE / name, space)
            shutil.copy(HERE / ("parts.mjs" if self.framework.node else "parts.py"), space)
            shown, command = [folder], [folder / "bin/python", "agent.py"]
            if self.framework.node:
                (space / "node_modules").symlink_to(folder / "node_modules")
                command = [node, "agent.mjs"]
                shown.append(pathlib.Path(node).parent.parent)
            env = {"MODEL": self.framework.model, "HOME": "/tmp", "PYTHONPATH": "/workspace", "PYTHONDONTWRITEBYTECODE": "1"}
            more = {"scopes": self.framework.scopes, "memory": self.framework.memory}
            super().__init__(name, command, space, env=env | self.framework.env, shown=shown, **more)
        self.write(self.log)

    def of(self, part):
        """Returns the requests of a part that the model answered."""
        mine = [line for line in self.account() if f"[{part}]" in json.dumps(line["request"])]
        return [line for line in mine if line["status"] == 200 and line["end"] in ("whole", "left")]

    def shows(self, part):
        """Returns what the account lacks for a part, or None."""
        lines = self.of(part)
        if not lines:
            return "the model has no request of it"
        if part in ("tools", "parallel"):
            least = 2 if part == "parallel" else 1
            if not any(len(line["calls"]) >= least for line in lines):
                return f"no reply had {least} calls"
        if part == "streaming" and not any(line["stream"] and line["produced"] == line["would"] for line in lines):
            return "no reply was streamed to its end"
        if part == "together":
            some = sorted(lines, key=lambda line: line["began"])
            if not any(one["ended"] > two["began"] for one, two in zip(some, some[1:])):
                return "no two requests were there at once"
        return None

    def parts(self):
        """Returns each part with None if it passed, or with the reason if it failed."""
        told = {}
        for line in self.said():
            found = re.match(r"PART (\w+) (ok|failed ?)(.*)", line)
            if found:
                told[found.group(1)] = None if found.group(2) == "ok" else found.group(3)
        result = {}
        for part in [*PARTS, *self.framework.more]:
            if part in self.framework.lacks:
                continue
            said = told.get(part, f"the agent ended before it (exit code {self.code})")
            result[part] = said or (self.shows(part) if part in PARTS else None)
        return result


def check(tally, run):
    """Prints and counts the results of a run."""
    before = tally.failed
    for part, wrong in run.parts().items():
        tally.check(f"{run.name}: {part}", wrong)
    counter, billed = run.counter(), run.billed()
    tally.check(f"{run.name}: counter", None if counter == billed else f"Belay counted {counter} tokens, the model bills {billed}")
    tally.check(f"{run.name}: evidence", None if run.valid else run.verdicts)
    if tally.failed > before:
        for target, rule, reason in dict.fromkeys(run.denied()):
            print(f"        denied: {target}: {rule}: {reason}")
        for line in run.account():
            if line["status"] >= 400:
                print(f"        the model refused: {line['status']} {line.get('why')}")
        print(f"        see {run.log}")


COLUMNS = {"tools": "tools", "streaming": "streams", "parallel": "tools in parallel", "together": "calls at once", "structured": "typed answers"}


def matrix(runs):
    """Returns the page. Runs with the same results and versions give the same page."""
    head = ["framework", "version", "API", *COLUMNS.values(), "counted as billed"]
    lines = [
        "# Agent frameworks under Belay",
        "",
        "`make frameworks` generates this page. Each framework is pinned and unmodified. It runs the first example of its own documentation under",
        "`belay run` with bubblewrap, against a model with the limits of gpt-4o and Claude Sonnet (`e2e/model`). *yes* means that the agent got what",
        "it asked for, and that the model's own log confirms it. *counted as billed* means that Belay counted the tokens that the model would bill.",
        "The examples are in `e2e/frameworks`. Each example has the settings that a framework needs in a sandbox without a home folder: `HOME=/tmp`,",
        "and a write scope `/tmp` if the framework writes files.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    notes = []
    for run in runs:
        framework, found, about = run.framework, run.parts(), []
        row = [framework.title, version(run.name, framework), framework.apis]
        for part, column in COLUMNS.items():
            if part in framework.lacks:
                row.append("–")
                about.append(f"no {column}: {framework.lacks[part]}")
            else:
                row.append("**no**" if found[part] else "yes")
                about += [f"{column} failed: {found[part]}"] if found[part] else []
        row.append("yes" if run.counter() == run.billed() else "**no**")
        lines.append("| " + " | ".join(row) + " |")
        about += [f"its own {part}: {found[part] or 'yes'}" for part in framework.more]
        env = [f"`{key}={value}`" for key, value in framework.env.items() if not key.startswith("MODEL")]
        about += [f"set {', '.join(env)}"] if env else []
        about += framework.notes
        hosts = sorted({target for target, rule, _ in run.denied() if rule.startswith("egress.")})
        about += [f"it tries to connect to {', '.join(hosts)}, and continues without"] if hosts else []
        if about:
            notes.append(f"- **{framework.title}**: {'; '.join(about)}.")
    return "\n".join([*lines, "", "## What to know", *notes]) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--matrix", type=pathlib.Path)
    parser.add_argument("--node", help="the program node")
    parser.add_argument("--logs", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
    parser.add_argument("--list", action="store_true", help="say the names that there are")
    parser.add_argument("frameworks", nargs="*", metavar="NAME=FOLDER")
    given = parser.parse_args()
    if given.list:
        return print("\n".join(FRAMEWORKS))
    tally, runs = belay.Tally(), []
    for one in given.frameworks:
        name, folder = one.split("=", 1)
        run = Run(name, pathlib.Path(folder), given.node, given.logs)
        runs.append(run)
        check(tally, run)
    if given.matrix:
        given.matrix.write_text(matrix(runs))
    tally.end()


main()
