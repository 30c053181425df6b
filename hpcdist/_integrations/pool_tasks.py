"""The tasks of a `Pool`: those of an executor, all of which can be ended at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, starmap
from typing import Any

from hpcdist._errors import ProcessExitedException
from hpcdist._integrations import mapping
from hpcdist._integrations.executor import Executor
from hpcdist._integrations.pool_results import Terminated
from hpcdist._integrations.tasks import Task
from hpcdist._runtime.node import Node
from hpcdist._wire.messages import CancelCall, InterruptCall


class PoolTasks(Executor):
    """The executor behind a pool."""

    has_ended = False

    @property
    def node(self) -> Node:
        """The process that they are of."""
        return self._node

    def end(self) -> None:
        """End all tasks: those that run are interrupted."""
        with self._lock:
            self.has_ended = True
            self._is_shut_down = True
            waiting, self._queue = list(self._queue), deque()
            flying = [task for lane in self._lanes.values() for task in lane.tasks]
        for task in flying:
            self._end_call(task)
        for task in chain(waiting, flying):
            task.future.fail(Terminated())

    def count_workers(self) -> int:
        """Return how many workers may run tasks now."""
        wanted = self._wanted()
        with self._lock:
            return max(1, len(self._workers(wanted)))

    def _end_with_program(self) -> None:
        self.end()  # as the processes of a pool of multiprocessing's end with the program

    def _send(self, pid: int, task: Task) -> None:
        super()._send(pid, task)
        if self.has_ended:  # meanwhile
            self._end_call(task)

    def _requeue(self, task: Task) -> None:
        if not self.has_ended:
            super()._requeue(task)

    def _end_call(self, task: Task) -> None:
        """End a task on its worker, whether it has started or not."""
        call, node = task.call, self._node
        if call is None or call.done():
            return
        try:
            if call.where == node.me:
                call.cancel()
            else:
                node.request(call.where, CancelCall(call.key))  # the call itself says how it went
            node.send(call.where, InterruptCall(call.key))
        except ProcessExitedException:
            return
        node.progress.nudge()


# What the tasks of maps run


def run_items(f: Callable[[Any], Any], items: Sequence[Any], start: int) -> Any:
    """Call a function for some items of a map; return the results, or what awaits them."""
    return mapping.collected(map(f, items), lambda k: items[k], start)


def run_tuples(f: Callable[..., Any], items: Sequence[Iterable[Any]], start: int) -> Any:
    """Call a function for some items of a map, each of which is all its arguments."""
    return mapping.collected(starmap(f, items), lambda k: items[k], start)
