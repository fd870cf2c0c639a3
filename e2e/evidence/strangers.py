"""Reads logs of real runs with third-party tools. Each log is a folder as `belay verify --save` writes it.

Usage: strangers.py FSCK FOLDER. Tessera's fsck, securesystemslib with in-toto-attestation, and the second verifier read every log in FOLDER.
They also read copies with one byte changed, which each of them must reject.
"""

import base64
import json
import pathlib
import subprocess
import sys
import tempfile

from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "docs" / "verifier"))
from belay_verify import verify  # noqa: E402

SUMMARY = "summary.dsse.json"
KEY = "witness.vkey"


def objects(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != KEY]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fsck(tool, log, key):
    """Returns whether Tessera's fsck accepts the log as tlog-tiles. Only its output says so: it exits with 0 whatever it finds."""
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        for name, content in log.items():
            if name.startswith("tlog/"):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(content)
        (place / "key").write_text(key)
        origin = log["tlog/checkpoint"].split(b"\n", 1)[0].decode(errors="replace")
        args = ["--storage_url", f"file://{place}/tlog/", "--public_key", place / "key", "--origin", origin, "--ui=false", "-v=1"]
        try:
            done = subprocess.run([tool, *args], capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            return False  # It hangs on some large changed logs. An unchanged log takes a fraction of a second.
        return "Successfully fsck'd" in done.stderr and "fsck failed" not in done.stderr


def summary(log, key):
    """Returns whether securesystemslib accepts the envelope, and in-toto-attestation the statement in it."""
    name, key_id, public = key.split("+", 2)
    signer = SSlibKey(f"{name}+{key_id}", "ed25519", "ed25519", {"public": base64.b64decode(public)[1:].hex()})
    try:
        envelope = Envelope.from_dict(json.loads(log[SUMMARY]))
        envelope.verify([signer], 1)
        statement = Statement.copy_from_pb(json_format.Parse(envelope.payload, statement_pb2.Statement()))
        statement.validate()
        root = base64.b64decode(log["tlog/checkpoint"].split(b"\n")[2]).hex()
        return statement.pb.subject[0].digest["sha256"] == root
    except Exception as refusal:  # Each library has its own exceptions.
        print(f"        {type(refusal).__name__}: {refusal}", file=sys.stderr)
        return False


def changed(log, name, at):
    content = bytearray(log[name])
    content[at % len(content)] ^= 1
    return {**log, name: bytes(content)}


def main(tool, folder):
    passed = failed = 0

    def check(what, holds):
        nonlocal passed, failed
        passed, failed = passed + bool(holds), failed + (not holds)
        print(f"{'ok     ' if holds else 'FAILED '} {what}")

    logs = sorted(path for path in pathlib.Path(folder).iterdir() if (path / SUMMARY).is_file())
    check(f"there are logs of real runs: {len(logs)}", len(logs) >= 6)
    for path in logs:
        log, key = objects(path), (path / KEY).read_text().strip()
        tiles = [name for name in log if name.startswith("tlog/tile/")]
        verdict, findings = verify(log, key)
        check(f"{path.name}: the second verifier says {verdict}", verdict == "VALID")
        print("".join(f"        {finding}\n" for finding in findings), end="")
        check("  Tessera's fsck accepts it", fsck(tool, log, key))
        check("    and none with a byte of a tile or of the root changed", not any(fsck(tool, changed(log, name, 70), key) for name in [*tiles, "tlog/checkpoint"]))
        check("  securesystemslib and in-toto-attestation accept its summary", summary(log, key))
        check("    and none with a byte changed", not any(summary(changed(log, SUMMARY, at), key) for at in (30, 300, -40)))
        check("  the second verifier accepts no object with a byte changed", all(verify(changed(log, name, at), key)[0] == "INVALID" for name in log for at in (5, 50, -5)))
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
