"""Waiting for the end of one job."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

from hpcdist._schedulers.commands import CommandFailed, CommandLate
from hpcdist._schedulers.job_watch import exit_verdict, final_verdict
from hpcdist._schedulers.verdict import JobState, Verdict, merge

if TYPE_CHECKING:
    from hpcdist._schedulers.batch_manager import Submission
    from hpcdist._schedulers.scheduler import Scheduler

# A look into the run's folder costs nothing; a question to the scheduler costs it something.
_LOOK_EVERY = 0.2
_FIRST_POLL, _POLL_EVERY, _POLL_AT_MOST_EVERY = 2.0, 5.0, 60.0
# A job that is not listed: how many polls before those who remember ended jobs are asked, and
# before it is given up.
_MISSES, _LOST = 2, 6


class NeverStarts(Exception):
    """A job waits for what can never come.

    Attributes:
        verdict: The scheduler's word on it.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


class Follower:
    """Waits for the end of one job.

    Args:
        scheduler: Whose job it is.
        run: The job.
        say: Called with a line whenever the job's state changes.
    """

    def __init__(self, scheduler: Scheduler, run: Submission, say: Callable[[str], None]) -> None:
        self._scheduler = scheduler
        self._run = run
        self._say = say
        self._known: Verdict | None = None
        self._said = ""
        self._misses = 0
        self._pause = _POLL_EVERY

    def wait(self) -> Verdict | None:
        """Wait; return how the job ended, None if no record says so.

        Raises:
            NeverStarts: It cannot end, since it cannot start.
        """
        due = time.monotonic() + _FIRST_POLL
        while exit_verdict(self._run.folder) is None and self._misses < _LOST:
            if time.monotonic() >= due:
                self._poll()
                due = time.monotonic() + self._pause
                if self._known is not None and self._known.state.terminal:
                    break
            time.sleep(_LOOK_EVERY)
        world = SimpleNamespace(job=self._run.job, folder=self._run.folder, verdict=self._known)
        return final_verdict(self._scheduler, world)

    def _poll(self) -> None:
        job = self._run.job
        try:
            found = self._scheduler.poll([job]).get(job)
        except (CommandFailed, CommandLate) as exc:  # says nothing of the job
            self._pause = min(self._pause * 2, _POLL_AT_MOST_EVERY)
            self._print_change(f"{exc}; asking again")
            return
        self._pause = _POLL_EVERY
        self._misses = 0 if found else self._misses + 1
        if self._misses >= _MISSES:
            found = self._scheduler.post_mortem([job]).get(job)
        self._known = merge(self._known, found)
        if self._known is None:
            return
        if self._scheduler.hopeless(self._known):
            raise NeverStarts(self._known)
        if not self._known.state.terminal:
            self._print_change(described(self._known))

    def _print_change(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(f"job {self._run.job}: {text}")


def described(verdict: Verdict) -> str:
    """Say where a job is that has not ended."""
    if verdict.state.waiting:
        reason = f": {verdict.reason}" if verdict.reason else ""
        start = f", estimated start {verdict.start:%d %b %H:%M}" if verdict.start else ""
        return f"queued{reason}{start}"
    where = f" on {verdict.nodes}" if verdict.nodes else ""
    return f"{verdict.word.lower()}{where}"


def exit_code(verdict: Verdict | None) -> int:
    """Return the exit code that stands for the end of a job; 0 only for one that was done.

    >>> exit_code(Verdict(state=JobState.TIMEOUT, word="TIMEOUT", exit_code=0)), exit_code(None)
    (1, 1)
    """
    if verdict is None:
        return 1
    if verdict.state is JobState.DONE:
        return verdict.exit_code or 0
    if verdict.exit_code:
        return verdict.exit_code
    return 128 + verdict.signal if verdict.signal else 1
