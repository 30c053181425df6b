"""The workers of one cell, a victim and three others; what befalls it, and what is judged."""

import itertools
import operator
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hpcdist
from benchmarks.crashes import victim
from benchmarks.crashes.matrix import DEADLY, ERRORS, Cell
from benchmarks.crashes.waits import Repeated, Wait, deaths, is_of
from hpcdist import Future, ProcessExitedException, RemoteChannel, remotecall, remotecall_fetch
from hpcdist._keeper.processes import stat_of

LATE = 60.0  # seconds after which a wait is taken for lost
_SIGNALS = {"SIGKILL", "SIGSEGV", "SIGTERM", "SIGSTOP"}
_WORDS = {
    "SIGKILL": ("SIGKILL", "signal 9", "9:"),
    "SIGSEGV": ("SIGSEGV", "signal 11"),
    "SIGTERM": ("SIGTERM", "signal 15"),
    "os._exit": ("7",),
    "MPI_Abort": ("MPI_Abort", "7"),
}


class Wrong(Exception):
    """What a cell has found that ought not to be."""


class Stage:
    """What one cell needs, from the workers to what is found."""

    def __init__(self, cell: Cell, rng: random.Random, far: int, launch: Callable[[], list[int]]):
        self.cell = cell
        self.rng = rng
        self.far = far
        self.folder = Path(tempfile.mkdtemp(prefix="cell-", dir=os.environ["CRASH_FOLDER"]))
        self.faults: list[str] = []
        self.acted_at = 0.0
        self.waits: list[Wait] = []  # which end as the cause says
        self.others: list[Wait] = []  # which do not notice
        self.repeated: list[Repeated] = []
        self.removal: float | None = None
        pids = launch()
        self.victim, *self.near = pids
        self.may_go = {self.victim}
        if cell.cause == "keeper":
            self.may_go |= set(self.near)
        if cell.cause == "MPI_Abort" and cell.way != "process":
            self.may_go |= set(self.near)  # as its launcher sees fit
        self.os_pid = remotecall_fetch(victim.arm, self.victim, str(self.folder), self._own_act())
        self._keeper = keeper_above(self.os_pid) if cell.way != "slurm" else 0

    # --- what moments use

    def wait(self, what: str, call: Callable[[], Any], needs: Sequence[int] = ()) -> None:
        """Have a thread wait for what the victim owes."""
        self.waits.append(Wait(what, call, needs=(self.victim, *needs)))

    def repeat(
        self,
        what: str,
        operation: Callable[[], Any],
        right: Callable[[Any], bool] = lambda value: True,
        needs: Sequence[int] = (),
    ) -> None:
        """Have a thread do something with the victim again and again."""
        repeated = Repeated(operation, right)
        self.repeated.append(repeated)
        self.wait(what, repeated, needs)
        repeated.begun.wait(LATE)

    def until_here(self) -> None:
        """Wait until the victim says that the moment has come."""
        mark = self.folder / "here"
        if not _true_in_time(mark.exists):
            raise Wrong(f"the moment did not come: {[str(wait) for wait in self.waits]}")

    def a_moment(self, most: float) -> None:
        """Let some time pass, however much."""
        time.sleep(self.rng.uniform(0, most))

    # --- the act

    def _own_act(self) -> str:
        """Return what the victim does to itself."""
        cause = self.cell.cause
        return cause if self.cell.way == "slurm" or cause not in _SIGNALS else "signal"

    def act(self) -> None:
        """Let it happen."""
        cause = self.cell.cause
        if cause == "disk":
            fill_disk()
        self.acted_at = time.monotonic()
        if self.cell.way != "slurm" and cause in _SIGNALS:
            os.kill(self.os_pid, getattr(signal, cause))
        elif cause == "keeper":
            os.kill(self._keeper, signal.SIGKILL)
        else:
            (self.folder / "go").touch()

    # --- what is judged

    def bystanders(self) -> None:
        """Let others be at something that has nothing to do with the victim."""
        gate, there = RemoteChannel(1), RemoteChannel(1, self.far)
        self._gates = (gate, there)
        taking = remotecall(hpcdist.take, self.near[0], gate)
        self.others.append(
            Wait("a taker beside", taking.fetch, lambda v: v == "an item", [self.near[0]])
        )
        fetched = remotecall(hpcdist.take, self.near[1], there)
        self.others.append(
            Wait("a taker elsewhere", fetched.fetch, lambda v: v == "another", [self.near[1]])
        )
        end = remotecall(victim.busy_until, self.far, str(self.folder / "over"))
        self.others.append(Wait("a call elsewhere", end.fetch, lambda v: v == "undisturbed"))

    def always_waiting(self) -> None:
        """Let process 1 and others wait for what the victim owns, whatever it is at."""
        self.owed = Future(self.victim)
        self.kept = remotecall(victim.square, self.victim, 3)
        self.kept.fetch()
        self.unfetched = remotecall(victim.square, self.victim, 4)
        self.unfetched.wait()
        self.wait("an empty future", self.owed.fetch)
        for pid in (self.near[0], self.far):
            asked = remotecall(hpcdist.fetch, pid, self.owed)
            self.wait(f"an empty future, from worker {pid}", asked.fetch, [pid])

    def judge(self) -> None:
        """See what has become of all that waited, and what the others can still do."""
        cause = self.cell.cause
        if cause in DEADLY:
            self._judge_deaths()
        elif cause == "SIGSTOP":
            self._judge_stopped()
        else:
            self._judge_errors(ERRORS[cause])
        for repeated in self.repeated:
            repeated.enough.set()
        self._judge_others()
        self._judge_survivors()

    def slowest(self) -> float | None:
        """Return how long after the act the last of the waits ended."""
        if self.cell.cause == "SIGSTOP":
            return self.removal
        ends = [wait.ended_at - self.acted_at for wait in self.waits if wait.ended]
        return max([0.0, *ends]) if ends and self.acted_at else None

    def fault(self, text: str) -> None:
        """Note what ought not to be."""
        self.faults.append(text)

    def _all_ended(self, waits: Sequence[Wait]) -> None:
        end = time.monotonic() + LATE
        for wait in waits:
            if not wait.join(max(0.0, end - time.monotonic())):
                self.fault(f"{wait.what}: still waits after {LATE:g} s")

    def _judge_deaths(self) -> None:
        self._all_ended(self.waits)
        for wait in self.waits:
            told = deaths(wait.error)
            if wait.ended and not (told and told <= self.may_go) and not self._is_leaving(wait):
                self.fault(str(wait))
        self._judge_reason()
        if self.kept.fetch() != 9:
            self.fault("a fetched value is lost")
        self._raises_death("an unfetched future", self.unfetched.fetch)
        self._raises_death("a call to the dead", lambda: remotecall(os.getpid, self.victim))
        if not _true_in_time(lambda: self.victim not in hpcdist.workers()):
            self.fault("the victim is still listed")

    def _is_leaving(self, wait: Wait) -> bool:
        """Tell whether a wait has ended as it may for a worker that leaves."""
        if self.cell.moment != "rmprocs":
            return False
        if wait.what == "its removal":
            return wait.error is None
        return isinstance(wait.error, KeyboardInterrupt)

    def _judge_reason(self) -> None:
        if self.cell.moment == "rmprocs":
            return  # it was "removed"
        words = _WORDS.get(self.cell.cause, ())
        death = None

        def told() -> bool:
            nonlocal death
            try:
                remotecall(os.getpid, self.victim)
            except ProcessExitedException as exc:
                death = exc
                return not words or any(word in exc.why for word in words)
            return False

        if not _true_in_time(told, 10.0):
            self.fault(f"the reason of the death is not told: {death and death.why!r}")

    def _raises_death(self, what: str, call: Callable[[], Any]) -> None:
        try:
            value = call()
        except ProcessExitedException as exc:
            if exc.pid not in self.may_go:
                self.fault(f"{what}: names {exc.pid}")
        except Exception as exc:
            self.fault(f"{what}: {exc!r:.200}")
        else:
            self.fault(f"{what}: {value!r:.100}")

    def _judge_stopped(self) -> None:
        for what, call in (
            ("a fetch with a timeout", lambda: self.owed.fetch(timeout=0.2)),
            (
                "a call with a timeout",
                lambda: remotecall(os.getpid, self.victim).fetch(timeout=0.2),
            ),
        ):
            try:
                call()
            except TimeoutError:
                continue
            except Exception as exc:
                if self.cell.moment != "rmprocs":
                    self.fault(f"{what}: {exc!r:.200}")
                continue
            self.fault(f"{what}: came")
        if self.cell.moment != "rmprocs":
            states = {row.pid: row.state for row in hpcdist.status()}
            if states.get(self.victim) != "STOPPED":
                self.fault(f"status() says {states.get(self.victim)}")
            still = [wait for wait in self.waits if wait.ended]
            self.faults += [f"ended too early: {wait}" for wait in still]
        begin = time.monotonic()
        try:
            hpcdist.rmprocs(self.victim, waitfor=LATE)
        except TimeoutError:
            self.fault(f"rmprocs: not within {LATE:g} s")
        self.removal = time.monotonic() - begin
        if self.removal > 15:
            self.fault(f"rmprocs: {self.removal:.1f} s")
        self._judge_deaths()

    def _judge_errors(self, kind: type[Exception]) -> None:
        if self.cell.moment == "idle":
            self.repeat("the next calls", lambda: remotecall_fetch(victim.probe, self.victim))
        own = [w for w in self.waits if not w.what.startswith(("an empty future", "a taker"))]
        if self.cell.moment == "rmprocs":
            self._all_ended(own)
            return
        for wait in own:
            if not wait.join(LATE):
                self.fault(f"{wait.what}: still waits after {LATE:g} s")
                continue
            lost = deaths(wait.error)
            if self.cell.cause in ("memory", "disk") and lost and lost <= self.may_go:
                continue  # no room even for its error: it has ended with a word
            if not is_of(wait.error, kind):
                self.fault(str(wait))
        self._mend()
        rest = [wait for wait in self.waits if wait not in own]
        if self.victim not in hpcdist.workers():
            self._all_ended(rest)
            return
        self.owed.put("late")
        if hasattr(self, "channel"):
            for _ in range(4):
                self.channel.put("late")
        self._all_ended(rest)
        for wait in rest:
            told = deaths(wait.error)
            if wait.value != "late" and not (told and told <= self.may_go & wait.needs):
                self.fault(str(wait))

    def _mend(self) -> None:
        if self.cell.cause == "disk":
            empty_disk()
        try:
            remotecall(victim.mend, self.victim).fetch(timeout=LATE)
        except (ProcessExitedException, TimeoutError) as exc:
            if self.cell.cause not in ("memory", "disk") or isinstance(exc, TimeoutError):
                self.fault(f"the victim does not answer afterwards: {exc!r:.200}")

    def _judge_others(self) -> None:
        gone = set(self.near) - set(hpcdist.workers())
        if not gone <= self.may_go:
            self.fault(f"workers {sorted(gone)} have ended, too")
        (self.folder / "over").touch()
        for gate, item in zip(self._gates, ("an item", "another"), strict=True):
            gate.put(item, timeout=LATE)
        self._all_ended(self.others)
        for wait in self.others:
            if wait.ended and wait.error is not None:
                told = deaths(wait.error)
                if not told or not told <= self.may_go or not told <= wait.needs:
                    self.fault(f"noticed: {wait}")
            elif wait.ended and not wait.right(wait.value):
                self.fault(f"noticed: {wait}")
        for gate in self._gates:
            gate.free()

    def _judge_survivors(self) -> None:
        begun = time.monotonic()
        while (error := self._error_of_survivors()) is not None:
            told = deaths(error)  # of those that go with the victim, and only a moment later
            if not told or not told <= self.may_go or time.monotonic() > begun + LATE:
                self.fault(f"the survivors: {type(error).__name__}: {error}")
                return
            time.sleep(0.05)

    def _error_of_survivors(self) -> BaseException | None:
        living = set(hpcdist.workers())
        near = [pid for pid in self.near if pid in living]
        if self.cell.cause in ERRORS and self.victim in living:
            near.append(self.victim)
        done = Wait("the survivors", lambda: self._survive(sorted([*near, self.far]), sorted(near)))
        if not done.join(2 * LATE):
            return TimeoutError(f"they do not map and reduce within {2 * LATE:g} s")
        return done.error

    def _survive(self, pids: list[int], near: list[int]) -> None:
        pool = hpcdist.WorkerPool(pids)
        items = range(60)
        if hpcdist.pmap(victim.square, items, pool=pool) != [x * x for x in items]:
            raise Wrong("a map is wrong")
        if hpcdist.reduce(operator.add, hpcdist.myid, pids=pids) != sum(pids):
            raise Wrong("a sum is wrong")
        for one, other in itertools.pairwise(pids):
            if remotecall_fetch(remotecall_fetch, one, hpcdist.myid, other) != other:
                raise Wrong("a call from worker to worker is wrong")
        value = hpcdist.bcast(victim.Part(bytes(victim.MB)), pids=pids)
        for pid in pids:
            if remotecall_fetch(victim.length, pid, value) != victim.MB:
                raise Wrong("a broadcast is wrong")
        value.free()
        together = len(near) > 1 and self.cell.way != "process"
        if together and hpcdist.spmd(victim.total, pids=near, grace=5) != [sum(near)] * len(near):
            raise Wrong("a section is wrong")

    def close(self) -> None:
        """Remove the workers of this cell, and all that it has made."""
        if self.cell.cause == "disk":
            empty_disk()
        left = [pid for pid in (self.victim, *self.near) if pid in hpcdist.workers()]
        removed = Wait("rmprocs", lambda: hpcdist.rmprocs(left))
        if not removed.join(LATE):
            self.fault("rmprocs of the survivors does not end")
        elif removed.error is not None:
            self.fault(str(removed))
        for pool in (self.waits, self.others):
            pool.clear()
        self.owed = self.kept = self.unfetched = None
        shutil.rmtree(self.folder, ignore_errors=True)


def _true_in_time(look: Callable[[], bool], timeout: float = LATE) -> bool:
    end = time.monotonic() + timeout
    while not look():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def keeper_above(os_pid: int) -> int:
    """Return the process of the line from here to another that this process has started."""
    while (status := stat_of(os_pid)) is not None and status.parent not in (os.getpid(), 0):
        os_pid = status.parent
    return os_pid


# --- the disk -------------------------------------------------------------------------------------


def fill_disk() -> None:
    """Leave no room where hpcdist and MPI put files; both are this run's own, and small."""
    for top in (os.environ["TMPDIR"], "/dev/shm"):
        with open(os.path.join(top, "full"), "wb", buffering=0) as file:
            try:
                while file.write(bytes(victim.MB)):
                    pass
            except OSError:
                pass
            try:
                while file.write(bytes(512)):
                    pass
            except OSError:
                pass


def empty_disk() -> None:
    """Give the room back."""
    for top in (os.environ["TMPDIR"], "/dev/shm"):
        Path(top, "full").unlink(missing_ok=True)
