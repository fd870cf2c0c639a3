"""Servers at the addresses of its arguments. `tcp ADDRESS PORT` accepts connections, `udp ADDRESS PORT` echoes datagrams, and
`proxy ADDRESS PORT` answers 200 to everything. Prints `ready`, and ends when its standard input ends."""

import socket
import sys
import threading


def serve(kind, address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    s = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((address, int(port)))
    if kind == "udp":
        while True:
            data, peer = s.recvfrom(64)
            s.sendto(data, peer)
    s.listen(64)
    while True:
        peer, _ = s.accept()
        if kind == "proxy":
            peer.settimeout(1)
            peer.recv(4096)
            peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        peer.close()


words = sys.argv[1:]
for index in range(0, len(words), 3):
    threading.Thread(target=serve, args=words[index : index + 3], daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
