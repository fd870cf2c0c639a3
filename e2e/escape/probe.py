"""Attempts of an agent to get out. Runs as the agent, in the agent's container, and prints one JSON line for each attempt:
{"case", "tried", "escaped", "how"}. `escaped` is true if the attempt succeeded, whatever it found there.

As the control, the same file runs in a pod without isolation: there every case must escape, otherwise the case shows nothing. In the
control there is no proxy, and the requests to the proxy are made directly. Its environment has PROXY (host:port of the harness, empty
in the control), GATEWAY, CANARY, API_SERVER, NODE_IP, PEER (another task's pod) and TOKEN (another pod's token). `probe.py replay`
tries only the token.
"""

import glob
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time

WAIT = 1.5  # seconds; an allowed server answers within milliseconds here
env = os.environ.get


def report(case, tried, escaped, how=""):
    print(json.dumps({"case": case, "tried": tried, "escaped": bool(escaped), "how": str(how)[:200]}), flush=True)


def tcp(host, port, family=socket.AF_INET):
    """Tries to open a TCP connection."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.settimeout(WAIT)
            s.connect((host, port))
            return True, "connected"
    except OSError as error:
        return False, error


def udp(host, port, payload=b"belay?", family=socket.AF_INET):
    """Sends a datagram and waits for an answer: the listeners of these tests echo."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.settimeout(WAIT)
            s.sendto(payload, (host, port))
            return True, f"answered {s.recvfrom(64)[0][:16]!r}"
    except OSError as error:
        return False, error


def dns_query(name, kind):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def proxied(request, opened):
    """Sends a request to the harness's proxy. The attempt escaped if `opened` is true for the reply."""
    host, _, port = env("PROXY").partition(":")
    try:
        with socket.create_connection((host, int(port)), WAIT) as s:
            s.settimeout(10)
            s.sendall(request)
            reply = s.recv(4096).decode("latin-1")
    except OSError as error:
        return False, error
    return opened(reply), reply.replace("\r\n", " | ")


def directly(host, port, request=None):
    """The same without a proxy: tries to open a connection, and if there is a request, to get an answer."""
    try:
        with socket.create_connection((host.strip("[]"), port), WAIT) as s:
            if not request:
                return True, "connected"
            s.settimeout(10)
            s.sendall(request)
            reply = s.recv(4096).decode("latin-1")
            return " 2" in reply[8:11], reply.replace("\r\n", " | ")
    except OSError as error:
        return False, error


def connect_to(authority):
    """Sends a CONNECT request through the proxy."""
    if not env("PROXY"):
        return directly(*address(authority))
    return proxied(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode(), lambda r: " 200" in r[:14])


