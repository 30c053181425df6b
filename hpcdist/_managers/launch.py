"""A launch: workers on their way, in one world or, with several jobs, in several."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Sequence

from hpcdist import _log
from hpcdist._errors import LaunchError
from hpcdist._managers import roster
from hpcdist._managers.base import ClusterManager, JobManager, KeptManager, Settings
from hpcdist._managers.elastic import ElasticManager, ElasticWorld
from hpcdist._managers.failing import launch_error, together
from hpcdist._managers.world import LaunchState, World
from hpcdist._runtime.node import node
from hpcdist._transport.contracts import Slot

_NOTICE_EVERY = 1.0


class Launch:
    """Workers on their way.

    Attributes:
        pids: The workers that have registered so far.
        state: A `LaunchState`; its text says the same. While a job waits: the scheduler's word.
        jobs: The ids of the scheduler's jobs; each has its cluster as `.cluster`.
        reason: Why a job waits, in the scheduler's words.
        estimated_start: When the scheduler means to start it; None if it does not say.
    """

    def __init__(self, manager: ClusterManager, settings: Settings) -> None:
        self.manager = manager
        self.settings = settings
        self.outcome = LaunchState.PENDING
        self.error: LaunchError | None = None
        self.reason: str | None = None
        self.estimated_start: datetime.datetime | None = None
        self._slots: list[Slot] = []
        self.jobs_of = manager if isinstance(manager, JobManager) else None
        kept = manager if isinstance(manager, KeptManager) else None
        self.on_network = kept is not None and kept.on_network
        self.hosts_apart = kept is not None and kept.hosts_apart
        sizes = [None] if kept is None else kept.sizes(settings)
        kind = ElasticWorld if isinstance(manager, ElasticManager) else World
        self.worlds = [kind(self, size) for size in sizes]

    # What users ask

    @property
    def pids(self) -> list[int]:
        """The workers that have registered so far."""
        return sorted(pid for world in self.worlds for pid in world.pids)

    @property
    def state(self) -> LaunchState:
        """Where the launch is."""
        if self.outcome is LaunchState.PENDING:
            words = {world.word for world in self.worlds if not world.complete()}
            return LaunchState(words.pop()) if len(words) == 1 else LaunchState.PENDING
        return self.outcome

    @property
    def jobs(self) -> list[str]:
        """The ids of the scheduler's jobs."""
        return list(dict.fromkeys(w.job for w in self.worlds if w.job is not None))

    def __repr__(self) -> str:
        of = "" if self.expected is None else f" of {self.expected}"
        return f"<Launch {self.state}: {len(self.pids)}{of} workers>"

    def log(self, n: int = 20) -> list[str]:
        """Return the last lines the launch has printed."""
        lines = [line for world in self.worlds for line in world.log(n)]
        return lines[-n:]

    def wait(self, n: int | None = None, timeout: float | None = None) -> list[int]:
        """Wait until `n` workers (default: all) have registered; return their pids.

        Raises:
            LaunchError: The launch failed or was cancelled.
            TimeoutError: The timeout has passed; the launch goes on.
        """
        n = self.manager.enough if n is None else n
        deadline = None if timeout is None else time.monotonic() + timeout
        shown = self.jobs_of is not None and sys.stderr is not None and sys.stderr.isatty()
        try:
            while True:
                slot = Slot()
                self._slots.append(slot)
                try:
                    enough = n is not None and len(self.pids) >= n
                    if enough or self.outcome is LaunchState.RUNNING:
                        return self.pids
                    if self.error is not None:
                        raise self.error
                    self._await(slot, deadline, shown)
                finally:
                    self._slots.remove(slot)
        finally:
            if shown:
                _show("")

    def _await(self, slot: Slot, deadline: float | None, shown: bool) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if not shown:
            node.wait(slot, left)
            return
        assert self.jobs_of is not None
        _show(self.jobs_of.note(self))
        try:
            node.wait(slot, _NOTICE_EVERY if left is None else min(left, _NOTICE_EVERY))
        except TimeoutError:
            if left is not None and left <= _NOTICE_EVERY:
                raise

    def cancel(self) -> None:
        """End the launch: what is on its way is stopped, what has registered is removed."""
        if not self._decide(LaunchState.CANCELLED):
            return
        self.error = launch_error(self.worlds[0], "the launch was cancelled")
        self._abandon()
        for pid in self.pids:
            roster.dismiss(roster.book[pid])
        self.changed()

    # What managers and worlds ask

    @property
    def expected(self) -> int | None:
        """How many workers are to come; None: not known yet."""
        sizes = [world.expected for world in self.worlds]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def pending(self) -> bool:
        """Whether workers are still to come."""
        return self.outcome is LaunchState.PENDING

    @property
    def cancelled(self) -> bool:
        """Whether the launch was cancelled."""
        return self.outcome is LaunchState.CANCELLED

    def begin(self) -> None:
        """Listen for workers and let the manager start them."""
        node.start()
        try:
            for world in self.worlds:
                world.prepare()
            if isinstance(self.manager, KeptManager):
                self.manager.start(self)
            else:
                self.worlds[0].start_own()
        except BaseException as exc:
            self.fail(exc)
            raise
        if not self.on_network:  # elsewhere it starts with a world
            self.worlds[0].set_clock()

    def background(self, fn: Callable[[], object]) -> None:
        """Run something that may block on a thread of its own."""

        def run() -> None:
            try:
                fn()
            except Exception as exc:  # the edge of a thread: whoever waits has to hear of it
                self.fail(exc)

        node.turns.background(run)

    def every(self, seconds: float, fn: Callable[[], object]) -> None:
        """Call something on a background thread again and again while workers are to come."""

        def run() -> None:
            if self.pending:
                fn()
                node.progress.call_later(seconds, again)

        def again() -> None:
            if self.pending:
                self.background(run)

        node.progress.call_later(seconds, again)

    def fail(
        self,
        what: BaseException | str,
        phase: str = "",
        tail: Sequence[str] = (),
        world: World | None = None,
    ) -> None:
        """Give the launch up; who waits for it is told why."""
        if world is not None and self.hosts_apart:
            if not world.settled:
                world.failure = launch_error(world, what, phase, tail)
            world.abandon()
            self.changed()
            return
        if world is not None and self._can_do_without(world):
            _log.log("warning", f"workers are missing: {what}")
            world.abandon()
            self.changed()
            return
        if not self._decide(LaunchState.FAILED):
            return
        self.error = launch_error(world or self.worlds[0], what, phase, tail)
        self._abandon()
        self.changed()

    def _can_do_without(self, world: World) -> bool:
        """Whether others suffice; what has come is enough where that was all that was asked."""
        least = self.settings.min_workers
        if least is None or len(self.worlds) < 2:
            return least is not None and len(self.pids) >= least
        others = [w for w in self.worlds if w is not world and not w.closed]
        return sum(w.expected or 0 for w in others) >= least

    def changed(self) -> None:
        """Something has happened that waiting ones may have waited for."""
        with roster.lock:
            if self.jobs_of is not None and all(world.up for world in self.worlds):
                self.reason = self.estimated_start = None
            settled = self.pending and all(world.settled for world in self.worlds)
            missed = self._conclude() if settled else []
        for failure in missed:
            _log.log("warning", f"workers are missing: {failure}")
        for slot in list(self._slots):
            node.complete(slot)

    def _conclude(self) -> list[LaunchError]:
        """No more workers will come: decide. Returns the failures of worlds it can do without."""
        failures = [world.failure for world in self.worlds if world.failure is not None]
        least = self.settings.min_workers
        if not failures or (least is not None and len(self.pids) >= least):
            self.outcome = LaunchState.RUNNING
            return failures
        self.error = together(failures, len(self.worlds), self.pids)
        self.outcome = LaunchState.FAILED
        return []

    def close(self) -> None:
        """End what is left of its worlds."""
        for world in self.worlds:
            world.close()

    def end_jobs(self) -> None:
        """Let the scheduler end the jobs that do not end by themselves. May take a while."""
        if self.jobs_of is not None and not self.ended():
            self.jobs_of.cancel_jobs(self)
            for world in self.worlds:
                world.forget()

    def ended(self) -> bool:
        """Tell whether nothing of this launch is left."""
        return all(world.ended() for world in self.worlds)

    def _decide(self, outcome: LaunchState) -> bool:
        with roster.lock:
            if self.outcome is not LaunchState.PENDING:
                return False
            self.outcome = outcome
        return True

    def _abandon(self) -> None:
        for world in self.worlds:
            world.abandon()
        if self.jobs_of is not None:
            node.turns.background(self.end_jobs)


def _show(text: str) -> None:
    """Show one line on the terminal in place of the one before."""
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()
