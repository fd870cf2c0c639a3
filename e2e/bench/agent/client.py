"""Calls a model and prints the delay of each token: `client.py TOKENS KIND:AT_ONCE:CALLS …`, with KIND `stream` or `whole`.

The same program calls directly, through a proxy, and from Belay's sandbox: only OPENAI_BASE_URL differs. It prints one line for each call:
its kind and the number of calls at a time, then in microseconds the time of its first token (or whole reply) without the model's own time,
and the delay of each later token.
Nothing is parsed during the measurement. Each connection is reused, and its first call is not counted.
"""

import asyncio
import gc
import json
import os
import re
import ssl
import sys
import time
import urllib.parse

BASE = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
# A prompt as long as an agent's: some hundred tokens, which a proxy that counts tokens must count.
SYSTEM = "You read tickets of a shop's customers and say in one short paragraph what each wants, what was tried, and who should go on with it. "
TICKET = "Ticket {}: the tent that I ordered on the 3rd came without its poles, and the shop's page says that parts cannot be ordered alone. "
TOKEN = re.compile(rb'"content": ?" ?(?:(\d{9,})\.)?(\d{9,})')
WHOLE = re.compile(rb'"content": ?"(\d+)\.(\d+) word')


def request(kind, tokens, number):
    tickets = "".join(TICKET.format(number * 20 + index) for index in range(20))
    messages = [{"role": "system", "content": SYSTEM * 4}, {"role": "user", "content": tickets}]
    body = {"model": "gpt-4o", "messages": messages, "max_tokens": tokens, "temperature": 0.2}
    if kind == "stream":
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    raw = json.dumps(body).encode()
    head = f"POST {BASE.path}/chat/completions HTTP/1.1\r\nhost: {BASE.netloc}\r\nauthorization: Bearer {os.environ['OPENAI_API_KEY']}\r\n"
    return head.encode() + b"content-type: application/json\r\naccept: */*\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw


class Connection(asyncio.Protocol):
    """The client's side of one connection, with one call at a time."""

    def connection_made(self, transport):
        self.transport, self.pieces, self.length, self.done = transport, [], None, None

    def data_received(self, data):
        now = time.monotonic_ns()
        self.pieces.append((now, data))
        if self.is_over():
            self.done.set_result(None)

    def is_over(self):
        end = b"".join(data for _, data in self.pieces[-3:])
        if self.length is None:
            raw = b"".join(data for _, data in self.pieces)
            head, found, _ = raw.partition(b"\r\n\r\n")
            if not found:
                return False
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            self.length = len(head) + 4 + int(length[1]) if length else 0
        if self.length:
            return sum(len(data) for _, data in self.pieces) >= self.length
        return end.endswith(b"0\r\n\r\n")

    def connection_lost(self, _):
        if self.done and not self.done.done():
            self.done.set_result(None)

    async def call(self, raw):
        self.pieces, self.length, self.done = [], None, asyncio.get_running_loop().create_future()
        began = time.monotonic_ns()
        self.transport.write(raw)
        await self.done
        return began, self.pieces


def body_of(pieces):
    """Returns the head, the body without its framing, and when each part of the body came: [(end, time), …]."""
    raw, ends = b"", []
    for now, data in pieces:
        raw += data
        ends.append((len(raw), now))
    head, _, _ = raw.partition(b"\r\n\r\n")
    if b"chunked" not in head.lower():
        return head, raw, ends
    plain, places, at, cursor = b"", [], len(head) + 4, 0
    while True:
        line = raw.index(b"\r\n", at)
        size = int(raw[at:line], 16)
        if not size:
            return head, plain, places
        at = line + 2
        # A chunk can come in several pieces.
        while ends[cursor][0] < at + size:
            if ends[cursor][0] > at:
                places.append((len(plain) + ends[cursor][0] - at, ends[cursor][1]))
            cursor += 1
        plain += raw[at : at + size]
        places.append((len(plain), ends[cursor][1]))
        at += size + 2


def delays(kind, tokens, began, pieces):
    """Returns the delay of each token in microseconds."""
    head, body, places = body_of(pieces)
    found = list((TOKEN if kind == "stream" else WHOLE).finditer(body))
    if b" 200 " not in head.split(b"\r\n")[0] or len(found) != (tokens if kind == "stream" else 1):
        sys.exit(f"error: expected {tokens} tokens, found {len(found)}: {(head + body)[:2000]!r}")
    late, cursor = [], 0
    for token in found:
        # A token has arrived when its whole event has.
        end = body.find(b"\n\n", token.end()) + 2 if kind == "stream" else len(body)
        while places[cursor][0] < end:
            cursor += 1
        late.append(places[cursor][1] - int(token[2]))
    late[0] += int(found[0][1]) - began
    return [round(one / 1000) for one in late]


async def phase(kind, at_once, calls, tokens):
    """Makes `calls` calls, `at_once` at a time."""
    loop, done = asyncio.get_running_loop(), []
    tls = ssl.create_default_context() if BASE.scheme == "https" else None

    async def worker(number):
        _, connection = await loop.create_connection(Connection, BASE.hostname, BASE.port, ssl=tls)
        # The workers do not start at the same moment.
        await asyncio.sleep(0.5 * number / at_once)
        await connection.call(request(kind, tokens, number))
        for turn in range(1, calls // at_once + 1):
            done.append(await connection.call(request(kind, tokens, number + turn * at_once)))
        connection.transport.close()

    await asyncio.gather(*map(worker, range(at_once)))
    return done


async def main():
    gc.disable()
    tokens, said = int(sys.argv[1]), []
    for asked in sys.argv[2:]:
        kind, at_once, calls = asked.split(":")
        done = await phase(kind, int(at_once), int(calls), tokens)
        said += [json.dumps([[kind, int(at_once)], *delays(kind, tokens, *call)]) for call in done]
    print("\n".join(said), flush=True)


asyncio.run(main())
