"""Commands that we start and wait for: none outlives its waiter.

A command ends with this process, however that ends. What a launch runs is on its leash
besides: the end of the launch ends the commands, too.
"""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from hpcdist._keeper.processes import kill_group

# Pipes of a killed command may be held open by a child of it that left its session.
_DRAIN = 2.0
_LOOK_EVERY = 0.25
# Beside a command that takes its time: ends it when this process does, be it by SIGKILL. Asking the
# kernel to (PR_SET_PDEATHSIG) would need code of ours between fork and exec, and so a copy of this
# process's page tables: seconds, for a driver that holds hundreds of gigabytes.
_GUARD = 'read -r never; kill -9 "-$1"'


class Cut(TimeoutError):
    """A command was ended before its time, as nobody needs its answer any more."""


class Leash:
    """The commands that run for one launch.

    Attributes:
        limit: How long a command may take, in seconds, whatever was allowed it.
    """

    def __init__(self) -> None:
        self.limit = math.inf
        self._lock = threading.Lock()  # guards all below
        self._running: set[subprocess.Popen[str]] = set()
        self._cut: set[subprocess.Popen[str]] = set()
        self._cuts = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the commands that this thread runs meanwhile on this leash."""
        token = _held.set(self)
        try:
            yield
        finally:
            _held.reset(token)

    def cut(self) -> None:
        """End the commands that run now; those that wait for them get `Cut`."""
        with self._lock:
            self._cuts += 1
            running = list(self._running)
            self._cut |= self._running
        for process in running:
            if process.poll() is None:
                kill_group(process.pid, signal.SIGKILL)

    def start(self, argv: Sequence[str], **how: Any) -> subprocess.Popen[str]:
        """Start a command on this leash; it leads a session of its own."""
        cuts = self._cuts
        process = subprocess.Popen(list(argv), text=True, start_new_session=True, **how)
        with self._lock:
            self._running.add(process)
            if self._cuts != cuts:  # while it was being started
                self._cut.add(process)
        return process

    def remove(self, process: subprocess.Popen[str]) -> None:
        """Let go of a command that has ended."""
        with self._lock:
            self._running.discard(process)
            self._cut.discard(process)

    def is_cut(self, process: subprocess.Popen[str]) -> bool:
        """Tell whether a command was ended by `cut`."""
        return process in self._cut


_held: ContextVar[Leash | None] = ContextVar("_held", default=None)


class Command:
    """A command that runs, and its clock.

    Attributes:
        process: Its process, which leads a session of its own: a terminal's Ctrl-C is for the
            user's program, not for a submission.
    """

    def __init__(self, process: subprocess.Popen[str], deadline: float, leash: Leash) -> None:
        self.process = process
        self._leash = leash
        self._deadline = deadline
        self._started = time.monotonic()
        self._guard: subprocess.Popen[bytes] | None = None

    def left(self) -> float:
        """Return how long to wait before asking again; asking twice means a slow command.

        Raises:
            Cut: It was ended, as nobody needs its answer.
            TimeoutError: Its deadline has passed.
        """
        if self._leash.is_cut(self.process):
            raise Cut
        left = min(self._deadline, self._leash.limit) - (time.monotonic() - self._started)
        if left <= 0:
            raise TimeoutError
        if self._guard is None and time.monotonic() - self._started >= _LOOK_EVERY:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "sh", str(self.process.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return min(left, _LOOK_EVERY)

    def close(self) -> None:
        """Let the guard go: the command has ended."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()


@contextmanager
def running(
    argv: Sequence[str], deadline: float, *, env: Mapping[str, str], stdin: int
) -> Iterator[Command]:
    """Run a command for the length of a block, at whose end it is killed with all it has started.

    Raises:
        Cut: It was ended, as nobody needs its answer.
    """
    leash = _held.get() or Leash()
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with leash.start(argv, env=env, errors="replace", **pipes) as process:
        command = Command(process, deadline, leash)
        try:
            yield command
            if leash.is_cut(process):
                raise Cut
        finally:
            if process.poll() is None:
                _kill(process)
            leash.remove(process)
            command.close()


class Answer(NamedTuple):
    """What a command that has ended leaves."""

    status: int
    out: str
    err: str


def communicate(
    argv: Sequence[str], deadline: float, *, env: Mapping[str, str], input: str | None = None
) -> Answer:
    """Run a command to its end; return its status and what it wrote to its two streams.

    Raises:
        TimeoutError: The deadline passed, and it was killed with all it has started.
        Cut: It was ended, as nobody needs its answer.
    """
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    with running(argv, deadline, env=env, stdin=stdin) as command:
        while True:
            try:
                out, err = command.process.communicate(input, command.left())
            except subprocess.TimeoutExpired:
                input = None  # it has been taken over
            else:
                break
    return Answer(command.process.returncode, out, err)


def _kill(process: subprocess.Popen[str]) -> None:
    kill_group(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
        process.communicate(timeout=_DRAIN)
