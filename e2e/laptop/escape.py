"""Attempts of an agent to get out of the sandbox of `belay run`. Prints one JSON line for each: {"case", "tried", "escaped", "how"}.

As the control, the same file runs without a sandbox: there every attempt must succeed, otherwise it shows nothing. Its environment has
PROXY (host:port of the harness, or in the control of a proxy that allows everything), LOOPBACK (host:port of a server on the machine's
own loopback), SECRET (a file of the machine), NEIGHBOUR (a process outside the sandbox), WORKSPACE (the agent's folder) and WRITABLE
(a folder that may be written to).
"""

import ctypes
import ctypes.util
import errno
import glob
import json
import os
import platform
import socket
import subprocess
import threading

WAIT = 1.5  # seconds; a server answers within milliseconds
env = os.environ.get
libc = ctypes.CDLL(None, use_errno=True)


def report(case, tried, escaped, how=""):
    print(json.dumps({"case": case, "tried": tried, "escaped": bool(escaped), "how": str(how)[:200]}), flush=True)


def attempt(case, tried, work):
    """Reports the result of `work`. An error of the operating system or of a subprocess means that the attempt failed."""
    try:
        how = work()
        report(case, tried, how is not False, how)
    except (OSError, subprocess.SubprocessError) as error:
        report(case, tried, False, error)


