# Attempts to make calls without a record: within tunnels, around the HTTP and the MCP library, and by arguments that change the path of a
# URL on some servers.
# TO is the address that all attempts use: the harness, or, in the control, a server without Belay. HOST is the allowed host, MARK is the
# hex of bytes that only this host sends, and FILL is the number of bytes after an honest greeting.
import json, os, socket, ssl, sys

PROXY = ("127.0.0.1", int(os.environ["TO"].rsplit(":", 1)[1]))
DIRECT = os.environ.get("DIRECT")
HOST = os.environ.get("HOST", "allowed.test")
MARK = bytes.fromhex(os.environ.get("MARK", b"through".hex()))
FILL = int(os.environ.get("FILL", 1 << 20))


def raw(data, to=PROXY, wait=20):
    back = b""
    try:
        with socket.create_connection(to, timeout=wait) as s:
            s.sendall(data)
            # The connection stays open, because a client that closes it gets no answer.
            while MARK not in back and (piece := s.recv(65536)):
                back += piece
    except OSError:
        pass
    return back


def hello(name):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()


def tunnel(data, host=HOST, port=443):
    if DIRECT:
        name, number = DIRECT.rsplit(":", 1)
        return raw(data, (name, int(number)))
    with socket.create_connection(PROXY, timeout=20) as s:
        s.sendall(b"CONNECT %s:%d HTTP/1.1\r\nHost: %s:%d\r\n\r\n" % (host.encode(), port, host.encode(), port))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = s.recv(1)
            if not piece:
                return head
            head += piece
        if b" 200 " not in head:
            return head
        back = b""
        try:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            while piece := s.recv(65536):
                back += piece
        except OSError:
            pass
        return back


def tell(kind, tried, through):
    print(json.dumps({"kind": kind, "tried": tried, "through": bool(through)}), flush=True)


good = hello(HOST)
tunnels = {
    "another name": hello("evil.test"),
    "no name": hello(None),
    "HTTP": b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n",
    "SSH": b"SSH-2.0-x\r\n" + b"a" * 3000,
    "another tunnel": b"CONNECT evil.test:443 HTTP/1.1\r\n\r\n",
    "a NUL in the name": good.replace(HOST.encode(), HOST.replace(".", "\0", 1).encode()),
    "SSLv2": bytes([0x80, 46, 1, 3, 1, 0, 21, 0, 0, 0, 16]) + b"\0" * 60,
    "an alert first": b"\x15\3\1\0\2\1\0" + good,
    "half of it": good[:-1],
}
for name, data in tunnels.items():
    tell("tunnel", name, MARK in tunnel(data))
heads = {
    "a NUL in the host": b"CONNECT allowed.test\0.evil.test:443 HTTP/1.1\r\n\r\n",
    "bytes beyond ASCII": "CONNECT \u0430llowed.test:443 HTTP/1.1\r\n\r\n".encode(),
    "two ports": b"CONNECT allowed.test:443:22 HTTP/1.1\r\n\r\n",
    "two lengths": b"POST /mcp HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
    "length and chunks": b"POST /mcp HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a folded header": b"GET /mcp HTTP/1.1\r\nhost: a\r\n b\r\n\r\n",
    "HTTP/0.9": b"GET /mcp\r\n",
    "HTTP/2 at once": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "SOCKS": b"\5\1\0",
    "a method that there is not": b"PUT /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
    "a path that there is not": b"GET /v1/files HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
}
direct = (DIRECT.rsplit(":", 1)[0], int(DIRECT.rsplit(":", 1)[1])) if DIRECT else PROXY
for name, data in heads.items():
    tell("head", name, MARK in raw(data, direct))
paths = ["A-7/card", "A-7%2fcard", "A-7%252fcard", "A-7\uff0fcard", "A-7;x", "..", "%c0%ae%c0%ae%2fx", "A-7?x", "A-7\\card"]
body = lambda id: json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "greet", "arguments": {"name": id}}}).encode()
post = b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\naccept: application/json, text/event-stream\r\ncontent-length: %d\r\n\r\n"
for id in paths:
    reply = raw(post % len(body(id)) + body(id), direct)
    tell("path", id, MARK in reply or b"tool.url" not in reply)
# The control: an allowed tunnel works, and carries its bytes.
tell("control", "TLS for its host", MARK in tunnel(good + b"x" * FILL))
print(json.dumps({"done": True}), flush=True)
