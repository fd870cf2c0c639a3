"""Checks the documents: `documents.py check` reads them, `documents.py run` runs their commands.

`check` needs only Python. It checks that README.md is short, that every relative link has a target, that every page is linked, and that the
Makefile has every `make` target that a page names. `run` must run every command in a `console` block, or `elsewhere` must name the test that
covers it. Every test that e2e/README.md names for a promise must exist, and every stage of e2e/test must be in the table of e2e/README.md and
in e2e/stage-times. `run` runs the commands as they are written, page by page, and compares their output with the page: `…` stands for any
text, and `# exit code N` at the end of a command is its expected exit code. Both end with `N passed, N failed`.
"""

import argparse
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unicodedata

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "e2e"))

from tally import Tally  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
# A new reader needs five minutes for README.md, on a screen of usual width.
README_LINES, README_WIDTH = 150, 160
# In seconds: enough for a build of `belay` on a busy machine.
PATIENCE = 3600
ANYTHING = "…"
# The page with the tables of stages and of promises.
TESTS = ROOT / "e2e/README.md"


def pages():
    """Returns every document that people read."""
    top = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return top + sorted((ROOT / "docs").rglob("*.md")) + [ROOT / "examples/README.md", TESTS]


def name(page):
    return page.relative_to(ROOT).as_posix()


class Command:
    """A command of a page, and the output that the page shows."""

    def __init__(self, page, line, text):
        self.page, self.line, self.text, self.prints = page, line, text, []

    def __str__(self):
        return f"{name(self.page)}:{self.line}: $ {self.bare}"

    @property
    def bare(self):
        """The command without its comment."""
        return re.sub(r"\s+#.*", "", self.text)

    @property
    def code(self):
        """The expected exit code."""
        found = re.search(r"# exit code (\d+)", self.text)
        return int(found.group(1)) if found else 0


def commands(page):
    """Returns the commands of a page's console blocks, in order."""
    found, inside, continued = [], False, False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            inside, continued = line == "```console", False
        elif inside and continued:
            found[-1].text = found[-1].text[:-1] + line.strip()
            continued = line.endswith("\\")
        elif inside and line.startswith("$ "):
            found.append(Command(page, number, line[2:]))
            continued = line.endswith("\\")
        elif inside and found:
            found[-1].prints.append(line)
    return found


class Elsewhere:
    """A command that `run` cannot run, with the test that covers it and the reason."""

    def __init__(self, line, text):
        self.line, self.text, self.by, self.why = line, text, "", ""


def elsewhere():
    found = []
    for number, line in enumerate((HERE / "elsewhere").read_text().splitlines(), 1):
        if line.startswith("$ "):
            found.append(Elsewhere(number, line[2:]))
        elif line.startswith("  by "):
            found[-1].by = line[5:].strip()
        elif line.startswith("  why "):
            found[-1].why = line[6:].strip()
    return found


def anchor(heading):
    """Returns the anchor that GitHub makes from a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    kept = (c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page):
    found, seen = set(), {}
    for heading in re.findall(r"^#+ +(.*)$", without_code(page.read_text()), re.M):
        one = anchor(heading)
        found.add(f"{one}-{seen[one]}" if one in seen else one)
        seen[one] = seen.get(one, 0) + 1
    return found


def broken(page, link):
    """Returns what is wrong with a link, or nothing."""
    path, _, fragment = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"expected a file or a folder at {path}, found none"
    if fragment and (target.suffix != ".md" or fragment not in anchors(target)):
        return f"expected a heading with the anchor #{fragment} in {name(target)}, found none"
    return None


def rows(heading):
    """Returns the rows of the tables below a heading of e2e/README.md: the number of the line, and the text of each cell."""
    found, level = [], 0
    for number, line in enumerate(TESTS.read_text().splitlines(), 1):
        if match := re.match(r"(#+) +(.*)", line):
            if match[2] == heading:
                level = len(match[1])
            elif len(match[1]) <= level:
                level = 0
        elif level and line.startswith("|"):
            found.append((number, [cell.strip() for cell in line.strip("|").split("|")]))
    # Without the two lines of each table's head.
    rules = {number for number, cells in found if set("".join(cells)) <= set("-: ")}
    return [(number, cells) for number, cells in found if number not in rules and number + 1 not in rules]


def rust_tests(text):
    """Returns the names of the tests in a Rust file: functions with a test's attribute, and the entries of `with_both!`."""
    found, marked = set(), False
    for line in text.splitlines():
        if re.match(r" *#\[((tokio|rstest)::)?(test|rstest)\b", line):
            marked = True
        elif match := re.match(r" *(?:async )?fn (\w+)", line):
            if marked:
                found.add(match[1])
            marked = False
    for block in re.findall(r"^with_both! \{\n(.*?)^\}", text, re.M | re.S):
        found.update(re.findall(r"^    (\w+) => ", block, re.M))
    return found


