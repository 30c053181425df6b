"""Workers' output: whole lines to pid 1, which prints each with the worker's number.

A worker's `sys.stdout` and `sys.stderr` send lines by the route its results take, so a line
printed by a call is there before the call's result. What goes to the descriptors 1 and 2 from
elsewhere (C code, child processes) comes by the keeper's pipes.
"""

from __future__ import annotations

import io
import os
import re
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TextIO

from hpcdist._monitor.status_line import StatusLine
from hpcdist._runtime.node import Mail, Node, Service, here, on
from hpcdist._wire.messages import Output

_HELD_MOST = 64 * 1024  # a line longer than this is sent in parts
_TAIL = 20
_LAST_WORDS = 0.05  # seconds
_JUST = 1.0  # seconds before its end within which a worker's words are about that
# In the stack that faulthandler prints at a crash: of no use to users, and longer than their part.
_OUR_FRAME = re.compile(
    r' +File "(?:[^"]*/hpcdist/_[^"]*|<frozen runpy>)", line \d+ in |Extension modules:'
)
# How faulthandler prints stacks.
_STACK = re.compile(r'(Current thread|Thread) 0x[0-9a-f]+|  File ".*", line \d+ in |  \.\.\.$|$')


class Said(NamedTuple):
    """A line of a worker's stderr."""

    line: str
    at: float  # when it came
    ident: int  # of the call of process 1 that has printed it; 0: none, or not known


class WorkersOutput(Service):
    """What the workers have printed, on process 1."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.tails: dict[int, deque[Said]] = {}  # the last lines of each worker's stderr
        self.logs: dict[int, deque[str]] = {}  # where the lines of a worker's launch are kept
        # Prints somewhere else, if it can: a notebook, under the cell of the call.
        self.place: Callable[[int, str, int], bool] | None = None
        self._diverted: dict[int, list[str]] = {}  # of whom stacks have been asked by a signal

    @on(Output)
    def _on_output(self, said: Output, mail: Mail) -> None:
        log = self.logs.get(mail.peer.pid)
        if log is not None:
            log.extend(said.text.splitlines())
        self.show(mail.peer.pid, said.descriptor, said.text, said.ident)

    def show(self, pid: int, fd: int, text: str, ident: int = 0) -> None:
        """Print a worker's lines, which the call of such a number has printed."""
        lines = text.splitlines()
        if fd == 2 and pid in self._diverted:
            self._diverted[pid] += [line for line in lines if _STACK.match(line)]
            lines = [line for line in lines if not _STACK.match(line)]
        if fd == 2:
            now = self.node.machine.now()
            words = (Said(line, now, ident) for line in lines if not _OUR_FRAME.match(line))
            self.tails.setdefault(pid, deque(maxlen=_TAIL)).extend(words)
        shown = "".join(f"From worker {pid}:\t{line}\n" for line in lines)
        if self.place is None or not shown or not self.place(fd, shown, ident):
            _print(sys.stdout if fd == 1 else sys.stderr, shown)

    @contextmanager
    def diverted_stacks(self, pid: int) -> Iterator[list[str]]:
        """Give what a worker prints of its stacks to the caller, instead of printing it."""
        lines: list[str] = []
        self._diverted[pid] = lines
        try:
            yield lines
        finally:
            del self._diverted[pid]

    def last_words(self, pid: int) -> tuple[list[str], list[str]]:
        """Return the last lines of a dead worker's stderr, and forget it.

        Returns:
            Those of the calls that it has not answered, and those from before. What comes from C,
            from a child or for a call of another process does not say of which call it is: there
            it counts when it came.
        """
        self.logs.pop(pid, None)
        node = self.node
        calls = node.calls_at(pid)
        began = node.machine.now() - _JUST
        for ident, slot in calls.items():
            began = node.began_at(pid, ident, slot)
            break
        own: list[str] = []
        older: list[str] = []
        for said in self.tails.pop(pid, ()):
            is_own = said.ident in calls if said.ident else said.at >= began
            (own if is_own else older).append(said.line)
        return own, older


class _Lines(io.RawIOBase):
    """Sends what is written, line by line, to pid 1."""

    def __init__(self, node: Node, fd: int) -> None:
        self._node = node
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
        master = self._node.peers.get(1)
        if master is None or not master.alive:
            os.write(self._fd, data)
            return
        call = self._node.turns.calls.get(threading.get_ident())
        ident = call.ident if call is not None and call.peer is master else 0
        master.send(Output(self._fd, data.decode("utf-8", "replace"), ident))
        # Errors may be last words: they leave before this thread goes on.
        self._node.progress.nudge(_LAST_WORDS if self._fd == 2 else 0.0)


class _Stream(io.TextIOWrapper):
    """A text stream over `_Lines`, flushed at each newline."""

    def __init__(self, node: Node, fd: int) -> None:
        self._lines = _Lines(node, fd)
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


def forward(node: Node) -> None:
    """Send this worker's prints to pid 1 from now on."""
    import atexit

    sys.stdout, sys.stderr = out, err = _Stream(node, 1), _Stream(node, 2)
    for stream in (out, err):
        atexit.register(stream.drain)


def restore() -> None:
    """Print for ourselves again."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            stream.drain()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def say(text: str) -> None:
    """Print a line of our own on stderr."""
    _print(sys.stderr, f"{text}\n")


def _print(stream: TextIO | None, text: str) -> None:
    if stream is None:
        return
    try:
        with here.node.service(StatusLine).taken_off(stream), _beside_bars(stream):
            stream.write(text)
            stream.flush()
    except (OSError, ValueError):  # closed: there is nobody to read it
        pass


def _beside_bars(stream: TextIO) -> AbstractContextManager[Any]:
    """Take tqdm's bars, ours and the user's, off a terminal while something is written there."""
    module = sys.modules.get("tqdm")
    kind: Any = getattr(module, "tqdm", None)
    if not getattr(kind, "_instances", None) or not stream.isatty():
        return nullcontext()
    taken_off: AbstractContextManager[Any] = kind.external_write_mode(file=stream)
    return taken_off


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