def tcp(host, port, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(WAIT)
        s.connect((host, port))
        return "connected"


def udp(host, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.sendto(b"belay?", (host, port))
        return s.recvfrom(64)[0].decode()


def made(kind, protocol=0, family=socket.AF_INET):
    with socket.socket(family, kind, protocol):
        return "made"


def asked(request):
    """Sends a request to the proxy, byte for byte. Returns the first line of the answer if the status is 200."""
    host, _, port = env("PROXY").partition(":")
    with socket.create_connection((host, int(port)), WAIT) as s:
        s.settimeout(10)
        s.sendall(request)
        line = s.recv(4096).split(b"\r\n")[0]
        return line.decode() if b" 200" in line else False


def connect(target, headers=b""):
    headers = headers or b"Host: " + target + b"\r\n"
    return asked(b"CONNECT " + target + b" HTTP/1.1\r\n" + headers + b"\r\n")


def get(url, host=b"a.test"):
    return asked(b"GET " + url + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")


def syscall(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), errno.errorcode.get(ctypes.get_errno(), "?"))
    return result


def race():
    """Connects as fast as possible, from the first instruction on."""
    host, _, port = env("LOOPBACK").partition(":")
    for _ in range(2000):
        with socket.socket() as s:
            if s.connect_ex((host, int(port))) == 0:
                return "connected"
    return False


def read(path):
    with open(path, "rb") as file:
        return file.read(1).hex() or False


def write(path):
    with open(path, "wb") as file:
        file.write(b"x")
    return "written"


attempt("A1", "a tight loop", race)
host, _, port = env("LOOPBACK").partition(":")
attempt("A7", "the machine's loopback", lambda: tcp(host, int(port)))
attempt("A7", "8.8.8.8:443", lambda: tcp("8.8.8.8", 443))
attempt("A8", "[2001:4860:4860::8888]:443", lambda: tcp("2001:4860:4860::8888", 443, socket.AF_INET6))
attempt("A8", "[::ffff:8.8.8.8]:443", lambda: tcp("::ffff:8.8.8.8", 443, socket.AF_INET6))
attempt("A9", "udp 8.8.8.8:443", lambda: udp("8.8.8.8", 443))
attempt("A10", "udp 8.8.8.8:53", lambda: udp("8.8.8.8", 53))
attempt("A10", "tcp 8.8.8.8:53", lambda: tcp("8.8.8.8", 53))
attempt("A11", "8.8.8.8:853", lambda: tcp("8.8.8.8", 853))
attempt("A12", "icmp", lambda: made(socket.SOCK_RAW, socket.IPPROTO_ICMP))
attempt("A13", "raw", lambda: made(socket.SOCK_RAW, socket.IPPROTO_RAW))
attempt("A13", "packet", lambda: made(socket.SOCK_RAW, 3, socket.AF_PACKET))
attempt("A13", "vsock", lambda: made(socket.SOCK_STREAM, 0, socket.AF_VSOCK))
attempt("A23", "169.254.169.254:80", lambda: tcp("169.254.169.254", 80))
attempt("A23", "by the proxy", lambda: get(b"http://169.254.169.254/latest/meta-data/"))
for address in [b"2130706433:80", b"0177.0.0.1:80", b"0x7f000001:80", b"127.1:80", b"[::1]:80", b"8.8.8.8:443"]:
    attempt("A15", address.decode(), lambda: connect(address))
for case, names in {
    "A28": [b"allowed.test\0.evil.test:443"],
    "A29": [b"allowed.test..:443", "аllowed.test:443".encode()],
    "A30": [b"allowed.test.evil.test:443", b"evilallowed.test:443"],
    "A31": [b"allowed.test@evil.test:443"],
    "A32": [b"[fe80::1%25eth0]:443"],
    "A33": [b"allowed.test:443:22", b"allowed.test:0", b"allowed.test:65536", b"allowed.test:22"],
    "A36": [b"one.two.wild.test:443", b"wild.test:443"],
    "A24": [b"private.test:443", b"loopback.test:443", b"mixed.test:443"],
}.items():
    for name in names:
        attempt(case, ascii(name), lambda: connect(name))
attempt("A34", "two Hosts", lambda: connect(b"allowed.test:443", b"Host: allowed.test:443\r\nHost: evil.test:443\r\n"))
attempt("A35", "another Host", lambda: connect(b"allowed.test:443", b"Host: evil.test:443\r\n"))
attempt("A35", "another Host in a URL", lambda: get(b"http://allowed.test/", b"evil.test"))
attempt("A43", "a file of the machine's", lambda: read(env("SECRET")))
attempt("A43", "accounts", lambda: read("/etc/shadow"))
attempt("A43", "another process's environment", lambda: read(f"/proc/{env('NEIGHBOUR')}/environ"))
attempt("A43", "another process's root", lambda: os.listdir(f"/proc/{env('NEIGHBOUR')}/root"))
for how in [os.symlink, os.link]:
    link = env("WRITABLE") + "/" + how.__name__
    attempt("A47", how.__name__, lambda: how(env("SECRET"), link) or read(link))
attempt("A44", "ptrace", lambda: syscall({"x86_64": 101, "aarch64": 117}[platform.machine()], 16, int(env("NEIGHBOUR")), 0, 0) == 0)
attempt("A48", "keyring", lambda: syscall({"x86_64": 248, "aarch64": 217}[platform.machine()], b"user", b"k", b"v", 1, -2))
attempt("A48", "bpf", lambda: syscall({"x86_64": 321, "aarch64": 280}[platform.machine()], 0, (ctypes.c_uint32 * 32)(2, 4, 4, 1), 48))
attempt("A49", "/proc/sys", lambda: write("/proc/sys/kernel/domainname"))
attempt("A50", "setuid", lambda: os.setuid(0) or os.getuid() == 0 and "root")
for path in ["/usr/belay-was-here", "/etc/belay-was-here", "/belay-was-here", env("WORKSPACE") + "/belay-was-here", "/dev/shm/belay-was-here"]:
    attempt("A51", path, lambda: write(path))
attempt("A48", "mount", lambda: libc.mount(b"none", env("WORKSPACE").encode(), b"tmpfs", 0, None) == 0)
# This is the last, because everything else fails in a user namespace of its own.
attempt("A48", "unshare", lambda: syscall({"x86_64": 272, "aarch64": 97}[platform.machine()], 0x10000000))
print(json.dumps({"done": True}), flush=True)
