"""A model provider that fails on purpose and records each request: `PORT=… python3 server.py [--account FILE] [--key KEY]`.

Guarantees: The server has chat completions, Responses and Messages, whole and streamed, in the exact shapes and event sequences of their
providers, with the limits of gpt-4o and its peers. The same request always has the same answer (script.py). The server fails only as the
model's name or the header `openai-fault` says. For each request, it writes one line of JSON to the account: the request, what the server
produced and sent, and what a provider would bill. `GET /account` returns the same lines.
Non-goals: To be fast; to be a language model; to keep conversations, other than stored items and threads (apis.py); to fetch what a message
refers to (the account lists it).

A fault follows the name of any model: `gpt-4o-fault-503`. With `x2` after a fault, only the first two requests with that name fail. `+`
joins several faults: `gpt-4o-fault-pace-20+cut-900`.
  429 500 503 529 …   replies with that status and an error in the API's shape (429 and 503 with Retry-After: 1)
  html-502            replies with that status and an HTML page, as proxies do
  drop                closes the connection before any reply
  cut-N               closes the connection after N bytes of the body
  error-N             ends the stream with an error after N tokens
  none, low, zero     the usage is missing, leaves out reasoning, or is all zeros
  slow-MS             waits MS ms before the head; `pace-MS`: between events; `end-MS`: between the last event and the end of the body
  gzip                compresses the body, whatever the client accepts
"""

import argparse
import base64
import gzip
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import rules
from apis import APIS, fresh
from rules import Refused

PATHS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "count_tokens",
    "/v1/embeddings": "embeddings",
    "/v1/moderations": "moderations",
}
# The largest request that each provider accepts, in bytes.
LONGEST = {"messages": 32 << 20}
LONGEST_OF_OTHERS = 64 << 20


class Account:
    """The record of what the server really produced, one line a request."""

    def __init__(self, path):
        self.lock, self.lines, self.file = threading.Lock(), [], open(path, "a") if path else None
        self.failed = {}
        self.begun = 0

    def begin(self):
        """Counts a request whose line follows. The line comes after the reply, so whoever has the reply may have to wait for it."""
        with self.lock:
            self.begun += 1

    def add(self, line):
        with self.lock:
            self.lines.append(line)
            if self.file:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()

    def times(self, name):
        """Counts a request with this name, and returns the count."""
        with self.lock:
            self.failed[name] = self.failed.get(name, 0) + 1
            return self.failed[name]


class Cut(Exception):
    """Ends the connection on purpose."""


def faults_of(name):
    """Parses faults: `503x2+cut-9` is {"503": None, "cut": 9} and {"503": 2}."""
    found, first = {}, {}
    for one in filter(None, name.split("+")):
        kind, _, times = one.partition("x")
        parts = kind.split("-")
        found[parts[0]] = int(parts[1]) if len(parts) > 1 else None
        if times:
            first[parts[0]] = int(times)
    return found, first


