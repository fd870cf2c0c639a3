"""mini-swe-agent: its command, which works in a shell until it is done."""

import os
import subprocess
import sys

import parts


@parts.part
def tools():
    """The task's code is run, then what the agent's own instructions end with."""
    prompt = "[tools] Run `echo made by hand > /tmp/note.txt`, then `cat /tmp/note.txt`."
    command = [sys.executable, "-m", "minisweagent.run.mini", "--yolo", "--exit-immediately", "--model", f"openai/{os.environ['MODEL']}"]
    ran = subprocess.run([*command, "--task", prompt, "--output", "/tmp/t.json"], cwd="/tmp", capture_output=True, text=True, timeout=120)
    print(ran.stdout, ran.stderr)
    with open("/tmp/note.txt") as note:
        assert ran.returncode == 0 and note.read() == "made by hand\n"


parts.main()
