"""The latency that Belay adds to model calls, compared with LiteLLM's proxy: `ONLY=PREFIX BELAY=PROGRAM model.py --litellm FOLDER --logs FOLDER`.

One client (agent/client.py) calls one model (paced.py, over TLS) in four ways, in turn: directly, from the sandbox of `belay run` with a
credential that the gateway adds and looks for in each reply, through LiteLLM's proxy with its default settings, and through `socat`. The
added latency is the difference to the direct calls of the same run at the same percentile: for the first token of a stream, for each
later token, and for a whole reply. `socat` decrypts and copies bytes, and does nothing else. What it adds is called the floor: a proxy that
does more can hardly add less. All processes share this machine's cores. The benchmark fails on an error, never on a figure.

Where the kernel allows it, idle cores are kept from sleeping, for all ways alike. Otherwise the figures are mostly the time that cores take to
wake up: many times what a proxy computes for a token, and different on each machine.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "model"))
import belay
from served import Served, litellm

# This path is the same in the sandbox and on this machine.
PYTHON = "/usr/bin/python3"
KEY = "sk-bench-Zm9yIG5vYm9keSBlbHNl"
TOKENS = 25
# By calls at a time: the number of calls in a round, and the goal as a share of what LiteLLM adds.
AT_ONCE = {1: (40, 0.2), 32: (256, 0.1)}
# The names of measures, by the kind of call and the token.
NAMES = {("stream", "first"): "first", ("stream", "later"): "later", ("whole", "first"): "whole"}
PACK = belay.PACK.replace("http://model.test", "https://model.test").replace(
    "ports: [80], uses: [Models]", "ports: [443], uses: [Models], credentials: [{secret: model, key: token}]"
)


def phases(only):
    """Returns the client's arguments for the measures whose names start with `only`."""

    names = [(kind, at_once, f"model.{at_once}.{name}") for at_once in AT_ONCE for (kind, _), name in NAMES.items()]
    wanted = dict.fromkeys((kind, at_once) for kind, at_once, name in names if name.startswith(only) or only.startswith(name))
    if not wanted:
        raise SystemExit(f"error: no measure begins with {only!r}; there are: {', '.join(name for _, _, name in names)}")
    return [f"{kind}:{at_once}:{AT_ONCE[at_once][0]}" for kind, at_once in wanted]


def client(program, asked):
    return [program, "-B", "client.py", str(TOKENS), *asked]


def certificate(folder):
    """Creates the model's self-signed certificate. Returns a file with the certificate, and a file with the key and the certificate."""
    alone, both = folder / "model.crt", folder / "model.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=model.test"
    command += " -addext basicConstraints=critical,CA:FALSE -addext subjectAltName=DNS:model.test,IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", both, "-out", alone], check=True, capture_output=True)
    both.write_text(both.read_text() + alone.read_text())
    return alone, both


def plainly(server, authority):
    """Returns a way to run the client on this machine, as any program."""

    def way(asked):
        env = os.environ | {"OPENAI_BASE_URL": f"{server.address}/v1", "OPENAI_API_KEY": KEY, "SSL_CERT_FILE": str(authority)}
        ran = subprocess.run(client(PYTHON, asked), cwd=HERE / "agent", env=env, capture_output=True, text=True, timeout=600)
        if ran.returncode:
            raise SystemExit(f"error: the client failed: {ran.stderr[-2000:]}")
        return ran.stdout.splitlines()

    return way


def copying(server, log):
    """Starts a proxy that decrypts and copies bytes."""
    to = f"OPENSSL:127.0.0.1:{server.port},verify=0,nodelay"
    return Served(["socat", "TCP-LISTEN:PORT,bind=127.0.0.1,fork,reuseaddr,nodelay,backlog=256", to], "/", log)


def through_belay(server, authority):
    """Returns a way to run the client in Belay's sandbox, as its agent."""

    def way(asked):
        with tempfile.TemporaryDirectory() as folder:
            home = pathlib.Path(folder)
            (home / "pack.yaml").write_text(PACK)
            (home / "task.yaml").write_text(json.dumps(belay.task("bench", client(PYTHON, asked), {}, [], "1Gi", 900_000_000)))
            command = [os.environ["BELAY"], "run", "task.yaml", "--workspace", HERE / "agent", "--sandbox", "bwrap", "--output", "json"]
            command += ["--resolve", f"model.test=127.0.0.1:{server.port}", "--upstream-ca", authority, "--credential", "model/token=env:KEY"]
            # The events go to a file, so that no other process is busy with them during the measurement.
            with open(home / "events", "w+") as events:
                ran = subprocess.run(
                    [*command, "--evidence", home / "evidence"],
                    cwd=home,
                    env=os.environ | {"KEY": KEY},
                    stdin=subprocess.DEVNULL,
                    stdout=events,
                    stderr=subprocess.PIPE,
                    text=True,
                    timeout=600,
                )
                events.seek(0)
                told = [json.loads(line) for line in events]
            said = [one["line"] for one in told if one["event"] == "said"]
            if ran.returncode:
                raise SystemExit(f"error: belay run ended with {ran.returncode}: {ran.stderr[-2000:]} {said[-3:]}")
            log = next((home / "evidence").glob("default/*/*"))
            subprocess.run([os.environ["BELAY"], "verify", log], check=True, stdout=subprocess.DEVNULL)
        return said

    return way


