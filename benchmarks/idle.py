"""What a process does when there is nothing to do, as the kernel sees it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_ECHO = """
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(sys.argv[1])
print("up", flush=True)
while True:
    data, sender = s.recvfrom(16)
    if data == b"end":
        break
    s.sendto(data, sender)
"""


def cpu_seconds(os_pid: int) -> float:
    """The time all threads of a process have been on a core (nanoseconds; `stat` has 10 ms)."""
    total = 0
    for task in Path(f"/proc/{os_pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except OSError:  # a thread that has just ended
            pass
    return total / 1e9


def cpu_percent(os_pids: list[int], seconds: float) -> float:
    """Sleep, and return the CPU use of the busiest of these processes meanwhile."""
    before = [cpu_seconds(p) for p in os_pids]
    time.sleep(seconds)
    return max(100 * (cpu_seconds(p) - b) / seconds for p, b in zip(os_pids, before, strict=True))


def rss_mb(os_pid: int) -> float:
    """The resident memory of a process."""
    pages = int(Path(f"/proc/{os_pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def sleeper() -> Iterator["Sleeper"]:
    """A process that sleeps on a Unix datagram socket and answers what wakes it."""
    with TemporaryDirectory(prefix="hb-") as folder:
        there, here = os.path.join(folder, "there"), os.path.join(folder, "here")
        argv = [sys.executable, "-c", _ECHO, there]
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
            subprocess.Popen(argv, stdout=subprocess.PIPE) as process,
        ):
            assert process.stdout is not None
            process.stdout.readline()
            sock.bind(here)
            sock.connect(there)
            sock.settimeout(10)
            try:
                yield Sleeper(sock)
            finally:
                sock.send(b"end")


class Sleeper:
    """Our end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def wake(self) -> float:
        """Time a datagram there and back."""
        start = time.perf_counter()
        self._sock.send(b"!")
        self._sock.recv(16)
        return time.perf_counter() - start
