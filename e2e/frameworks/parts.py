"""What each framework is asked to do, in the words of its own documentation's first example: tools, streaming, two tools in one turn, two
calls of the model at once, and an answer in a schema. Each prompt begins with the name of its part, by which the run finds the requests
in the model's account: what an agent says of itself is not enough."""

import asyncio
import inspect
import sys
import traceback

TOOLS = "[tools] Use get_weather for Tokyo."
STREAMING = "[streaming] Use get_weather for Tokyo."
PARALLEL = "[parallel] Use get_weather and get_time for Tokyo."
# Each takes a while, so that they are there at the same time.
TOGETHER = ["[together] Say hello to Tokyo. take 2000 ms", "[together] Say goodbye to Tokyo. take 2000 ms"]
STRUCTURED = "[structured] Describe Tokyo."

PARTS = []


def part(does):
    """A part by the name of what does it."""
    PARTS.append(does)
    return does


def weather(city):
    return f"It is sunny in {city}."


def time_of(city):
    return f"It is noon in {city}."


def ended(text):
    """The model's last words have come."""
    assert "THE END" in str(text), f"expected the model's last words, found {text!r}"


def main():
    """Does each part, whatever became of those before it."""
    failed = 0
    # One for all parts: clients keep their connections.
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
