"""How jobs stand, for all who ask in this process: one question to a scheduler for all of them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from hpcdist._runtime.node import Node, Service
from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.job_watch import exit_verdict
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.verdict import Verdict, merge

_POLL_EVERY, _POLL_AT_MOST_EVERY, _SOON = 5.0, 60.0, 1.0
# A job that is not listed: how many polls before those who remember ended jobs are asked, and
# before it is given up.
_MISSES, _LOST = 2, 6


@dataclass
class _Watched:
    """One job that has not ended, as far as is known."""

    known: Verdict | None = None
    misses: int = 0


@dataclass
class _Desk:
    """What is known of the jobs of one scheduler."""

    scheduler: Scheduler
    jobs: dict[JobId, _Watched] = field(default_factory=dict)
    due: float = 0.0
    pause: float = _POLL_EVERY
    asking: bool = False


@dataclass(frozen=True)
class Standing:
    """How a job stands.

    Attributes:
        verdict: What is known of it; None: nothing yet.
        lost: Nobody knows of it any more.
    """

    verdict: Verdict | None
    lost: bool = False

    @property
    def ended(self) -> bool:
        """Whether it has ended, as far as anybody will ever know."""
        return self.lost or (self.verdict is not None and self.verdict.state.terminal)


class JobWatch(Service):
    """Asks schedulers for the states of jobs, at most every five seconds each."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._desks: dict[str, _Desk] = {}
        self._lock = threading.Lock()  # guards the desks

    def standing(self, scheduler: Scheduler, job: JobId, folder: str) -> Standing:
        """Tell how a job stands, by what its folder says, and by the last answer.

        Args:
            folder: Where its script tells how it ended.
        """
        last = exit_verdict(folder)
        if last is not None and not last.signal:
            return Standing(last)
        with self._lock:
            desk = self._desks.setdefault(scheduler.name, _Desk(scheduler))
            watched = desk.jobs.setdefault(job, _Watched())
            ask = time.monotonic() >= desk.due and not desk.asking
            desk.asking = desk.asking or ask
        if ask:
            try:
                self._ask(desk)
            finally:
                desk.due = time.monotonic() + desk.pause
                desk.asking = False
        known, lost = watched.known, watched.misses >= _LOST
        if last is not None and (lost or (known is not None and known.state.terminal)):
            # The script was asked to end; why, only the scheduler knows, if anybody does.
            known = merge(known if known is not None and known.state.terminal else None, last)
        found = Standing(known, lost=lost)
        if found.ended:
            with self._lock:
                desk.jobs.pop(job, None)
        return found

    def _ask(self, desk: _Desk) -> None:
        with self._lock:
            jobs = dict(desk.jobs)
        try:
            listed = desk.scheduler.poll([*jobs])
        except (CommandFailed, CommandLate, CommandMissing):  # which says nothing of the jobs
            desk.pause = min(2 * desk.pause, _POLL_AT_MOST_EVERY)
            return
        desk.pause = _POLL_EVERY
        for job, watched in jobs.items():
            watched.misses = 0 if job in listed else watched.misses + 1
            watched.known = merge(watched.known, listed.get(job))
        gone = [job for job, watched in jobs.items() if _is_gone(job, watched, listed)]
        if gone:
            for job, verdict in desk.scheduler.post_mortem(gone).items():
                jobs[job].known = merge(jobs[job].known, verdict)

    def ask_soon(self, scheduler: Scheduler) -> None:
        """Ask a little earlier: one of its jobs was cancelled."""
        with self._lock:
            desk = self._desks.get(scheduler.name)
            if desk is not None:
                desk.due = min(desk.due, time.monotonic() + _SOON)


def _is_gone(job: JobId, watched: _Watched, listed: dict[JobId, Verdict]) -> bool:
    if job in listed:
        return listed[job].state.terminal
    return watched.misses >= _MISSES
