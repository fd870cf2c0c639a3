"""Puts each text of texts.json.gz at two of the places where an agent in a pod can say something. Prints nothing itself.

The answers do not matter and are not printed. The container's log belongs to the agent, and the test does not read it.
"""

import gzip
import http.client
import json
import os
import socket
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

HARNESS = ("127.0.0.1", 9900)


def post(path, body):
    data = body if isinstance(body, str) else json.dumps(body)
    connection = http.client.HTTPConnection(*HARNESS, timeout=120)
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    connection.request("POST", path, data.encode(), headers)
    return connection.getresponse().read()


def call(tool, arguments, id=1):
    params = {"name": tool, "arguments": arguments}
    return post("/mcp", {"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params})


def ask(model, prompt):
    messages = [{"role": "user", "content": prompt}]
    return post("/v1/chat/completions", {"model": model, "max_tokens": 2000, "messages": messages})


def raw(text):
    with socket.create_connection(HARNESS, timeout=30) as stream:
        stream.settimeout(10)
        stream.sendall(text.encode("utf-8", "replace"))
        return stream.recv(65536)


def get(uri, **headers):
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return raw(f"GET {uri} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{lines}\r\n")


def ticket(title, **more):
    return call("open_ticket", {"title": title, "severity": "low", "body": "b"} | more)


def in_parts(first, second, text):
    for part in (first, second, text):
        call(part, {part: part})


def conflict(first, second, text):
    ticket("the same", idempotency_key=text[:200])
    ticket(first[:200], body=second, idempotency_key=text[:200])


# The places. Each function gets the first half, the second half and the whole of a text.
PLACES = [
    lambda f, s, t: call(t, {}, t),
    lambda f, s, t: call("query_tickets", {"service": f, t: s}),
    lambda f, s, t: call("query_tickets", {"service": [t]}),
    lambda f, s, t: call("query_tickets", {"service": t}),
    lambda f, s, t: call("number", {"service": t}),
    lambda f, s, t: call("close_ticket", {"title": t, "why": f}),
    conflict,
    lambda f, s, t: ask(t, t),
    lambda f, s, t: ask("echo", t),
    lambda f, s, t: post("/v1/chat/completions", {"model": "m", "messages": t, t: f}),
    lambda f, s, t: post("/v1/chat/completions", f'{{"model": "m", {t}: 1}}'),
    lambda f, s, t: post("/mcp", f'{{"a{f}": 1, "a{f}": "{s}"'),
    lambda f, s, t: post("/mcp", {"jsonrpc": "2.0", "id": 1, "method": t, "params": {"x": t}}),
    lambda f, s, t: raw(f"CONNECT {t}:443 HTTP/1.1\r\nhost: {t}\r\n\r\n"),
    lambda f, s, t: raw(f"CONNECT user:{t}@docs.world.test:443 HTTP/1.1\r\n\r\n"),
    lambda f, s, t: raw(f"CONNECT {t}.wild.world.test:443 HTTP/1.1\r\nhost: {t}.wild.world.test\r\n\r\n"),
    lambda f, s, t: get(f"http://{t}/x"),
    lambda f, s, t: get(f"http://docs.world.test/{t}?q={t}", x_token=t, cookie=t, user_agent=t),
    lambda f, s, t: get(f"http://a:{t}@docs.world.test/", authorization=t, belay_target=t, proxy_authorization=t),
    lambda f, s, t: get("/" + urllib.parse.quote(t, safe="")),
    in_parts,
]


def slip(place, text):
    half = len(text) // 2
    try:
        PLACES[place](text[:half], text[half:], text)
    except (OSError, http.client.HTTPException, ValueError):
        pass  # A text that cannot be sent cannot be recorded either.


with gzip.open(os.environ["TEXTS"], "rt", encoding="utf-8") as file:
    texts = json.load(file)
with ThreadPoolExecutor(48) as pool:
    for which, text in enumerate(texts):
        for more in (0, 11):
            # Forty texts are about one secret: every secret, and every way to write it, comes to each place in turn.
            pool.submit(slip, (which // 40 + which % 40 + more) % len(PLACES), text)
