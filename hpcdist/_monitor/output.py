"""Workers' output: whole lines to pid 1, which prints each with the worker's number.

A worker's `sys.stdout` and `sys.stderr` send lines by the route its results take, so a line
printed by a call is there before the call's result. What goes to the descriptors 1 and 2 from
elsewhere (C code, child processes) comes by the keeper's pipes.
"""

from __future__ import annotations

import io
import os
import pickle
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, TextIO

from hpcdist._runtime.controls import OUTPUT
from hpcdist._runtime.node import node
from hpcdist._transport.router import Peer
from hpcdist._wire.frames import Buffer

_HELD_MOST = 64 * 1024  # a line longer than this is sent in parts
_TAIL = 20
_LAST_WORDS = 0.05  # seconds

tails: dict[int, deque[str]] = {}  # on pid 1: the last lines of each worker's stderr


class _Lines(io.RawIOBase):
    """Sends what is written, line by line, to pid 1."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._held = b""
        self._lock = threading.Lock()  # guards _held

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        view = bytes(data)
        with self._lock:
            held = self._held + view
            cut = held.rfind(b"\n") + 1
            if len(held) > _HELD_MOST:
                cut = len(held)
            whole, self._held = held[:cut], held[cut:]
        if whole:
            self._send(whole)
        return len(view)

    def drain(self) -> None:
        """Send what has no newline yet: the process ends."""
        with self._lock:
            rest, self._held = self._held, b""
        if rest:
            self._send(rest)

    def _send(self, data: bytes) -> None:
        master = node.peers.get(1)
        if master is None or not master.alive:
            os.write(self._fd, data)
            return
        master.control(OUTPUT, 0, pickle.dumps((self._fd, data.decode("utf-8", "replace")), 5))
        # Errors may be last words: they leave before this thread goes on.
        node.progress.nudge(_LAST_WORDS if self._fd == 2 else 0.0)


class _Stream(io.TextIOWrapper):
    """A text stream over `_Lines`, flushed at each newline."""

    def __init__(self, fd: int) -> None:
        self._lines = _Lines(fd)
        super().__init__(
            io.BufferedWriter(self._lines),
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )

    def drain(self) -> None:
        """Send everything, ended by a newline or not."""
        self.flush()
        self._lines.drain()


def forward() -> None:
    """Send this worker's prints to pid 1 from now on."""
    import atexit

    sys.stdout, sys.stderr = out, err = _Stream(1), _Stream(2)
    for stream in (out, err):
        atexit.register(stream.drain)


def restore() -> None:
    """Print for ourselves again."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            stream.drain()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def show(pid: int, fd: int, text: str) -> None:
    """Print a worker's lines on pid 1."""
    lines = text.splitlines()
    if fd == 2:
        tails.setdefault(pid, deque(maxlen=_TAIL)).extend(lines)
    stream: TextIO | None = sys.stdout if fd == 1 else sys.stderr
    if stream is None:
        return
    try:
        stream.write("".join(f"From worker {pid}:\t{line}\n" for line in lines))
        stream.flush()
    except (OSError, ValueError):  # closed: there is nobody to read it
        pass


@node.control(OUTPUT)
def _on_output(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    fd, text = pickle.loads(body)
    show(peer.pid, fd, text)


def rss() -> int:
    """Return this process's resident memory in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def await_reader(fd: int, seconds: float) -> None:
    """Wait until what was written to a pipe has been read; with anything else, not at all."""
    import fcntl
    import termios

    deadline = time.monotonic() + seconds
    unread = bytearray(4)
    while stat.S_ISFIFO(os.fstat(fd).st_mode) and time.monotonic() < deadline:
        fcntl.ioctl(fd, termios.FIONREAD, unread)
        if not any(unread):
            return
        time.sleep(0.002)
