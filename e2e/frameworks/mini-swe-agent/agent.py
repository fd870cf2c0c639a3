"""mini-swe-agent: its command-line program, which works in a shell until the task is done."""

import os
import subprocess
import sys

import parts


@parts.part
def tools():
    """Runs the task's code, and then the command with which the agent's own instructions end."""
    prompt = "[tools] Run `echo made by hand > /tmp/note.txt`, then `cat /tmp/note.txt`."
    command = [sys.executable, "-m", "minisweagent.run.mini", "--yolo", "--exit-immediately", "--model", f"openai/{os.environ['MODEL']}"]
    ran = subprocess.run([*command, "--task", prompt, "--output", "/tmp/t.json"], cwd="/tmp", capture_output=True, text=True, timeout=120)
    print(ran.stdout, ran.stderr)
    with open("/tmp/note.txt") as note:
        assert ran.returncode == 0 and note.read() == "made by hand\n"


parts.main()
