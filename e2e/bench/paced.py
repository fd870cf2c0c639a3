"""A model that answers chat completions at a pace, cheaply: `PORT=… python3 paced.py KEY CERTIFICATE`.

Guarantees: it sends the events of OpenAI's chat completions, with as many tokens as `max_tokens` says. The first token comes after FIRST,
and each other token PACE later. Each token is the time at which it was sent, by the monotonic clock that all processes of a machine share.
The first token also has the time at which its request arrived. So a client knows the delay of each token without knowing the pace. A reply
that is not streamed comes after FIRST as a whole. `GET` answers that the model is up.
Non-goals: other requests, and any check except that of the key. The model that fails on purpose is e2e/model/server.py, which uses a thread
for each call.
"""

import asyncio
import gc
import json
import os
import random
import ssl
import sys
import time

PACE = 0.020
# Random, so that calls that start together do not stay together.
FIRST = (0.030, 0.070)
BASE = {"id": "chatcmpl-AbCdEfGhIjKlMnOpQrStUvWxYz012", "created": 1764400000, "model": "gpt-4o", "service_tier": "default", "system_fingerprint": "fp_model"}
HEAD = b"HTTP/1.1 200 OK\r\nx-request-id: req_0123456789abcdef\r\nopenai-processing-ms: 12\r\ncontent-type: "
STREAM = HEAD + b"text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
PROMPT_TOKENS = 700


def event(choices, usage=None):
    one = json.dumps(BASE | {"object": "chat.completion.chunk", "choices": choices, "usage": usage}, separators=(",", ":"))
    return f"data: {one}\n\n".encode()


def delta(delta, stop=None):
    return event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": stop}])


def chunk(raw):
    return b"%x\r\n%s\r\n" % (len(raw), raw)


def usage(tokens):
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens}


TOKEN, ROLE, STOP, DONE = delta({"content": " TOKEN"}), delta({"role": "assistant", "content": "", "refusal": None}), delta({}, "stop"), b"data: [DONE]\n\n"
BEFORE, AFTER = TOKEN.split(b"TOKEN")


class Model(asyncio.Protocol):
    """The server's side of one connection."""

    def connection_made(self, transport):
        self.transport, self.buffer, self.loop = transport, b"", asyncio.get_running_loop()

    def data_received(self, data):
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            length = int(headers.get(b"content-length", b"0"))
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            if head.startswith(b"GET "):
                self.whole(b"200 OK", {"object": "list", "data": []})
                continue
            self.asked(headers, json.loads(rest[:length] or b"{}"))

    def asked(self, headers, body):
        now = time.monotonic_ns()
        if headers.get(b"authorization") != self.key:
            return self.whole(b"401 Unauthorized", {"error": {"message": "Incorrect API key provided", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}})
        tokens = body.get("max_tokens") or body["max_completion_tokens"]
        first = random.uniform(*FIRST)
        if not body.get("stream"):
            self.loop.call_later(first, self.answer, now, tokens)
            return
        counted = bool((body.get("stream_options") or {}).get("include_usage"))
        self.transport.write(STREAM)
        self.loop.call_later(first, self.token, f"{now}.".encode(), self.loop.time() + first, tokens, tokens, counted)

    def token(self, asked, due, left, tokens, counted):
        if self.transport.is_closing():
            return
        raw = BEFORE + asked + b"%d" % time.monotonic_ns() + AFTER
        left -= 1
        if left == tokens - 1:
            raw = ROLE + raw
        if left:
            self.transport.write(chunk(raw))
            self.loop.call_at(due + PACE, self.token, b"", due + PACE, left, tokens, counted)
        else:
            account = event([], usage(tokens)) if counted else b""
            self.transport.write(chunk(raw + STOP + account + DONE) + b"0\r\n\r\n")

    def answer(self, asked, tokens):
        stamps = f"{asked}.{time.monotonic_ns()}" + " word" * (tokens - 1)
        message = {"role": "assistant", "content": stamps, "refusal": None, "annotations": []}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        self.whole(b"200 OK", BASE | {"object": "chat.completion", "choices": [choice], "usage": usage(tokens)})

    def whole(self, status, body):
        raw = json.dumps(body).encode()
        self.transport.write(HEAD.replace(b"200 OK", status) + b"application/json\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)


async def main():
    Model.key = f"bearer {sys.argv[1]}".lower().encode()
    gc.disable()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(sys.argv[2])
    server = await asyncio.get_running_loop().create_server(Model, "127.0.0.1", int(os.environ["PORT"]), ssl=tls, backlog=256)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
