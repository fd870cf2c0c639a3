#!/usr/bin/env python3
"""A second verifier for Belay's evidence logs, written from docs/evidence-format.md alone (Python 3.11, cryptography).

    belay_verify.py DIR [--witness-key VKEY|FILE]       a folder with a log; the key is in DIR/witness.vkey if not given
    belay_verify.py --stream [--witness-key VKEY|FILE]  for each line {"key": VKEY, "objects": {KEY: BASE64}} of stdin
                                                        a line {"verdict": VERDICT, "findings": [FINDING, ...]}

It starts from the witness's key and believes nothing else. It promises that VALID means: every object has, byte for
byte, the one form that the format gives it; each segment is signed by the attempt's harness and the witness (the last
one by the witness alone) over the tree of all records so far; the rules of section 5 hold from the first record to
task.closed, those by which the policy in the log lets each call pass among them; tiles and summary are what follows
from the records. INCOMPLETE means that so much holds for what is there, but the end, tiles or the summary are not.
NEWER means it up to a segment of a later version, which the witness has signed and which is not judged. All else is
INVALID. It refuses what the format does not name: other members, types or forms, other objects under segments/, tlog/
and incidents/. Objects elsewhere, as under rollback/, are ignored.
It does not promise what a set of objects cannot show: that nobody holds back the end of a live log, that objects have
one version and a lock, what a commitment commits to. Nor does it evaluate a policy's expressions and patterns: what the
records say of them it takes, as section 5 lets it.
Exit code: 0 VALID, 1 INVALID, 3 INCOMPLETE, 4 NEWER, 2 for a command line, a key or a folder that cannot be read.
"""
import argparse, base64, decimal, functools, itertools, json, os, pathlib, re, stat, sys  # noqa: E401
from collections import Counter, namedtuple
from hashlib import sha256

from belay_records import FORMS, History, at, check_form, inside, need, show
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

LONGEST, LARGEST, DEEPEST = 2**28, 2**53 - 1, 100  # bytes of an object, numbers in records, levels of JSON

DOCUMENTS = {"policyDigest": "policy", "rollbackDigest": "plan"}  # what names them, and their forms

class Newer(Exception):
    """What follows is of a later version."""

def same(found: bytes, expected: bytes, what: str):
    if found != expected:
        start = max(0, len(os.path.commonprefix([found, expected])) - 30)
        need(False, what, f"from byte {start} {expected[start:start + 90]}", found[start:start + 90])

# Canonical JSON (RFC 8785) and base64: what is read has to be what would be written of it. So a name that is there
# twice is refused, as one of them is gone after reading, and a lone surrogate, as it cannot be written.
def number(text: str):
    value = float(text)
    need(value - value == 0, "number", "a finite one", text)
    return int(text) if re.fullmatch("-?[0-9]+", text) else value

def write_json(value) -> str:
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be", "surrogatepass"))
        return "{" + ",".join([write_json(name) + ":" + write_json(value[name]) for name in names]) + "}"
    if isinstance(value, list):
        return "[" + ",".join([write_json(item) for item in value]) + "]"
    if type(value) is int and abs(value) > LARGEST:
        value = float(value)
    if not isinstance(value, float):
        return json.dumps(value, ensure_ascii=False)  # which escapes just what RFC 8785 says
    if 1e-6 <= abs(value) < 1e21:  # as ECMAScript; repr has the same digits, but other bounds for an exponent
        return format(decimal.Decimal(repr(value)), "f").removesuffix(".0")
    digits, exponent = repr(value).split("e")
    return f"{digits}e{int(exponent):+d}"

def read_json(data: bytes, what: str):
    levels = deepest = 0
    for bracket in re.findall(rb'"(?:[^"\\]|\\.)*"|[\[{\]}]', data):  # and strings, to pass over brackets in them
        levels += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(bracket, 0)
        deepest = max(deepest, levels)
    need(deepest <= DEEPEST, what, f"at most {DEEPEST} levels", deepest)
    value = json.loads(data.decode(), parse_int=number, parse_float=number, parse_constant=number)
    same(data, write_json(value).encode(), f"{what}: canonical JSON")
    return value

