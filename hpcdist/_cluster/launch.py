"""A launch: workers on their way, in one world or, with several jobs, in several."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence

from hpcdist import _log
from hpcdist._cluster.job_record import JobRecord, job_record
from hpcdist._cluster.launch_errors import launch_error, together
from hpcdist._cluster.launch_state import LaunchState
from hpcdist._cluster.own_world import OwnWorld
from hpcdist._cluster.replacements import Replacements
from hpcdist._cluster.roster import Roster
from hpcdist._cluster.world import World
from hpcdist._contract.kept_managers import JobManager, KeptManager, Plan
from hpcdist._contract.managers import ClusterManager
from hpcdist._errors import LaunchError
from hpcdist._frames import brief
from hpcdist._keeper.leash import Leash
from hpcdist._monitor.status import html_table
from hpcdist._public import public
from hpcdist._runtime.node import Node
from hpcdist._transport.contracts import Slot
from hpcdist._transport.descriptors import make_room

_NOTICE_EVERY = 1.0
_FILES_OF_A_WORLD = 8  # what process 1 has open for it, apart from a connection to each worker
_AFTER_ERROR = 60.0  # seconds until what is done again and again is tried again


@public
class Launch:
    """Workers on their way.

    Attributes:
        pids: The workers that have registered so far; with `renew=True`, those that live.
        state: A `LaunchState`; its text says the same. While a job waits: the scheduler's word.
        jobs: The ids of the scheduler's jobs.
        cluster: Where they were submitted to, if the scheduler has several clusters.
        reason: Why a job waits, in the scheduler's words.
        estimated_start: When the scheduler means to start it; None if it does not say.
    """

    def __init__(self, node: Node, manager: ClusterManager, plan: Plan) -> None:
        self.node = node
        self._roster = node.service(Roster)
        self.manager = manager
        self.plan = plan
        self.settings = plan.settings
        self.outcome = LaunchState.PENDING
        self.error: LaunchError | None = None
        self.reason: str | None = None
        self.estimated_start: datetime.datetime | None = None
        self.leash = Leash()  # what runs for it in the background
        self._slots: list[Slot] = []
        self._hopes: list[int] = []  # for how many workers somebody waits
        self._past: list[JobRecord] = []  # of worlds that others have replaced
        self._under_way: set[Callable[[], None]] = set()  # in the background
        self.jobs_of = manager if isinstance(manager, JobManager) else None
        self.kept = manager if isinstance(manager, KeptManager) else None
        self.on_network = self.kept is not None and self.kept.on_network
        self.hosts_apart = self.kept is not None and self.kept.hosts_apart
        self.worlds: list[World] = [self.make_world(size) for size in plan.sizes]
        replaces = self.settings.renew or self.settings.adapt is not None
        self.replacements = Replacements(self) if replaces else None

    def make_world(self, size: int | None) -> World:
        """Make a world of so many workers."""
        if self.kept is None:
            return OwnWorld(self, size)
        return self.kept.make_world(self, size) or World(self, size)

    # What users ask

    @property
    def pids(self) -> list[int]:
        """The workers that have registered so far; with `renew=True`, those that live."""
        if self.replacements is None:
            return self.everyone
        pids = [pid for world in self.worlds if not world.retired for pid in world.pids]
        return sorted(pid for pid in pids if self._roster.is_registered(pid))

    @property
    def everyone(self) -> list[int]:
        """All workers that have registered, also those that have left or are to leave."""
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

    @property
    def cluster(self) -> str | None:
        """Where its jobs were submitted to, if the scheduler has several clusters."""
        return next((w.job.cluster for w in self.worlds if w.job is not None), None)

    @property
    def workers_wanted(self) -> int | None:
        """How many workers there are to be; None: that is not known yet."""
        return self.expected

    @property
    def history(self) -> list[JobRecord]:
        """Every job it has had, the oldest first."""
        worlds = [*self._past, *(job_record(w) for w in self.worlds if w.job is not None)]
        return sorted(worlds, key=lambda record: record.submitted)

    def _repr_html_(self) -> str:
        rows = [[job.id, job.state, job.reason, job.workers] for job in self.history]
        jobs = html_table(["job", "state", "reason", "workers"], rows) if rows else ""
        return html_table(["launch"], [[repr(self)]]) + jobs

    def __repr__(self) -> str:
        of = "" if self.expected is None else f" of {self.expected}"
        return f"<Launch {self.state}: {len(self.pids)}{of} workers>"

    def log(self, n: int = 20) -> list[str]:
        """Return the last lines that its jobs, its launchers and its workers have printed."""
        lines = [line for world in self.worlds for line in world.log(n)]
        return lines[-n:]

    @brief
    def wait(self, n: int | None = None, timeout: float | None = None) -> list[int]:
        """Wait until `n` workers (default: all) have registered; return their pids.

        With `renew=True`: until so many are there, where some have died meanwhile.

        Raises:
            LaunchError: The launch failed or was cancelled.
            TimeoutError: The timeout has passed; the launch goes on.
        """
        n = self.manager.enough if n is None else n
        self._hopes.append(n or 0)
        deadline = None if timeout is None else self.node.machine.now() + timeout
        shown = self.jobs_of is not None and sys.stderr is not None and sys.stderr.isatty()
        try:
            while True:
                slot = Slot()
                self._slots.append(slot)
                try:
                    if self.error is not None:
                        raise self.error
                    enough = n is not None and len(self.pids) >= n
                    if enough or (self._is_full() and not self._may_grow(n)):
                        return self.pids
                    self._await(slot, deadline, shown)
                finally:
                    self._slots.remove(slot)
        finally:
            self._hopes.remove(n or 0)
            if shown:
                _show("")

    def _is_full(self) -> bool:
        """Tell whether all have come, and nobody is to come in the place of others."""
        full = self.replacements is None or self.replacements.is_full()
        return self.outcome is LaunchState.RUNNING and full

    def _may_grow(self, n: int | None) -> bool:
        """Tell whether more workers come if somebody waits for so many."""
        adapt = self.settings.adapt
        if n is None or adapt is None or not self.is_renewed:
            return False
        return n <= adapt.hi * self.plan.each

    def _await(self, slot: Slot, deadline: float | None, shown: bool) -> None:
        left = None if deadline is None else deadline - self.node.machine.now()
        if not shown:
            self.node.wait(slot, left)
            return
        assert self.jobs_of is not None
        _show(self.jobs_of.note(self))
        try:
            self.node.wait(slot, _NOTICE_EVERY if left is None else min(left, _NOTICE_EVERY))
        except TimeoutError:
            if left is not None and left <= _NOTICE_EVERY:
                raise

    def cancel(self) -> None:
        """End the launch: what is on its way is stopped, its workers and jobs are ended.

        Returns at once. A launch that has failed loses the workers that did come up.
        """
        with self._roster.lock:
            if self.cancelled:
                return
            if self.outcome is not LaunchState.FAILED:
                self.outcome = LaunchState.CANCELLED
                self.error = self._error("the launch was cancelled")
        if self.replacements is not None:
            self.replacements.end()
        self._abandon()
        for world in self.worlds:
            world.dismiss()
        self.changed()

    def outlive(self) -> None:
        """Let its jobs outlive its workers, where that was asked for (`linger=`)."""
        if self.outcome is LaunchState.RUNNING:
            for world in self.worlds:
                world.outlive()

    # What managers and worlds ask

    @property
    def expected(self) -> int | None:
        """How many workers are to come; None: not known yet."""
        if self.replacements is not None and self.replacements.begun:
            return self.replacements.expected()
        sizes = [world.expected for world in self.worlds]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def pending(self) -> bool:
        """Whether workers are still to come."""
        return self.outcome is LaunchState.PENDING

    @property
    def is_renewed(self) -> bool:
        """Whether workers that it loses are replaced."""
        return self.replacements is not None and self.replacements.on

    @property
    def hoped(self) -> int:
        """For how many workers somebody waits."""
        return max(self._hopes, default=0)

    @property
    def walltime(self) -> float | None:
        """For how long its jobs may run, if its options say so."""
        return self.plan.walltime

    @property
    def cancelled(self) -> bool:
        """Whether the launch was cancelled."""
        return self.outcome is LaunchState.CANCELLED

    def begin(self) -> None:
        """Listen for workers and let the manager start them. `wait` raises the errors."""
        if self.expected == 0 and self.settings.adapt is None:
            self.outcome = LaunchState.RUNNING
            return
        self.node.start()
        if self.replacements is not None:
            self.replacements.expect()
        for world in () if self.on_network else self.worlds[:1]:  # elsewhere it starts with a world
            world.set_clock()
        try:
            self._make_room()
            for world in self.worlds:
                world.prepare()
            if self.kept is not None:
                self.kept.start(self)
            else:
                (world,) = self.worlds
                assert isinstance(world, OwnWorld)
                world.start_own()
        except Exception as exc:
            self.fail(exc)
        except BaseException as exc:  # Ctrl-C
            self.fail(exc)
            raise
        if not self.worlds:  # adapt=(0, hi): none is called for yet
            self.changed()

    def _make_room(self) -> None:
        """Refuse more workers than this process may have connections to."""
        workers = self.expected or 0
        lacking = make_room(workers + _FILES_OF_A_WORLD * len(self.worlds))
        if lacking:
            raise LaunchError(
                f"{workers:,} workers need {lacking:,} more open files than process 1 may have",
                phase="start",
                fix="The hard limit stands in the way: see `ulimit -Hn`, and ask for a higher one.",
            )

    def background(self, fn: Callable[[], object]) -> None:
        """Run something that may block on a thread of its own."""

        def run() -> None:
            try:
                with self.leash.held():
                    fn()
            except Exception as exc:  # the edge of a thread: the waiters get it
                self.fail(exc)
            finally:
                self._under_way.discard(run)

        self._under_way.add(run)
        self.node.turns.background(run)

    def every(self, fn: Callable[[], float]) -> None:
        """Call something on a background thread again and again, until the launch is over.

        It returns in how many seconds it is to be called again. Its error fails a launch that is
        still pending; later it is told, and the calls go on.
        """

        def run() -> None:
            if not self.goes_on:
                return
            try:
                pause = fn()
            except Exception as exc:
                if self.pending:
                    raise
                _log.log("warning", f"the jobs could not be looked after: {exc}; trying again")
                pause = _AFTER_ERROR
            self.node.progress.call_later(pause, again)

        def again() -> None:
            if self.goes_on:
                self.background(run)

        again()

    @property
    def goes_on(self) -> bool:
        """Whether workers are to come, or are there."""
        living = not all(world.closed for world in self.worlds)
        return self.pending or (self.outcome is LaunchState.RUNNING and (living or self.is_renewed))

    def fail(
        self,
        what: BaseException | str,
        phase: str = "",
        tail: Sequence[str] = (),
        world: World | None = None,
    ) -> None:
        """Give the launch up; its waiters get the reason."""
        if world is not None and world.renews and self.replacements is not None:
            self.replacements.failed(world, what)
            return
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
        self.error = self._error(what, phase, tail, world)
        if self.replacements is not None:
            self.replacements.end()
        self._abandon()
        self.changed()

    def _error(
        self,
        what: BaseException | str,
        phase: str = "",
        tail: Sequence[str] = (),
        world: World | None = None,
    ) -> LaunchError:
        found = world or next(iter(self.worlds), None)
        if found is None:  # adapt=(0, hi), and none was called for
            return LaunchError(str(what), phase=phase)
        return launch_error(found, what, phase, tail)

    def _can_do_without(self, world: World) -> bool:
        """Tell whether `min_workers` can be met without a world."""
        least = self.settings.min_workers
        if least is None or len(self.worlds) < 2:
            return least is not None and len(self.pids) >= least
        others = [w for w in self.worlds if w is not world and not w.closed]
        return sum(w.expected or 0 for w in others) >= least

    def changed(self) -> None:
        """Wake all who wait for this launch: its state may have changed."""
        with self._roster.lock:
            if self.jobs_of is not None and all(world.up for world in self.worlds):
                self.reason = self.estimated_start = None
            settled = self.pending and all(map(self._needs_no_watch, self.worlds))
            missed = self._conclude() if settled else []
        for failure in missed:
            _log.log("warning", f"workers are missing: {failure}")
        if self.replacements is not None:
            if settled and self.outcome is LaunchState.RUNNING:
                self.replacements.begin(self.worlds)
            self.replacements.look()
        for slot in list(self._slots):
            self.node.complete(slot)

    def _needs_no_watch(self, world: World) -> bool:
        """Tell whether a world is settled, or is the job of one that adapts and is on its way."""
        return world.settled or (self.settings.adapt is not None and world.job is not None)

    def _conclude(self) -> list[LaunchError]:
        """Decide, once no more workers will come. Returns the failures that it can do without."""
        failures = [world.failure for world in self.worlds if world.failure is not None]
        least = self.settings.min_workers
        if not failures or (least is not None and len(self.pids) >= least):
            self.outcome = LaunchState.RUNNING
            return failures
        self.error = together(failures, len(self.worlds), self.pids)
        self.outcome = LaunchState.FAILED
        return []

    def exchange(self, come: Sequence[World], gone: Sequence[World]) -> None:
        """Count worlds among the launch's that replace others, and others no more."""
        self._past += [job_record(world) for world in gone if world.job is not None]
        self.worlds = [*(world for world in self.worlds if world not in gone), *come]

    def end_renewing(self, error: LaunchError) -> None:
        """Take note that nothing can be started any more in place of what was lost."""
        with self._roster.lock:
            if self.outcome is not LaunchState.RUNNING:
                return
            self.outcome, self.error = LaunchState.FAILED, error
        for world in self.worlds:
            world.abandon()

    def close(self) -> None:
        """End what is left of its worlds."""
        for world in self.worlds:
            world.close()

    def end_jobs(self) -> None:
        """Let the scheduler end the jobs that do not end by themselves. May take a while."""
        if self.jobs_of is not None and not self._have_ended():
            with self.leash.held():
                self.jobs_of.cancel_jobs(self)
            for world in self.worlds:
                world.forget()

    def ended(self) -> bool:
        """Tell whether nothing of this launch is left.

        What is under way in the background may have started a process that no world knows yet.
        """
        return not self._under_way and self._have_ended()

    def _have_ended(self) -> bool:
        return all(world.ended() for world in self.worlds)

    def over(self) -> bool:
        """Tell whether it has come to nothing, or all that came of it has ended."""
        settled = self.outcome is not LaunchState.PENDING and not self.is_renewed
        return settled and self.ended() and all(world.closed for world in self.worlds)

    def _decide(self, outcome: LaunchState) -> bool:
        with self._roster.lock:
            if self.outcome is not LaunchState.PENDING:
                return False
            self.outcome = outcome
        return True

    def _abandon(self) -> None:
        for world in self.worlds:
            world.abandon()
        if self.jobs_of is None:
            self.leash.limit = 0.0
            self.leash.cut()
        else:
            self.node.turns.background(self.end_jobs)


def _show(text: str) -> None:
    """Show one line on the terminal in place of the one before."""
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()