class Provider(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # The head and the body are written together.
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    # ------------------------------------------------------------------------------------------------------- requests

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if path == "/account":
            with self.server.account.lock:
                return self.send(200, self.server.account.lines)
        anthropic = "anthropic-version" in self.headers
        names = list(rules.ANTHROPIC if anthropic else rules.OPENAI | rules.EMBEDDINGS)

        def model(name):
            if anthropic:
                return {"type": "model", "id": name, "display_name": name, "created_at": "2025-10-01T00:00:00Z"}
            return {"id": name, "object": "model", "created": 1764400000, "owned_by": "system"}

        self.note = {"api": "models", "path": self.path, "status": 200}
        if path == "/v1/models":
            more = {"has_more": False, "first_id": names[0], "last_id": names[-1]} if anthropic else {"object": "list"}
            reply = {"data": [model(name) for name in names]} | more
        elif path.removeprefix("/v1/models/") in names:
            reply = model(path.removeprefix("/v1/models/"))
        else:
            # With status 426, Codex continues without a WebSocket.
            self.note["status"] = 426 if "upgrade" in self.headers else 404
            reply = rules.error("messages" if anthropic else "chat", self.note["status"], f"Unknown request URL: GET {path}", code="unknown_url")
        self.server.account.begin()
        self.server.account.add(self.note)
        self.send(self.note["status"], reply)

    def do_POST(self):
        path = urllib.parse.urlsplit(self.path).path
        length = int(self.headers.get("content-length", 0))
        raw = self.rfile.read(length)
        if "chunked" in self.headers.get("transfer-encoding", ""):
            raw = self.chunks()
        api = PATHS.get(path)
        self.note = {
            "api": api or "unknown",
            "path": self.path,
            "status": 200,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "request": None,
            "prompt": 0,
            "produced": 0,
            "billed": 0,
            "sent": 0,
            "end": "whole",
            "began": time.monotonic(),
        }
        self.server.account.begin()
        try:
            self.answer(api, path, raw)
        except Refused as refused:
            self.note.update(status=refused.status, end="refused", why=refused.message)
            error = rules.error(api, refused.status, refused.message, refused.param, refused.code, refused.kind, refused.details)
            self.send(refused.status, error, {"x-should-retry": "false"} if refused.status == 400 else {})
        except Answered:
            pass
        except Cut:
            self.note["end"] = "cut"
            self.hang_up()
        except OSError:
            # The client has closed the connection.
            self.note["end"] = "left"
            self.close_connection = True
        except Exception:
            # A bug in this server, and not a fault that a test requested.
            traceback.print_exc()
            self.note.update(status=500, end="mistake")
            self.send(500, rules.error(api, 500, "the model itself has failed", kind="server_error"))
        finally:
            self.note["ended"] = time.monotonic()
            self.server.account.add(self.note)

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, api, path, raw):
        if api is None:
            raise Refused(404, f"Invalid URL (POST {path})")
        if len(raw) > LONGEST.get(api, LONGEST_OF_OTHERS):
            raise Refused(413, "Request exceeds the maximum size")
        self.allowed(api)
        body = rules.loads(raw)
        self.note["request"] = body
        faults = self.faults(body)
        if "slow" in faults:
            time.sleep(faults["slow"] / 1000)
        self.fail(api, faults)
        context, most, reasons = rules.model_of(api, body) if api != "moderations" else (0, 0, False)
        if api in ("embeddings", "moderations", "count_tokens"):
            return self.send(200, self.small(api, body, context))
        known = APIS[api].members
        if api == "messages" and self.beta():
            known = rules.MESSAGES_BETA
        rules.members(api, body, known)
        limit = rules.output_limit(api, body, most, reasons, body["model"])
        reply, fetched = APIS[api].read(body, self.headers, limit, reasons)
        if reply.prompt + (limit if api != "responses" and rules_set(body) else 0) > context:
            self.too_long(api, reply.prompt, limit, context)
        reply.lie = next((kind for kind in ("none", "low", "zero") if kind in faults), "")
        self.note.update(prompt=reply.prompt, reasoning=reply.reasoning, would=reply.output, fetched=fetched)
        self.note["calls"] = [item.tool.name for item in reply.items if hasattr(item, "tool")]
        self.note["stream"] = bool(body.get("stream"))
        # The prompt says how long the reply takes, up to 5 s.
        takes = re.search(rb"take (\d+) ms", raw)
        time.sleep(min(int(takes.group(1)) if takes else 0, 5000) / 1000)
        if body.get("stream"):
            self.stream(APIS[api], reply, faults)
        else:
            # The whole reply was produced before its first byte was sent.
            self.note.update(produced=reply.output, billed=reply.prompt + reply.output)
            self.send(200, APIS[api].whole(reply), {}, faults)

    def beta(self):
        return "anthropic-beta" in self.headers or "beta=true" in self.path

    def allowed(self, api):
        """Checks the key and the version header, as each provider does."""
        anthropic = api in ("messages", "count_tokens")
        key = self.headers.get("x-api-key") or (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if self.server.key and key != self.server.key:
            raise Refused(401, "invalid x-api-key" if anthropic else f"Incorrect API key provided: {key[:3]}***.", code="invalid_api_key")
        if anthropic and "anthropic-version" not in self.headers:
            raise Refused(400, "anthropic-version: header is required")

    def faults(self, body):
        name = str(body.get("model"))
        found, first = faults_of(name.partition("-fault-")[2])
        for kind, times in first.items():
            if self.server.account.times(f"{name} {kind}") > times:
                del found[kind]
        of_header, _ = faults_of(self.headers.get("openai-fault", ""))
        self.note["faults"] = sorted(found | of_header)
        return found | of_header

    def fail(self, api, faults):
        """Makes the faults that replace a reply."""
        if "drop" in faults:
            raise Cut
        if "html" in faults:
            self.note.update(status=faults["html"], end="refused")
            page = f"<html><body><h1>{faults['html']} Bad Gateway</h1></body></html>".encode()
            return self.raise_after(faults["html"], page, {"content-type": "text/html"})
        status = next((int(kind) for kind in faults if kind.isdigit()), None)
        if status is None:
            return None
        self.note.update(status=status, end="refused")
        words = {
            429: ("Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Used 29900. Please try again in 1s.", "rate_limit_exceeded", "tokens"),
            503: ("The server is currently overloaded with other requests. Sorry about that! You can retry your request.", None, "server_error"),
            529: ("Overloaded", None, "overloaded_error"),
        }
        message, code, kind = words.get(status, ("The server had an error while processing your request. Sorry about that!", None, "server_error"))
        headers = {"retry-after": "1"} if status in (429, 503) else {}
        return self.raise_after(status, rules.error(api, status, message, code=code, kind=kind), headers)

    def raise_after(self, status, body, headers):
        self.send(status, body, headers)
        raise Answered

    def too_long(self, api, prompt, limit, context):
        if api == "messages":
            raise Refused(400, f"prompt is too long: {prompt + limit} tokens > {context} maximum")
        message = (
            f"This model's maximum context length is {context} tokens. However, you requested {prompt + limit} tokens ({prompt} in the "
            f"messages, {limit} in the completion). Please reduce the length of the messages or completion."
        )
        raise Refused(400, message, "messages", "context_length_exceeded")

    def small(self, api, body, context):
        """Returns the reply of an endpoint that has no conversation."""
        if api == "count_tokens":
            rules.members(api, body, rules.COUNT_BETA if self.beta() else rules.COUNT)
            prompt, _ = rules.prompt_tokens([body.get("system"), body.get("messages"), body.get("tools")])
            return {"input_tokens": prompt}
        if "input" not in body:
            raise Refused(400, "Missing required parameter: 'input'.", "input", "missing_required_parameter")
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        if api == "moderations":
            rules.members(api, body, rules.MODERATE)
            categories = ("harassment", "hate", "illicit", "self-harm", "sexual", "violence")
            result = {"flagged": False, "categories": dict.fromkeys(categories, False), "category_scores": dict.fromkeys(categories, 0.0)}
            return {"id": fresh("modr-"), "model": "omni-moderation-latest", "results": [result for _ in inputs]}
        rules.members(api, body, rules.EMBED)
        prompt, _ = rules.prompt_tokens(inputs)
        if prompt > context * len(inputs):
            raise Refused(400, f"This model's maximum context length is {context} tokens.", "input", "context_length_exceeded")
        self.note.update(prompt=prompt, billed=prompt)
        vector = [0.25] * min(body.get("dimensions") or 8, 64)
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        rows = [{"object": "embedding", "index": index, "embedding": vector} for index, _ in enumerate(inputs)]
        return {"object": "list", "data": rows, "model": body["model"], "usage": {"prompt_tokens": prompt, "total_tokens": prompt}}

    # ---------------------------------------------------------------------------------------------------------- replies

    def head(self, status, headers):
        self.send_response(status)
        for name, value in {"x-request-id": fresh("req_"), "openai-processing-ms": "12"}.items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status, body, headers=None, faults=()):
        """Sends a reply in one piece."""
        raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        headers = {"content-type": "application/json"} | (headers or {})
        if "gzip" in faults:
            raw = gzip.compress(raw)
            headers["content-encoding"] = "gzip"
        self.head(status, headers | {"content-length": str(len(raw))})
        cut = faults["cut"] if "cut" in faults else None
        self.wfile.write(raw if cut is None else raw[:cut])
        self.wfile.flush()
        if hasattr(self, "note"):
            self.note["sent"] = len(raw if cut is None else raw[:cut])
        if cut is not None and cut < len(raw):
            raise Cut

    def stream(self, api, reply, faults):
        """Sends a reply event by event, in chunks. The prompt is billed as soon as the head is sent."""
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "transfer-encoding": "chunked"}
        pack = gzip_stream() if "gzip" in faults else None
        self.head(200, headers | ({"content-encoding": "gzip"} if pack else {}))
        self.wfile.flush()
        self.note["billed"] = reply.prompt
        pace, left = faults.get("pace", 0) / 1000, faults.get("cut")
        for index, (event, tokens) in enumerate(api.events(reply)):
            if pace and index:
                time.sleep(pace)
                self.gone()
            self.note["produced"] += tokens
            self.note["billed"] += tokens
            raw = pack(event) if pack else event
            short = left is not None and len(raw) > left
            self.chunk(raw[:left] if short else raw)
            if short:
                raise Cut
            left = left - len(raw) if left is not None else None
            if "error" in faults and self.note["produced"] >= faults["error"]:
                self.note["end"] = "error"
                self.chunk(api.broken())
                break
        time.sleep(faults.get("end", 0) / 1000)
        if pack:
            self.chunk(pack(None))
        try:
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()
        except OSError:
            # Many clients hang up at the last event. They have the whole reply.
            self.close_connection = True

    def chunk(self, raw):
        if raw:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
            self.wfile.flush()
            self.note["sent"] += len(raw)

    def gone(self):
        """Raises an error if the client has closed the connection. A write would not notice that at once, because it goes to the
        socket's buffer."""
        self.connection.setblocking(False)
        try:
            if self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise ConnectionResetError
        except BlockingIOError:
            pass
        finally:
            self.connection.setblocking(True)

    def hang_up(self):
        """Sends what was written so far, and ends the connection."""
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


class Answered(Cut):
    """The fault was the reply. The connection stays open."""


def rules_set(body):
    """Returns whether the request sets an output limit. Only such a limit counts against the context."""
    return any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"))


def gzip_stream():
    packer = zlib.compressobj(wbits=31)
    return lambda raw: packer.flush() if raw is None else packer.compress(raw) + packer.flush(zlib.Z_SYNC_FLUSH)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, address)


def serve(port, account=None, key=None):
    server = Server(("127.0.0.1", port), Provider)
    server.account, server.key = Account(account), key
    return server


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--account", help="file for the account, one line of JSON a request")
    parser.add_argument("--key", help="the only key that is taken")
    given = parser.parse_args()
    serve(int(os.environ["PORT"]), given.account, given.key).serve_forever()
