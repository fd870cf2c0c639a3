"""A model behind TLS that repeats the request, or the credential of the request, as validators, proxies and debuggers do:
`repeating.py CERTIFICATE KEY`, on 127.0.0.1:$PORT."""

import json
import os
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Repeating(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = asked["messages"][0]["content"].replace("KEY", self.headers.get("authorization", "none"))
        if asked["model"] == "validator":
            return self.answer(422, "application/json", [json.dumps({"detail": [{"msg": "invalid", "input": text}]})])
        if asked["model"] == "letters":
            event = 'data: {"choices":[{"delta":{"content":%s}}]}\n\n'
            return self.answer(200, "text/event-stream", [event % json.dumps(letter) for letter in text])
        self.answer(200, "text/event-stream", [text, "\n\ndata: [DONE]\n\n"])

    def answer(self, status, kind, parts):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in [part.encode() for part in parts]:
            self.wfile.write(b"%x\r\n" % len(part) + part + b"\r\n")
            self.wfile.flush()
            time.sleep(0.01)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Repeating)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*sys.argv[1:])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
