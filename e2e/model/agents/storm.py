"""Makes many calls to a model that fails on purpose: `storm.py SEED CALLS AT_ONCE [FROM]`. The calls use all three APIs. AT_ONCE calls run
at a time. Some calls are abandoned before their end. Without FROM, the faults are random. With FROM, every reply is cut: the first reply of
each API at byte FROM, and each later reply one byte after the previous reply of its API.

The script runs in Belay's sandbox and uses no library, so each call is one request and nothing retries. It prints one line of JSON for each
call.
"""

import http.client
import json
import os
import random
import sys
import threading
import urllib.parse

OPENAI, ANTHROPIC = os.environ["OPENAI_BASE_URL"], os.environ["ANTHROPIC_BASE_URL"]
# Each word is one token, so no provider charges less for the words than the model of these tests.
WORDS = "the sun is out and the day is long so we go to the old town by bus and see a big red boat on the sea".split()
FAULTS = [
    *(["", ""] * 6),
    *("429", "503", "529", "500", "html-502", "drop", "gzip", "low", "slow-30", "pace-2", "end-40", "none", "zero"),
    *("cut", "cut", "cut", "error-0", "error-1", "error-9"),
]


APIS = ["chat", "responses", "messages"]


def one(random_, number, start):
    """Returns the URL and the body of a request, and the number of events after which it is abandoned (None: never)."""
    api = random_.choice(APIS) if start is None else APIS[number % len(APIS)]
    fault = random_.choice(FAULTS)
    stream = random_.random() < 0.7
    if fault == "cut":
        fault = f"cut-{random_.choice([0, 1, 2, 7, random_.randrange(200), random_.randrange(3000)])}"
    if random_.random() < 0.2:
        fault = "+".join(filter(None, [fault, "pace-1"]))
    leaves = random_.randrange(60) if random_.random() < 0.2 else None
    if start is not None:
        fault, leaves, stream = f"cut-{start + number // len(APIS)}", None, True
    base = {"chat": ["gpt-4o", "o4-mini"], "responses": ["gpt-4o", "gpt-5-mini"], "messages": ["claude-sonnet-4-5"]}[api]
    model = random_.choice(base) + (f"-fault-{fault}" if fault else "")
    words = random_.choice([1, 20, 60, 150])
    padding = " ".join(random_.choices(WORDS, k=1 + 3 * (number % 200)))
    prompt = f"call {number}: {padding}. write {words} words"
    messages = [{"role": "user", "content": prompt}]
    limit = random_.choice([100, 1000, 4000])
    if api == "chat":
        body = {"model": model, "messages": messages, "stream": stream}
        if random_.random() < 0.7:
            body["max_completion_tokens"] = limit
        if stream and random_.random() < 0.7:
            body["stream_options"] = {"include_usage": True}
        path = OPENAI + "/chat/completions"
    elif api == "responses":
        body = {"model": model, "input": messages, "stream": stream}
        if random_.random() < 0.7:
            body["max_output_tokens"] = limit
        path = OPENAI + "/responses"
    else:
        body = {"model": model, "messages": messages, "max_tokens": limit, "stream": stream}
        path = ANTHROPIC + "/v1/messages"
    return path, body, leaves


def call(path, body, leaves):
    """Makes a call. Returns the status, how the call ended, and after how many events."""
    url = urllib.parse.urlsplit(path)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=120)
    events = 0
    try:
        headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
        connection.request("POST", url.path, json.dumps(body), headers)
        reply = connection.getresponse()
        while line := reply.readline():
            events += line == b"\n"
            if leaves is not None and events >= leaves:
                return reply.status, "left", events
        return reply.status, "read", events
    except (OSError, http.client.HTTPException) as error:
        return 0, type(error).__name__, events
    finally:
        connection.close()


def main():
    seed, calls, at_once, *start = map(int, sys.argv[1:])
    random_ = random.Random(seed)
    todo = [(number, *one(random_, number, start[0] if start else None)) for number in range(calls)]
    lock, said = threading.Lock(), threading.Lock()

    def work():
        while True:
            with lock:
                if not todo:
                    return
                number, path, body, leaves = todo.pop(0)
            status, how, events = call(path, body, leaves)
            with said:
                print(json.dumps({"call": number, "model": body["model"], "status": status, "how": how, "events": events}), flush=True)

    workers = [threading.Thread(target=work) for _ in range(at_once)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print("DONE", flush=True)


main()
