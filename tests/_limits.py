"""The time limit of a test: who is too late is shown with all its stacks, and the run ends.

A hung test hangs in C or under a lock as often as not, where no exception can be raised. So the run
ends, after everything that helps to find the cause has been printed: what the test had captured so
far, the processes of the run, the stacks of the workers, the stacks of this process.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable

from tests.helpers import patient

__all__ = ["Limit"]

# How long the thread of `Limit` gets to collect its report before faulthandler, which needs neither
# thread nor interpreter, ends the process.
_REPORT_TIME = 5.0


class Limit:
    """The alarm clock of one session, set anew for each test."""

    def __init__(
        self, stderr_fd: int, report: Callable[[str], None], clean_up: Callable[[], None]
    ) -> None:
        self._stderr_fd = stderr_fd
        self._report = report
        self._clean_up = clean_up
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._name = ""
        self._seconds = 0.0
        threading.Thread(target=self._watch, name="time limit", daemon=True).start()

    def start(self, name: str, seconds: float) -> None:
        """Set the alarm; an earlier one is forgotten."""
        with self._changed:
            self._name, self._seconds = name, seconds
            self._deadline = time.monotonic() + seconds
            self._changed.notify()
        faulthandler.dump_traceback_later(seconds + _REPORT_TIME, exit=True, file=self._stderr_fd)

    def at_least(self, seconds: float) -> None:
        """Put the alarm off, where it would ring before so many seconds from now."""
        seconds = patient(seconds)
        with self._changed:
            if self._deadline is None:
                return
            left = self._deadline - time.monotonic()
            name = self._name
        if left < seconds:
            self.start(name, seconds)

    def stop(self) -> None:
        """Take the alarm back."""
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._deadline = None
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while True:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
        headline = f"\n\n=== time limit of {self._seconds:g} s passed: {self._name} ===\n"
        self._attempt(lambda: self._report(headline))
        self._say("\n=== stacks of this process ===\n")
        faulthandler.dump_traceback(file=self._stderr_fd, all_threads=True)
        self._attempt(self._clean_up)
        os._exit(1)

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as exc:  # nothing may keep the process from ending
            self._say(f"(no full report: {exc!r})\n")

    def _say(self, text: str) -> None:
        os.write(self._stderr_fd, text.encode(errors="replace"))


def dump_stacks_of(os_pids: list[int], wait: float = 1.0) -> list[int]:
    """Ask processes to print their stacks, and return those that were asked.

    Only processes that catch SIGUSR1 are asked, as workers do; it would kill the others, and among
    them are those that carry the workers' output to us.
    """
    asked = [pid for pid in os_pids if _catches(pid, signal.SIGUSR1)]
    for pid in asked:
        try:
            os.kill(pid, signal.SIGUSR1)
        except ProcessLookupError:
            continue
    if asked:
        time.sleep(wait)
    return asked


def _catches(os_pid: int, signum: int) -> bool:
    try:
        with open(f"/proc/{os_pid}/status") as status:
            for line in status:
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (signum - 1) & 1)
    except OSError:
        pass
    return False