def read_base64(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    need(base64.b64encode(data).decode() == text, "base64", "padding and no stray bits", text)
    return data

# Keys, signatures of notes, and the tree's inner nodes (sections 2 and 3)
NAME, NAMES = r"[^\s+\x00-\x1f\x7f-\x9f]+", ("belay.dev/witness", "belay.dev/self-witness")

class Key(namedtuple("Key", "name id type public")):
    def check(self, signature: bytes, message: bytes):
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except (InvalidSignature, ValueError):
            need(False, f"signature of {self.name}", "64 bytes that verify", signature.hex())

def read_key(text: str) -> Key:
    match = re.fullmatch(rf"({NAME})\+([0-9a-f]{{8}})\+(.*)", text)
    need(match, "key", "<name>+<hex ID>+<base64>", text)
    data = read_base64(match[3])
    need(len(data) == 33 and data[0] in (1, 4), "key", "a type, 0x01 or 0x04, and 32 bytes", data)
    key = Key(match[1], sha256(match[1].encode() + b"\n" + data).hexdigest()[:8], data[0], data[1:])
    need(match[2] == key.id, "key", f"the ID {key.id}", match[2])
    return key

def check_witness(text: bytes, signatures: str, witness: Key):
    """Of a later version it is only known that the witness has signed."""
    *lines, rest = signatures.split("\n")
    need(lines and len(lines) <= 16 and not rest, "note", "1 to 16 lines of signatures", signatures)
    for line in lines:
        match = re.fullmatch(rf"\u2014 ({NAME}) ([A-Za-z0-9+/=]+)", line)
        need(match and len(read_base64(match[2])) > 4, "note", "a line '\u2014 <name> <base64>'", line)
    its = [line for line in lines if line.split(" ")[1] == witness.name]
    check_signatures(text, "\n".join(its + [""]), [witness])

def check_signatures(text: bytes, signatures: str, keys: list[Key]):
    """The keys, each once and nobody else, have signed the note with this text, by the lines after the empty one."""
    names, (*lines, rest) = [key.name for key in keys], signatures.split("\n")
    need(sorted(line.rpartition(" ")[0] for line in lines) == sorted(f"\u2014 {name}" for name in names) and not rest,
         "note", f"lines '\u2014 <name> <base64>' of {names}", signatures)
    for line in lines:
        key, data = keys[names.index(line.split(" ")[1])], read_base64(line.split(" ")[2])
        need(data[:4].hex() == key.id, f"signature of {key.name}", f"the ID {key.id}", data[:4].hex())
        if key.type == 4:
            time = int.from_bytes(data[4:12], "big")
            need(time < 2**63, f"signature of {key.name}", "a time of at most 2^63 - 1", time)
            key.check(data[12:], b"cosignature/v1\ntime %d\n" % time + text)
        else:
            key.check(data[4:], text)

def join(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()

class Log:
    """What has been read so far, and what there is to say against it."""

    def __init__(self, objects: dict[str, bytes], odd: dict[str, str]):
        self.objects, self.where, self.missing = objects, "witness.vkey", []  # where: what is being read
        self.bad = [f"{key}: {what}" for key, what in sorted(odd.items())]
        self.note, self.key, self.root, self.lines, self.records = "", None, b"", [], []
        self.peaks = []  # the roots of whole subtrees, the largest first
        self.history = History(self.hold)

    def hold(self, holds, what: str, expected: str, found):  # like need, for what does not keep us from reading on
        if not holds:
            self.bad.append(f"{self.where}: {what}: expected {expected}, found {show(found)}")

    def check(self, key: str):
        self.witness = read_key(key)
        need(self.witness[0] in NAMES and self.witness.type == 4, "key", f"one of {NAMES}, type 4", key)
        read = set()
        while (key := f"segments/{len(self.records):010d}.jsonl") in self.objects:
            read.add(key)
            self.segment(key)
        ended = bool(self.records) and self.records[-1]["kind"] == "task.closed"
        tlog = dict(self.tiles()) if ended else {}
        there = tlog.keys() | {"summary.dsse.json"} if ended else {key}  # what has to be there
        self.missing += [f"{name}: expected to be there, found nothing" for name in sorted(there - self.objects.keys())]
        for self.where, data in sorted(self.objects.items()):
            under, digest = self.where.startswith, sha256(data).hexdigest()
            if under("segments/"):
                self.hold(self.where in read, "section 4", f"{key} as the next segment", "this one")
            elif under("incidents/"):
                self.hold(self.where == f"incidents/{digest}.json", "section 1", "its SHA-256 as its name", digest)
            elif under("tlog/"):
                need(self.where in tlog, "section 7", "no such object", data)
                same(data, tlog[self.where], "section 7")
            elif self.where == "summary.dsse.json":
                need(ended, "section 8", "no summary before task.closed", "one")
                self.summary(data)

    def segment(self, key: str):
        """Section 4: first what holds in every version, then the form of the records, what they say, and the keys."""
        self.where, history = key, self.history
        header, *lines, rest = self.objects[key].split(b"\n")
        need(rest == b"", "section 4", "lines that end with a newline", rest)
        given = read_json(header, "header")
        self.note, digests = given["checkpoint"], given.get("documents", [])
        documents, lines = [read_json(line, "document") for line in lines[:len(digests)]], lines[len(digests):]
        found = [sha256(line).hexdigest() for line in self.objects[key].split(b"\n")[1:1 + len(digests)]]
        need(found == digests, "section 4", f"documents with the digests {show(digests)}", found)
        for name in (name for part in inside(documents) if type(part) is dict for name in part):
            need(not name.startswith("$serde_json::"), "section 4", "no such name in a document", name)
        need(given.keys() <= {"checkpoint", "documents"} and (digests or "documents" not in given), "header",
             "`checkpoint` and perhaps `documents`", given)
        text, _, signatures = self.note.partition("\n\n")
        history.origin = history.origin or text.split("\n")[0]
        need(re.fullmatch(rf"belay\.dev/task/(?!.*/){NAME}", history.origin), "origin", "belay.dev/task/<UID>", text)
        need(lines, "section 4", "one record or more", lines)
        records, peaks = [], list(self.peaks)
        for seq, line in enumerate(lines, len(self.records)):
            self.where = f"{key}: record {seq}"
            records.append(record := read_json(line, "record"))
            need(type(at(record, "seq")) is int and record["seq"] == seq, "section 4", f"seq {seq}", record)
            node, left = sha256(b"\x00" + line).digest(), seq
            while left & 1:
                left, node = left >> 1, join(peaks.pop(), node)
            peaks.append(node)
        self.where, root = key, functools.reduce(lambda right, left: join(left, right), reversed(peaks))
        expected = f"{history.origin}\n{len(self.records) + len(records)}\n{base64.b64encode(root).decode()}"
        same(text.encode(), expected.encode(), "checkpoint")
        if later := self.later(records, documents, digests):
            check_witness(f"{text}\n".encode(), signatures, self.witness)
            raise Newer(f"{key}: {later}: use a verifier that knows it")
        need(all(type(document) is dict for document in documents), "section 5", "objects as documents", documents)
        self.forms(key, lines, records)
        named = [record[name] for record in records for name in DOCUMENTS if name in record]
        same(header, write_json({"checkpoint": self.note} | ({"documents": named} if named else {})).encode(), "header")
        for record in records:
            self.where = f"{key}: record {record['seq']}"
            if record["kind"] == "attempt.opened":
                self.key, name = read_key(record["verifierKey"]), f"{history.origin}/{record['attempt']}"
                self.hold((self.key.name, self.key.type) == (name, 1), "rule 3", f"a key {name} of type 1", self.key)
            history.record(record, documents)
        self.where, self.peaks, self.root = key, peaks, root
        self.lines += lines
        self.records += records
        keys = [self.key, self.witness] if records[0]["actor"] == "harness" else [self.witness]
        check_signatures(f"{text}\n".encode(), signatures, keys)

    def later(self, records: list, documents: list, digests: list) -> str | None:
        """Section 5, Versions: by what a segment is of a later version."""
        for v in (at(record, "v") for record in records):
            if type(v) is int and 1 < v <= LARGEST:
                return f"expected version 1, found {v}"
        for document, digest, (name, form) in zip(documents, digests, DOCUMENTS.items()):
            if type(document) is dict and at(records[0], name) == digest:
                try:
                    check_form(document, FORMS[form], form)
                except ValueError as error:
                    return f"expected a {form} of its form: {error}"

    def forms(self, key: str, lines: list[bytes], records: list):
        """Section 5: the forms of a segment's records."""
        for record, line in zip(records, lines):
            self.where = f"{key}: record {record['seq']}"
            need(len(line) <= 65535, "section 4", "at most 65535 bytes", len(line))
            beyond = [n for n in inside(record) if type(n) is float or type(n) is int and abs(n) > LARGEST]
            need(not beyond, "number", "whole numbers up to 2^53 - 1", *beyond[:1] or [0])
            kind = str(at(record, "kind"))
            need("." in kind and kind in FORMS, "kind", "one of version 1", kind)
            check_form(record, f"{FORMS['record']} {FORMS[kind]}", kind)
            found = tuple(record[name] for name in ("v", "actor", "attempt"))
            expected = (1, records[0]["actor"], records[0]["attempt"])
            need(found == expected, "section 4", f"v, and the segment's actor and attempt {expected}", found)
            need(kind != "attempt.opened" or record is records[0], "section 5", "attempt.opened first", kind)
        self.where = key

    def tiles(self):
        """All that has to be under tlog/ (section 7)."""
        def tiled(level, items):
            for number in range(-(-len(items) // 256)):
                tile, digits = items[256 * number:256 * (number + 1)], str(number)
                path = re.sub("(...)(?=.)", r"x\1/", digits.zfill(len(digits) + -len(digits) % 3))
                yield f"tlog/tile/{level}/{path}" + (f".p/{len(tile)}" if len(tile) < 256 else ""), b"".join(tile)

        yield "tlog/checkpoint", self.note.encode()
        yield from tiled("entries", [len(line).to_bytes(2, "big") + line for line in self.lines])
        level, hashes = 0, [sha256(b"\x00" + line).digest() for line in self.lines]
        while hashes:
            yield from tiled(level, hashes)
            for _ in range(8):  # up by one: pairs, and not a last one that is alone
                hashes = [join(*pair) for pair in zip(hashes[::2], hashes[1::2])]
            level += 1

    def summary(self, data: bytes):
        """Section 8. All but the signature follows from the records, so that it is written again and compared."""
        each = lambda kind, name: [record[name] for record in self.records if record["kind"] == kind]
        last, policy, history = self.records[-1], self.history.policy, self.history
        task, fates = at(policy, "task") or {}, Counter(history.fates.values())
        about = {name: task.get(name, "") for name in ("principal", "workflowClass", "taskClass")} | {"task": ""}
        if policy:
            about |= {"task": f"{task['namespace']}/{task['name']}", "pack": policy["pack"]}
        payload = write_json({
            "_type": "https://in-toto.io/Statement/v1", "predicateType": "https://belay.dev/execution/v1",
            "subject": [{"name": history.origin, "digest": {"sha256": self.root.hex()}}], "predicate": about | {
                "policyDigests": [digest for digest, _ in itertools.groupby(each("attempt.opened", "policyDigest"))],
                "records": len(self.records), "started": self.records[0]["time"], "ended": last["time"],
                "attempts": len([*itertools.groupby(each("attempt.opened", "attempt"))]), "usage": last["usage"],
                "outcome": {n: last[n] for n in last.keys() & {*"phase failureClass reason exitCode images".split()}},
                "calls": {"notApplied": fates["not_applied"]} | {c: fates[c] for c in ("applied", "unknown", "open")},
                "denials": history.denials,
                "approvals": Counter(each("approval.decided", "state"))}}).encode()
        kind, given = "application/vnd.in-toto+json", json.loads(data)
        same(base64.b64decode(given["payload"]), payload, "payload")
        signature = {"keyid": f"{self.witness.name}+{self.witness.id}", "sig": given["signatures"][0]["sig"]}
        envelope = {"payload": base64.b64encode(payload).decode(), "payloadType": kind, "signatures": [signature]}
        same(data, write_json(envelope).encode() + b"\n", "envelope")
        self.witness.check(read_base64(signature["sig"]),
                           b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload))


def verify(objects: dict[str, bytes], key: str, odd: dict[str, str] = {}) -> tuple[str, list[str]]:
    """The verdict on a log, by its objects under their keys below the prefix, what lies there and is none, and the
    findings. It raises nothing."""
    log, newer = Log(objects, odd), []
    try:
        log.check(key)
    except Newer as later:
        newer = [str(later)]
    except Exception as error:
        what = str(error) if type(error) is ValueError else f"expected what can be read, found {show(error)}"
        log.bad.append(f"{log.where}: {what}")
    verdict = "INVALID" if log.bad else "NEWER" if newer else "INCOMPLETE" if log.missing else "VALID"
    findings = log.bad + newer + log.missing
    return verdict, [re.sub(r"[^\x20-\x7e]", lambda match: ascii(match[0])[1:-1], line) for line in findings]


# The command line
def read_plain(path: pathlib.Path, most: int) -> bytes:
    """A regular file of at most so many bytes. A ValueError says what else lies there: none of it is waited for."""
    kinds = {"LNK": "a symbolic link", "DIR": "a folder", "FIFO": "a FIFO", "SOCK": "a socket", "CHR": "a device",
             "BLK": "a device"}
    def found(mode):
        return next((name for kind, name in kinds.items() if getattr(stat, f"S_IS{kind}")(mode)), "something else")
    expected = f"expected a regular file of at most {most} bytes, found"
    if not stat.S_ISREG(mode := os.lstat(path).st_mode):
        raise ValueError(f"{expected} {found(mode)}")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())  # it may have become something else by now
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{expected} {found(status.st_mode)}")
        data = file.read(most + 1) if status.st_size <= most else b""
    if max(status.st_size, len(data)) > most:
        raise ValueError(f"{expected} one of {max(status.st_size, len(data))} bytes")
    return data

def read_folder(folder: pathlib.Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The objects in a folder, and what lies in their place and is none (section 1)."""
    objects, odd = {}, {}
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder, found {folder}")
    waiting = [(folder / name, name) for name in ("segments/", "incidents/", "tlog/", "summary.dsse.json")]
    waiting = [(path, key) for path, key in waiting if os.path.lexists(path)]
    while waiting:
        path, key = waiting.pop()
        try:
            if key.endswith("/") and (path.is_dir() and not path.is_symlink()):
                for entry in os.scandir(path):
                    inner = entry.is_dir(follow_symlinks=False)
                    if re.search("[\ud800-\udfff]", entry.name):  # as Python reads bytes that are no UTF-8
                        odd[key + ascii(entry.name)] = "expected a name in UTF-8, found another"
                    elif inner or not entry.name.startswith(".unfinished-"):
                        waiting.append((pathlib.Path(entry.path), f"{key}{entry.name}" + "/" * inner))
            else:
                objects[key] = read_plain(path, LONGEST)
        except ValueError as error:
            odd[key] = str(error)
    return objects, odd

def main() -> int:
    parser = argparse.ArgumentParser(description="Verifies the evidence log of a Belay task.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("folder", nargs="?", metavar="DIR", help="a folder with the log")
    which.add_argument("--stream", action="store_true", help="read logs from stdin, one JSON object a line")
    parser.add_argument("--witness-key", metavar="VKEY|FILE", help="the witness's key, if it is not DIR/witness.vkey")
    options = parser.parse_args()
    try:
        key = options.witness_key or options.folder and os.path.join(options.folder, "witness.vkey")
        if key:
            if not options.witness_key:
                key = read_plain(pathlib.Path(key), 4096).decode().removesuffix("\n")
            elif os.path.isfile(key):
                key = pathlib.Path(key).read_text("utf-8").removesuffix("\n")
            read_key(key)
        if not options.stream:
            objects, odd = read_folder(pathlib.Path(options.folder))
            verdict, findings = verify(objects, key, odd)
            print(verdict + ", self-witnessed" * key.startswith("belay.dev/self-"), *findings, sep="\n  ")
            return {"VALID": 0, "INVALID": 1, "INCOMPLETE": 3, "NEWER": 4}[verdict]
        for line in sys.stdin.buffer:
            given = json.loads(line)
            objects = {name: base64.b64decode(data, validate=True) for name, data in given["objects"].items()}
            print(json.dumps(dict(zip(("verdict", "findings"), verify(objects, key or given["key"])))), flush=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        parser.error(f"cannot be read: {error}")
    return 0

if __name__ == "__main__":
    sys.exit(main())
