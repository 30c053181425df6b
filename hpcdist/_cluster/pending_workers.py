"""Workers that a manager says it has started, and which of those that greet is which.

A worker may greet before `launch` has yielded its config: it then waits for that.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

from hpcdist import _log
from hpcdist._contract.managers import ClusterManager, WorkerConfig
from hpcdist._wire.greeting import Hello


@dataclass(eq=False)
class Arrival:
    """A worker to come: the pid kept for it, and what its manager said of it."""

    pid: int
    config: WorkerConfig
    taken: bool = False


class Arrivals:
    """The workers of one launch of a manager of the user's own."""

    def __init__(self) -> None:
        self.all: list[Arrival] = []
        self._changed = threading.Condition()  # guards all of this
        self._finished = False

    def add(self, pid: int, config: WorkerConfig) -> Arrival:
        """Note one more; who comes after all have been given up is taken already."""
        with self._changed:
            entry = Arrival(pid, config, taken=self._finished)
            self.all.append(entry)
            self._changed.notify_all()
        return entry

    def coming(self, started: Iterable[WorkerConfig]) -> Iterator[WorkerConfig]:
        """Go through what a manager starts; once all is given up, a generator starts no more."""
        for config in started:
            yield config
            if self._finished and isinstance(started, Generator):
                started.close()

    def finish(self) -> None:
        """Say that no more will be noted."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def missing(self) -> list[Arrival]:
        """List those that have not greeted."""
        return [entry for entry in self.all if not entry.taken]

    def abandon(self) -> list[Arrival]:
        """Take those that have not greeted, so that none can match them later."""
        with self._changed:
            left = self.missing()
            for entry in left:
                entry.taken = True
            self._finished = True
            self._changed.notify_all()
        return left

    def match(self, hello: Hello, timeout: float) -> Arrival | None:
        """Find the worker that greets, once its manager has named it; None if it never does."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                found = self._find(hello)
                if found is not None:
                    found.taken = True
                    return found
                left = deadline - time.monotonic()
                if self._finished or left <= 0:
                    return None
                self._changed.wait(left)

    def _find(self, hello: Hello) -> Arrival | None:
        missing = self.missing()
        line = _ancestry(hello["os_pid"])
        for os_pid in line:  # itself, then the shell or launcher that started it
            for entry in missing:
                if os_pid in (entry.config.os_pid, getattr(entry.config.process, "pid", None)):
                    return entry
        ident = hello.get("ident")
        for entry in missing:
            if ident is not None and str(entry.config.ident) == ident:
                return entry
        nameless = [e for e in missing if e.config.process is None and e.config.os_pid is None]
        here = [e for e in nameless if e.config.host in (None, hello["host"])]
        rest = here or (nameless or missing if self._finished else [])
        return rest[0] if rest else None


def _ancestry(os_pid: int) -> list[int]:
    line: list[int] = []
    while os_pid > 1 and len(line) < 16:
        line.append(os_pid)
        try:
            with open(f"/proc/{os_pid}/stat") as file:
                os_pid = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return line


def reap(config: WorkerConfig) -> None:
    """Take the status of a process that has ended, or is about to: no zombie stays."""
    if isinstance(config.process, subprocess.Popen):
        try:
            config.process.wait(10)
        except subprocess.TimeoutExpired:
            pass


def kill(manager: ClusterManager, entry: Arrival) -> None:
    """Have its manager kill a worker that is not awaited any more."""
    try:
        manager.kill(entry.pid, entry.config)
    except Exception as exc:  # the user's code
        _log.log("warning", f"{type(manager).__name__}.kill failed: {exc!r}")
    reap(entry.config)