def unheld(reference):
    """Returns what is wrong with a reference, or nothing: `PATH`, `PATH::TEST` in Rust, or `PATH::WORDS` of a case in another file."""
    path, _, test = reference.partition("::")
    if not (ROOT / path).exists():
        return f"expected a file or a folder at {path}, found none"
    if not test:
        return None
    if not (ROOT / path).is_file():
        return f"expected a file before `::`, found the folder {path}"
    text = (ROOT / path).read_text()
    if test in (rust_tests(text) if path.endswith(".rs") else text):
        return None
    return f"expected a test {test} in {path}, found none"


def check_tests(tally):
    """Checks the tables of e2e/README.md, and e2e/stage-times."""
    mend = "name the test that holds this promise, or move the promise to `Promises without a test`"
    promises = rows("Promises and their tests")
    tally.check(name(TESTS), None if promises else "expected a table below `Promises and their tests`, found none")
    for number, cells in promises:
        references = re.findall(r"`([^`]+)`", cells[-1])
        row = f"{name(TESTS)}:{number}: {cells[0]}"
        wrong = [found for found in map(unheld, references) if found] if references else ["expected a test in the last column, found none"]
        tally.check(row, f"{'; '.join(wrong)}: {mend}" if wrong else None)

    script = (ROOT / "e2e/test").read_text()
    stages = set(re.findall(r"^stage_(\w+)\(\)", script, re.M))
    all_stages = set(" ".join(re.findall(r"^(?:LINT|ALL)=\((?:\"[^\"]*\")?(.*)\)$", script, re.M)).split())
    times = (ROOT / "e2e/stage-times").read_text().splitlines()
    timed = [line.split() for line in times if line and not line.startswith("#")]
    for listed, expected, where, mend in (
        ([cells[0].strip("`") for _, cells in rows("Stages")], stages, name(TESTS), "write its row below `Stages`"),
        ([line[0] for line in timed], all_stages, "e2e/stage-times", "write its line, with `-` for what is not measured"),
    ):
        for stage in sorted(expected | set(listed)):
            count = listed.count(stage)
            known = "remove it: e2e/test has no such stage" if stage not in expected else mend
            tally.check(f"{where}: stage {stage}", None if count == 1 and stage in expected else f"found it {count} times: {known}")
    for line in timed:
        good = len(line) == 3 and all(re.fullmatch(r"\d+|-", figure) for figure in line[1:])
        tally.check(f"e2e/stage-times: {line[0]}", None if good else f"expected `STAGE SECONDS SECONDS`, or `-`, found {' '.join(line)}")


def check():
    tally = Tally()
    lines = (ROOT / "README.md").read_text().splitlines()
    tally.check("README.md", f"expected at most {README_LINES} lines, found {len(lines)}" if len(lines) > README_LINES else None)
    wide = [number for number, line in enumerate(lines, 1) if len(line) > README_WIDTH]
    tally.check("README.md", f"expected lines of at most {README_WIDTH} characters, found longer ones: {wide}" if wide else None)

    linked = set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in pages():
        text = without_code(page.read_text())
        for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
            if not re.match(r"[a-z]+:", link):
                tally.check(f"{name(page)}: link to {link}", broken(page, link))
                linked.add((page.parent / link.partition("#")[0]).resolve())
        for target in re.findall(r"`make ([a-z-]+)", text):
            tally.check(f"{name(page)}: make {target}", None if target in targets else "the Makefile has no such target")

    for page in pages():
        alone = page != ROOT / "README.md" and page.resolve() not in linked
        tally.check(name(page), "expected a link to it from another page, found none" if alone else None)

    listed = elsewhere()
    written = {command.bare for page in pages() for command in commands(page)}
    for entry in listed:
        file, _, text = entry.by.partition(": ")
        where = f"e2e/docs/elsewhere:{entry.line}: $ {entry.text}"
        tally.check(where, None if entry.text in written else "no page has this command any more: remove it")
        tally.check(where, None if entry.why else "expected a line `  why REASON`, found none")
        there = text and (ROOT / file).is_file() and text in (ROOT / file).read_text()
        tally.check(where, None if there else f"expected `  by FILE: TEXT` with a test's file and what it runs, found `{entry.by}`")
    texts = [entry.text for entry in listed]
    for twice in {text for text in texts if texts.count(text) > 1}:
        tally.check(f"e2e/docs/elsewhere: $ {twice}", "it is there twice")

    check_tests(tally)
    tally.end()


