"""A caller of `belay run` from which a process inherits much. It sets all this up, and then executes the command of its arguments.

An IDE's terminal, `make -j`, tmux, systemd and CI runners pass on such things: many descriptors, ignored signals, limits, a umask.
"""

import array
import fcntl
import os
import pty
import resource
import select
import signal
import socket
import sys
import tempfile


def keep(fd, at):
    """Duplicates a descriptor to this number or the next free one, so that a started process inherits it."""
    fcntl.fcntl(fd if isinstance(fd, int) else fd.fileno(), fcntl.F_DUPFD, at)


host, port = os.environ.pop("SERVICE").split(":")
keep(os.open("/", os.O_RDONLY | os.O_DIRECTORY), 9)  # this folder gives the whole file system
keep(os.open("/etc", os.O_PATH), 12)
keep(socket.create_connection((host, int(port))), 20)  # this connection gives network access
for n in range(3):
    keep(pty.openpty()[n % 2], 30 + n)  # tmux
for end in os.pipe():
    keep(end, 100)  # the jobserver of make
keep(os.open(os.environ["HOME_FILE"], os.O_RDWR), 251)
keep(os.eventfd(1), 252)
keep(select.epoll(), 253)
keep(os.pidfd_open(os.getpid()), 254)
memory = os.memfd_create("secret", 0)
os.write(memory, b"what is in memory")
keep(memory, 255)
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
root = os.open("/", os.O_RDONLY)
a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [root]))])  # a folder that the receiver can take
keep(b, 300)
keep(os.open("/proc/self/mem", os.O_RDWR), 400)
keep(tempfile.TemporaryFile(), 900)
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
signal.signal(signal.SIGINT, signal.SIG_IGN)  # a background job of a shell
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
os.umask(0o077)
try:
    resource.setrlimit(resource.RLIMIT_RTPRIO, (95, 95))
    resource.setrlimit(resource.RLIMIT_NICE, (40, 40))
except ValueError:
    pass  # the machine does not allow it
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-900")
except OSError:
    pass
# Standard input is a server's connection, as under inetd.
os.dup2(a.fileno(), 0)
os.execvp(sys.argv[1], sys.argv[1:])
