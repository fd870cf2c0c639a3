"""What each framework must do, as in the first example of its own documentation: tools, streaming, two tools in one turn, two model calls
at once, and an answer in a schema. Each prompt begins with the name of its part, by which the run finds the requests in the model's
account. The agent's own report is not enough."""

import asyncio
import inspect
import sys
import traceback

TOOLS = "[tools] Use get_weather for Tokyo."
STREAMING = "[streaming] Use get_weather for Tokyo."
PARALLEL = "[parallel] Use get_weather and get_time for Tokyo."
# Each reply takes 2 s, so that the two calls overlap.
TOGETHER = ["[together] Say hello to Tokyo. take 2000 ms", "[together] Say goodbye to Tokyo. take 2000 ms"]
STRUCTURED = "[structured] Describe Tokyo."

PARTS = []


def part(does):
    """Registers a part under the name of its function."""
    PARTS.append(does)
    return does


def weather(city):
    return f"It is sunny in {city}."


def time_of(city):
    return f"It is noon in {city}."


def ended(text):
    """Checks that the text has the model's last words."""
    assert "THE END" in str(text), f"expected the model's last words, found {text!r}"


def main():
    """Runs each part, even if earlier parts failed."""
    failed = 0
    # All parts use one event loop, because clients keep their connections.
    loop = asyncio.new_event_loop()
    for does in PARTS:
        try:
            found = does()
            if inspect.isawaitable(found):
                loop.run_until_complete(found)
            print(f"PART {does.__name__} ok", flush=True)
        except BaseException as error:
            failed += 1
            traceback.print_exc()
            said = " ".join(str(error).split())[:300]
            print(f"PART {does.__name__} failed {type(error).__name__}: {said}", flush=True)
    sys.exit(failed > 0)
