"""The cells of launches: what befalls a worker before it has joined."""

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hpcdist
from benchmarks.crashes import victim
from benchmarks.crashes.at_start import PLACE
from benchmarks.crashes.matrix import Cell
from benchmarks.crashes.stage import LATE, Wrong, empty_disk, fill_disk, keeper_above
from benchmarks.crashes.waits import Wait
from hpcdist import LaunchError, ProcessExitedException, remotecall_fetch

_SIGNALS = {"SIGKILL", "SIGSEGV", "SIGTERM", "SIGSTOP"}
# Seconds that a launch has with a worker that is stopped: nothing but the time tells of it. Where
# that is too short for any worker to come so far, as on a loaded machine, it is tried with more.
_TIMEOUTS = (5.0, 20.0, 60.0)


class Start:
    """A launch of two, of which one does not come up, while another worker goes on."""

    def __init__(
        self,
        cell: Cell,
        rng: random.Random,
        far: int,
        launch: Callable[[float], list[int]],
    ) -> None:
        self.cell, self.far = cell, far
        self.folder = Path(tempfile.mkdtemp(prefix="cell-", dir=os.environ["CRASH_FOLDER"]))
        self.faults: list[str] = []
        self._launch = launch
        self._before = hpcdist.workers()
        self._seconds: float | None = None
        self._place = cell.moment if rng.random() < 0.5 else f"{cell.moment}-late"

    def play(self) -> None:
        """Start, let it happen, and judge."""
        cause = self.cell.cause
        over = self.folder / "over"
        busy = hpcdist.remotecall(victim.busy_until, self.far, str(over))
        self._enter_environment()
        try:
            adding, os_pid, parent = self._begin()
            begin = time.monotonic()
            if cause == "disk":
                fill_disk()
            if cause in _SIGNALS and self.cell.way != "slurm":
                os.kill(os_pid, getattr(signal, cause))
            if cause == "keeper":
                os.kill(keeper_above(parent), signal.SIGKILL)
            (self.folder / "go").touch()
            adding.join(3 * LATE)
            self._seconds = adding.ended_at - begin
        finally:
            del os.environ[PLACE]
            if cause == "disk":
                empty_disk()
        self._judge(adding)
        over.touch()
        if busy.fetch(timeout=LATE) != "undisturbed":
            self.faults.append("another worker was disturbed")
        again = Wait("the next launch", lambda: self._launch(60.0))
        if not again.join(90) or again.error is not None:
            self.faults.append(str(again))
            return
        if [remotecall_fetch(hpcdist.myid, pid) for pid in again.value] != again.value:
            self.faults.append("the next workers do not answer")
        hpcdist.rmprocs(again.value)

    def _enter_environment(self) -> None:
        os.environ[PLACE] = f"{self._place}:{self.cell.cause}:{self.folder}"

    def _begin(self) -> tuple[Wait, int, int]:
        """Launch, until a worker has come to the place; return its number, and its parent's."""
        for timeout in _TIMEOUTS if self.cell.cause == "SIGSTOP" else (60.0,):
            adding = Wait("addprocs", lambda timeout=timeout: self._launch(timeout))  # type: ignore[misc]
            while not adding.ended and not (self.folder / "pid").exists():
                time.sleep(0.002)
            if (self.folder / "pid").exists():
                os_pid, parent = map(int, (self.folder / "pid").read_text().split())
                return adding, os_pid, parent
        raise Wrong(f"no worker came to the place: {adding}")

    def _judge(self, adding: Wait) -> None:
        if not adding.ended:
            self.faults.append(f"addprocs: no end within {3 * LATE:g} s")
            return
        came_up: list[int] = []
        if isinstance(adding.error, LaunchError):
            came_up = adding.error.pids
            if not str(adding.error).strip():
                self.faults.append("the error says nothing")
        elif adding.error is None and self.cell.cause in ("memory", "disk"):
            came_up = adding.value  # there was room enough
        else:
            self.faults.append(str(adding))
        died = []
        for pid in came_up:
            try:
                remotecall_fetch(hpcdist.myid, pid)
            except ProcessExitedException as exc:
                died.append(str(exc))
        if len(died) > (self.cell.cause in ("memory", "disk")):  # the room may not last
            self.faults.append(f"do not answer: {died}")
        if not died and sorted(hpcdist.workers()) != sorted({*self._before, *came_up}):
            self.faults.append(f"workers() is {hpcdist.workers()}, {came_up} had come up")
        hpcdist.rmprocs(came_up)

    def slowest(self) -> float | None:
        """Return how long after the act the launch ended."""
        return self._seconds

    def close(self) -> None:
        """Remove what was made."""
        shutil.rmtree(self.folder, ignore_errors=True)