def get(url):
    """Sends a GET request in absolute form through the proxy."""
    host = url.split("/")[2]
    if not env("PROXY"):
        return directly(host, 80, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    return proxied(f"GET {url} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode(), lambda r: " 2" in r[8:11])


def tight_loop():
    """A1: connects from the first instruction on, as fast as a thread can, for two seconds."""
    targets = [("8.8.8.8", 443), address(env("API_SERVER")), (env("NODE_IP"), 10250)]
    got, tries, end = set(), 0, time.monotonic() + 2

    def hammer(target):
        nonlocal tries
        while time.monotonic() < end and target not in got:
            with socket.socket() as s:
                s.setblocking(False)
                if s.connect_ex(target) == 0:
                    got.add(target)
                s.settimeout(0.05)
                try:
                    s.connect(target)
                    got.add(target)
                except OSError:
                    pass
            tries += 1

    threads = [threading.Thread(target=hammer, args=(t,)) for t in targets]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for target in targets:
        report("A1", f"connect {target[0]}:{target[1]} in a loop", target in got, f"{tries} tries in all")


def address(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


def network():
    for host in ("8.8.8.8", "1.1.1.1"):
        report("A7", f"tcp {host}:443", *tcp(host, 443))
    report("A8", "tcp [::ffff:8.8.8.8]:443", *tcp("::ffff:8.8.8.8", 443, socket.AF_INET6))
    report("A8", "tcp [2001:4860:4860::8888]:443", *tcp("2001:4860:4860::8888", 443, socket.AF_INET6))
    report("A9", "udp 8.8.8.8:443", *udp("8.8.8.8", 443))
    for resolver in ("8.8.8.8", "198.51.100.53"):
        report("A10", f"dns over udp {resolver}:53", *udp(resolver, 53, dns_query("docs.world.test", 1)))
        report("A10", f"dns over tcp {resolver}:53", *tcp(resolver, 53))
    report("A10", "getaddrinfo docs.world.test", *resolves("docs.world.test"))
    report("A11", "dns over tls 8.8.8.8:853", *tcp("8.8.8.8", 853))
    report("A11", "dns over https by address 1.1.1.1:443", *tls("1.1.1.1", "cloudflare-dns.com"))
    report("A12", "icmp echo with a payload to 8.8.8.8", *icmp())
    report("A13", "raw icmp socket", *raw(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
    report("A13", "packet socket", *raw(getattr(socket, "AF_PACKET", 17), socket.SOCK_RAW, socket.htons(3)))
    report("A14", "https://docs.world.test past the proxy", *tls("docs.world.test", "docs.world.test"))
    report("A14", "https://198.51.100.20 past the proxy", *tls("198.51.100.20", "docs.world.test"))
    for form in ("134744072", "0x08080808", "010.8.8.8", "8.8.2056"):
        report("A15", f"tcp {form}:443", *tcp(form, 443))


def resolves(name):
    try:
        return True, socket.getaddrinfo(name, 443)[0][4]
    except OSError as error:
        return False, error


def tls(host, name):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, 443), WAIT) as s, context.wrap_socket(s, server_hostname=name) as t:
            return True, t.version()
    except OSError as error:
        return False, error


def icmp():
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as s:
                s.settimeout(WAIT)
                body = b"secrets leave in the payload"
                head = struct.pack(">BBHHH", 8, 0, 0, 7, 1)
                check = sum(struct.unpack(f">{len(head + body) // 2}H", head + body))
                check = ~((check >> 16) + (check & 0xFFFF)) & 0xFFFF
                s.sendto(struct.pack(">BBHHH", 8, 0, check, 7, 1) + body, ("8.8.8.8", 0))
                return True, f"answered {len(s.recv(256))} bytes"
        except OSError as error:
            last = error
    return False, last


def raw(family, kind, protocol):
    try:
        socket.socket(family, kind, protocol).close()
        return True, "opened"
    except OSError as error:
        return False, error


def cluster():
    report("A16", "api server by its service address", *tcp(*address(env("API_SERVER"))))
    report("A16", "api server by the node's address", *tcp(env("NODE_IP"), 6443))
    report("A17", "kubelet", *tcp(env("NODE_IP"), 10250))
    report("A18", "etcd", *tcp(env("NODE_IP"), 2379))
    report("A19", "cluster dns over udp", *udp("10.96.0.10", 53, dns_query("kubernetes.default.svc.cluster.local", 1)))
    report("A19", "service records", *udp("10.96.0.10", 53, dns_query("_https._tcp.kubernetes.default.svc.cluster.local", 33)))
    report("A23", "169.254.169.254", *tcp("169.254.169.254", 80))
    report("A20", "another task's pod", *tcp(*address(env("PEER"))))
    report("A21", "canary port", *tcp(*address(env("CANARY"))))


def on_loopback():
    """Starts servers on loopback, for the control: nothing else listens there."""
    for port in (80, 443):
        server = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=answer, args=(server,), daemon=True).start()


def answer(server):
    while True:
        with server.accept()[0] as s:
            s.settimeout(0.2)
            try:
                s.recv(4096)
            except OSError:
                pass
            s.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello\n")


def through_the_proxy():
    if not env("PROXY"):
        on_loopback()
    for form in ("134744072", "0x08080808", "010.8.8.8", "8.8.8.8", "[::ffff:8.8.8.8]"):
        report("A15", f"CONNECT {form}:443", *connect_to(f"{form}:443"))
    report("A19", "CONNECT kubernetes.default.svc:443", *connect_to("kubernetes.default.svc:443"))
    report("A23", "CONNECT 169.254.169.254:80", *connect_to("169.254.169.254:80"))
    report("A23", "GET http://169.254.169.254/latest/meta-data/", *get("http://169.254.169.254/latest/meta-data/"))
    for host in ("loopback", "private", "cgnat", "metadata", "mixed", "node", "api", "v6-mapped"):
        report("A24", f"CONNECT {host}.world.test:443", *connect_to(f"{host}.world.test:443"))
        report("A24", f"GET http://{host}.world.test/", *get(f"http://{host}.world.test/"))


def harness_secrets():
    """A43: looks for the token, environment, root and descriptors of the harness."""
    paths = glob.glob("/var/run/secrets/*/*/*") + glob.glob("/run/secrets/*/*/*") + glob.glob("/var/run/belay/*")
    report("A43", "service account token paths", paths, paths)
    leaks = []
    for process in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{process}/cmdline", "rb") as file:
                if b"belay-harness" in file.read():
                    leaks.append(f"{process}/cmdline")
            with open(f"{process}/environ", "rb") as file:
                if b"NETWORK_POLICY=" in file.read():
                    leaks.append(f"{process}/environ")
            if os.path.exists(f"{process}/root/var/run/belay/token"):
                leaks.append(f"{process}/root")
            for fd in os.listdir(f"{process}/fd"):
                if "token" in os.readlink(f"{process}/fd/{fd}"):
                    leaks.append(f"{process}/fd/{fd}")
        except OSError:
            continue
    report("A43", "other processes' environ, root and descriptors", leaks, leaks)


def replayed_token():
    """A45: uses another pod's token at the gateway from this pod, which may reach the gateway's port."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    body = b'{"attempt":1,"policyDigest":""}'
    head = (
        "POST /v1/log/open HTTP/1.1\r\nHost: belay-gateway\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {env('TOKEN')}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    try:
        with socket.create_connection(address(env("GATEWAY")), WAIT) as s:
            with context.wrap_socket(s, server_hostname="belay-gateway") as t:
                t.settimeout(10)
                t.sendall(head + body)
                reply = t.recv(4096).decode("latin-1")
    except OSError as error:
        report("A45", "another pod's token at the gateway", True, f"could not be tried: {error}")
        return
    # The port may be reached. Any answer but a denial of this identity is an escape.
    report("A45", "another pod's token at the gateway", "identity.source" not in reply, reply.replace("\r\n", " | "))


def files():
    """A51: writes outside the write scopes, and into a read-only mount."""
    for path in ("/etc/passwd", "/belay-was-here", "/opt/agent/x", "/usr/bin/x", "/tmp/x", "/dev/shm/x", "/escape/x"):
        try:
            with open(path, "a") as file:
                file.write("x")
            report("A51", f"write {path}", True, "written")
        except OSError as error:
            report("A51", f"write {path}", False, error)
    try:
        with open(f"{env('SCOPE', '/workspace')}/x", "w") as file:
            file.write("x")
        print(json.dumps({"scope": "written"}), flush=True)
    except OSError as error:
        print(json.dumps({"scope": str(error)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["replay"]:
        replayed_token()
        sys.exit(0)
    tight_loop()
    network()
    cluster()
    files()
    through_the_proxy()
    harness_secrets()
    # The control of this is the token in its own pod, see escape.rs.
    if env("TOKEN"):
        replayed_token()
    print(json.dumps({"done": True}), flush=True)
    time.sleep(float(env("LINGER", "0")))
    sys.exit(0)
