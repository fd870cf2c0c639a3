"""Listens at the addresses that an escaping agent tries, so that the control finds a server: `listen.py udp|tcp ADDRESS PORT …`,
for any number of addresses. TCP answers hello in HTTP, UDP echoes. Ends when its standard input ends."""

import socket
import socketserver
import sys
import threading


class Tcp(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class Udp(socketserver.ThreadingUDPServer):
    allow_reuse_address = True
    daemon_threads = True


class Tcp6(Tcp):
    address_family = socket.AF_INET6


class Hello(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.settimeout(0.2)
        try:
            self.request.recv(4096)
        except OSError:
            pass
        self.request.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello\n")


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        data, sock = self.request
        sock.sendto(data, self.client_address)


words = sys.argv[1:]
for kind, host, port in zip(words[::3], words[1::3], words[2::3]):
    server = Udp if kind == "udp" else Tcp6 if ":" in host else Tcp
    handler = Echo if kind == "udp" else Hello
    try:
        threading.Thread(target=server((host, int(port)), handler).serve_forever, daemon=True).start()
    except OSError as error:
        # A real server already listens there, which serves as well.
        print(f"{kind} {host}:{port}: {error}", file=sys.stderr)
print("listening", flush=True)
sys.stdin.read()