def plain(text):
    """Returns a text without colours, in which each run of spaces is one space."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text)).strip()


def lacks(printed, wanted):
    """Returns the lines of the page that the command has not printed."""
    lines = [plain(line) for line in printed.splitlines()]
    missing = []
    for line in map(plain, wanted):
        if line.strip(ANYTHING + " ") == "":
            continue
        pattern = ".*".join(re.escape(part) for part in line.split(ANYTHING))
        if not any(re.fullmatch(pattern, one) for one in lines):
            missing.append(line)
    return missing


class Reader:
    """A reader with a clone, a home and an empty folder, who types what a page says."""

    def __init__(self, scratch):
        self.folder, home = scratch / "workspace", scratch / "home"
        home.mkdir()
        shutil.copytree(HERE / "workspace", self.folder)
        for part in ("policy-packs", "config", "examples"):
            shutil.copytree(ROOT / part, self.folder / part, ignore=shutil.ignore_patterns(".venv"))
        # The log and the key that an auditor gets.
        shutil.copytree(ROOT / "e2e/evidence/corpus/approval-triage", self.folder / "evidence")
        shutil.copy(self.folder / "evidence/witness.vkey", self.folder)
        real = pathlib.Path.home()
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")} | {
            "HOME": str(home),
            "CARGO_HOME": os.environ.get("CARGO_HOME", str(real / ".cargo")),
            "RUSTUP_HOME": os.environ.get("RUSTUP_HOME", str(real / ".rustup")),
            "BELAY_CACHE": os.environ.get("BELAY_CACHE", str(real / ".cache/belay")),
            "CARGO_INSTALL_ROOT": str(scratch / "installed"),
            "CARGO_TARGET_DIR": os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target")),
            "PATH": f"{scratch / 'installed/bin'}:{self.builder(scratch / 'builder')}:{os.environ['PATH']}",
        }
        self.at, self.known = self.folder, {}

    @staticmethod
    def builder(folder):
        """Returns a folder with a `cargo` that installs the build of `make hello`. A release build would compile every dependency
        again, to run only a few times."""
        folder.mkdir()
        cargo = folder / "cargo"
        script = f"""#!/bin/sh
[ "$1" != install ] || set -- "$@" --profile dev
exec {shlex.quote(shutil.which("cargo") or "cargo")} "$@"
"""
        cargo.write_text(script)
        cargo.chmod(0o755)
        return folder

    def types(self, command):
        """Runs a command. Returns what is wrong with its exit code or its output, or nothing."""
        mine = command.bare.startswith(("make ", "cargo "))
        if not mine or command.bare not in self.known:
            at = ROOT if mine else self.at
            after = self.folder.parent / "after"
            script = f"{command.bare}\nstatus=$?\npwd > {after}\nexit $status\n"
            ran = subprocess.run(
                ["bash", "-c", script], cwd=at, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", timeout=PATIENCE, check=False,
            )
            if not mine and after.exists():
                self.at = pathlib.Path(after.read_text().strip())
            self.known[command.bare] = (ran.returncode, ran.stdout)
        code, printed = self.known[command.bare]
        # Indented, because other tests also print how many checks have passed.
        print(f"--- {command}", *(f"  | {line}" for line in printed.splitlines()), sep="\n", flush=True)
        if code != command.code:
            return f"expected exit code {command.code}, found {code}"
        missing = lacks(printed, command.prints)
        return f"expected these lines, found none like them: {missing}" if missing else None


def run():
    tally = Tally()
    # The laptop guide installs the `belay` that the other pages use.
    first = ROOT / "docs/guides/laptop.md"
    covered = {entry.text for entry in elsewhere()}
    with tempfile.TemporaryDirectory(prefix="belay-documents-") as scratch:
        reader = Reader(pathlib.Path(scratch))
        for page in [first] + [page for page in pages() if page != first]:
            reader.at = reader.folder
            for command in commands(page):
                if command.bare not in covered:
                    tally.check(str(command), reader.types(command))
    tally.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["check", "run"])
    {"check": check, "run": run}[parser.parse_args().what]()