def rounds(ways, count, asked):
    """Returns the samples in milliseconds, by the way, the number of calls at a time, and the measure."""
    samples = {name: collections.defaultdict(list) for name in ways}
    for number in range(count):
        # The ways take turns at being first.
        for name in sorted(ways, key=lambda name: (list(ways).index(name) + number) % len(ways)):
            print(f"bench: round {number + 1} of {count}, {name}", file=sys.stderr, flush=True)
            for line in ways[name](asked):
                (kind, at_once), first, *later = json.loads(line)
                found = samples[name]
                found[at_once, NAMES[kind, "first"]].append(first / 1000)
                if later:
                    found[at_once, NAMES[kind, "later"]] += [one / 1000 for one in later]
    return samples


def percentile(samples, percent):
    """Returns a percentile by nearest rank."""
    ranked = sorted(samples)
    return ranked[max(-(-len(ranked) * percent // 100) - 1, 0)]


def measures(samples):
    """Returns measures in the format of benches/measure.rs: the value is what Belay adds, the baseline is what LiteLLM adds. Each also has
    the floor, which is what socat adds."""
    for at_once, what in sorted(samples["belay"]):
        for percent in (50, 99):
            direct, *through = (percentile(samples[way][at_once, what], percent) for way in ("direct", "belay", "litellm", "socat"))
            added, baseline, floor = (one - direct for one in through)
            _, goal = AT_ONCE[at_once]
            # If LiteLLM seems to add nothing, there were too few calls, or the machine was busy.
            ratio = added / baseline if baseline > 0 else None
            n = len(samples["belay"][at_once, what])
            name = f"model.{at_once}.{what}-added-p{percent}"
            yield {"name": name, "value": added, "unit": "ms", "n": n, "baseline": baseline, "floor": floor, "ratio": ratio, "goal": goal, "ok": ratio is not None and ratio <= goal}


def report(samples):
    """Prints a table, and appends the measures to the file. Prints the absolute figures to stderr."""
    for at_once, what in sorted(samples["belay"]):
        figures = [f"{way} {percentile(of[at_once, what], 50):.2f}, {percentile(of[at_once, what], 99):.2f}" for way, of in samples.items()]
        print(f"bench: model.{at_once}.{what}, ms at p50, p99: {'; '.join(figures)}", file=sys.stderr)
    print(f"{'measure':<28} {'value':>10} {'unit':<4} {'n':>6} {'baseline':>10} {'floor':>7} {'ratio':>7} {'goal':>7}  ok")
    with open(ROOT / "target/bench.jsonl", "a") as out:
        for one in measures(samples):
            out.write(json.dumps(one) + "\n")
            ratio = "-" if one["ratio"] is None else f"{one['ratio']:.2f}"
            row = "{name:<28} {value:>10.2f} {unit:<4} {n:>6} {baseline:>10.2f} {floor:>7.2f} {ratio:>7} {goal:>7.2f}".format(**one | {"ratio": ratio})
            print(f"{row}  {'yes' if one['ok'] else 'no'}")


@contextlib.contextmanager
def awake():
    """Keeps idle cores from sleeping, with the kernel's interface for it: https://docs.kernel.org/power/pm_qos_interface.html."""
    try:
        latency = open("/dev/cpu_dma_latency", "wb", buffering=0)
    except OSError as error:
        print(f"bench: idle cores sleep in this run: {error}", file=sys.stderr)
        yield
        return
    with latency:
        # 0 microseconds, for as long as the file is open.
        latency.write((0).to_bytes(4, sys.byteorder))
        yield


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--litellm", type=pathlib.Path, required=True, help="a virtual environment with LiteLLM's proxy")
    parser.add_argument("--logs", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    asked = phases(os.environ.get("ONLY", ""))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        authority, key = certificate(folder)
        with contextlib.ExitStack() as ended:
            model = Served([PYTHON, "-B", HERE / "paced.py", KEY, key], "/", given.logs / "model.log", authority=authority)
            ended.callback(model.end)
            proxy = litellm(given.litellm, folder, "gpt-4o", f"{model.address}/v1", given.logs / "litellm.log", KEY, authority)
            ended.callback(proxy.end)
            copier = copying(model, given.logs / "socat.log")
            ended.callback(copier.end)
            ways = {"direct": plainly(model, authority), "belay": through_belay(model, authority)}
            ways |= {"litellm": plainly(proxy, authority), "socat": plainly(copier, authority)}
            ended.enter_context(awake())
            samples = rounds(ways, given.rounds, asked)
    report(samples)


if __name__ == "__main__":
    main()
