"""What the tasks of an executor take, beside what is left of their workers' jobs.

As for maps (`_maps/fitting`): no task goes to a worker whose job ends sooner. Items of a map that a
job's end has cut off run again. What was submitted by itself does not: its caller may not want it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcdist._errors import ProcessExitedException
from hpcdist._integrations.tasks import Lane, Task, kind_of
from hpcdist._maps.fitting import Fitting
from hpcdist._runtime.node import Node

_KINDS_MOST = 256


class Endings:
    """The ends of workers' jobs, as the tasks of one executor meet them.

    Args:
        node: The process of the executor.
        duration: What a task takes, in seconds, if the user says so.
    """

    def __init__(self, node: Node, duration: float | None) -> None:
        self._members = node.members
        self._date = node.machine.time
        self._duration = duration
        self._by_kind: dict[Any, Fitting] = {}
        self.left_out = False  # some workers that are free, as their time is short

    def of_map(self, duration: float | None, chunksize: int, pids: Sequence[int]) -> Fitting:
        """Make what the tasks of one map have in common.

        Args:
            duration: What an item takes.
            chunksize: How many items a task has.
            pids: The workers that there are.

        Raises:
            ValueError: None of their jobs is long enough.
        """
        seconds = self._duration if duration is None else duration * chunksize
        made = Fitting(self._members, self._date, seconds)
        why = made.fits_nowhere(pids or list(self._members.living))
        if why is not None:
            raise ValueError(why)
        return made

    def with_time(self, task: Task, lanes: dict[int, Lane]) -> dict[int, Lane]:
        """Return those workers that have time for a task, behind what they have already."""
        self.left_out = False
        if not self._members.ends:
            return lanes
        fitting, draining = self._of(task), self._members.draining
        found = {}
        for pid, lane in lanes.items():
            busy = len(lane.tasks)
            if fitting.has_time(pid, busy) and fitting.may_run(task.serial, 1, pid):
                found[pid] = lane
                draining.discard(pid)
            elif not busy:
                draining.add(pid)
                self.left_out = True
        return found

    def note(self, task: Task, seconds: float) -> None:
        """Take note of what a task has taken."""
        self._of(task).note(seconds)

    def fate(
        self, task: Task, pid: int, seconds: float, error: ProcessExitedException
    ) -> ProcessExitedException | None:
        """Say what becomes of a task whose worker has ended while it ran it.

        Args:
            task: The task.
            pid: The worker.
            seconds: How long it had run.
            error: What has become of the worker.

        Returns:
            None if it runs again, as the end of the job is to blame; else its error.
        """
        fitting = task.fitting
        if fitting is None:
            return error
        fitting.note_death(pid)
        if not fitting.excuses(pid):
            return error
        what = "the task" if task.index is None else f"item {task.index}"
        why = fitting.cut_off(task.serial, what, pid, seconds)
        if why is None:
            return None
        return error.copy(f"{error.why}; {why}")

    def _of(self, task: Task) -> Fitting:
        if task.fitting is not None:
            return task.fitting
        kind = kind_of(task)
        found = self._by_kind.get(kind)
        if found is None:
            if len(self._by_kind) >= _KINDS_MOST:
                del self._by_kind[next(iter(self._by_kind))]
            found = Fitting(self._members, self._date, self._duration)
            self._by_kind[kind] = found
        return found
