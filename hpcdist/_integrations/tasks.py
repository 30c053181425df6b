"""The tasks of an executor: how many are on their way to each worker, and which come back.

A worker that has finished one short task finds the next ones there already. No task is to wait
behind a long one while another worker is free: then the executor takes back what has not started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from hpcdist._integrations.waiting import TaskFuture
from hpcdist._maps.fitting import Fitting
from hpcdist._remote.futures import Future as RemoteFuture
from hpcdist._runtime.node import Node

AHEAD = 0.005  # seconds of work that are on their way to a worker
PATIENCE = 0.02  # a task that runs for longer is a long one
_OVERRUN = 0.2  # after this long what waits behind goes elsewhere, even if all others are busy
_LEAST, _MOST = 2, 64  # tasks that are on their way to a worker, if they are short
_KINDS_MOST = 256
_REST, _REST_MOST = 0.02, 0.5


class Task:
    """A call that has not ended."""

    __slots__ = (
        "args", "call", "fitting", "fn", "future", "index", "is_asked", "is_started", "item",
        "kind", "kwargs", "losses", "serial",
    )  # fmt: skip

    def __init__(
        self,
        node: Node,
        fn: Any,
        args: Any,
        kwargs: Any,
        index: int | None = None,
        item: tuple[Any, ...] = (),
        kind: object = None,
    ) -> None:
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.index = index  # its place in a map
        self.item = item  # what the function gets in a map
        self.kind = kind or fn  # the user's function
        self.future = TaskFuture(node)
        self.fitting: Fitting | None = None  # what the items of its map take
        self.serial = 0  # its place among all tasks of its executor
        self.call: RemoteFuture[Any] | None = None
        self.is_started = False  # its future says "running"
        self.is_asked = False  # it is to come back, if it has not started
        self.losses = 0  # how often its worker died before it had begun


class Pace:
    """How long the tasks of each function take, and so how many of them are sent ahead."""

    def __init__(self) -> None:
        self._seconds: dict[Any, float] = {}

    def depth(self, task: Task) -> int:
        """Tell how many tasks may be on their way to a worker, if the next is this one.

        A task of which nothing is known may be long: nothing waits behind it, and it behind none.
        """
        seconds = self._seconds.get(kind_of(task))
        if seconds is None or seconds > PATIENCE:
            return 1
        return int(min(max(AHEAD / max(seconds, 1e-6), _LEAST), _MOST))

    def seconds(self, task: Task) -> float | None:
        """Tell how long a task may take; None: nothing is known of it."""
        return self._seconds.get(kind_of(task))

    def note(self, task: Task, took: float) -> None:
        """Learn from a task that ran."""
        kind = kind_of(task)
        old = self._seconds.get(kind)
        if old is None and len(self._seconds) >= _KINDS_MOST:
            del self._seconds[next(iter(self._seconds))]
        # One long task says that others may be; short ones have to say it again and again.
        self._seconds[kind] = took if old is None or took > 4 * old else (took + old) / 2


def kind_of(task: Task) -> Any:
    """Return the user's function: tasks of the same function take about as long."""
    fn = task.kind
    while isinstance(fn, partial):
        fn = fn.func
    code = getattr(fn, "__code__", None)
    return code if code is not None else getattr(fn, "__qualname__", type(fn))


def one(args: tuple[object, ...]) -> Any:
    """Give an item as the user knows it: not as a tuple, if there is one argument."""
    return args[0] if len(args) == 1 else args


class Lane:
    """A worker, as an executor sees it."""

    __slots__ = ("_rest", "_rests_until", "_since", "tasks")

    def __init__(self) -> None:
        self.tasks: list[Task] = []  # on their way, or running: the oldest first
        self._since = 0.0  # when the oldest became the one that runs
        self._rests_until = 0.0
        self._rest = _REST

    def has_room(self, now: float, depth: int = 1) -> bool:
        """Tell whether another task may be sent, if so many may be on their way."""
        if not self.tasks:
            return now >= self._rests_until
        return len(self.tasks) < depth and not self.is_long(now)

    def is_long(self, now: float) -> bool:
        """Tell whether the oldest task is a long one."""
        return bool(self.tasks) and now - self._since > PATIENCE

    def add(self, task: Task, now: float) -> None:
        """Take note of a task that is sent."""
        if not self.tasks:
            self._since = now
        self.tasks.append(task)

    def drop(self, task: Task, now: float) -> None:
        """Forget a task that was not run."""
        if task in self.tasks:
            if task is self.tasks[0]:
                self._since = now
            self.tasks.remove(task)

    def came_back(self, task: Task, now: float) -> None:
        """Take note of a task that had not started, if none had: the worker does something else."""
        idle = task is self.tasks[0] if self.tasks else False
        self.drop(task, now)
        if idle and not self.tasks:
            self._rests_until = now + self._rest
            self._rest = min(2 * self._rest, _REST_MOST)

    def ended(self, task: Task, pace: Pace, now: float) -> float | None:
        """Take note of a task that ran; return how long it took, if that is known."""
        if task not in self.tasks:
            return None
        took = None
        if task is self.tasks[0]:
            took = self.age(now)
            pace.note(task, took)
            self._since = now
        self.tasks.remove(task)
        self._rest = _REST
        return took

    def age(self, now: float) -> float:
        """Return for how long the oldest has run."""
        return now - self._since

    def to_recall(self, now: float, is_hungry: bool) -> list[Task]:
        """Choose the tasks to take back.

        Args:
            now: The time.
            is_hungry: Whether a worker is free and has nothing else to do.
        """
        if not self.is_long(now):
            return []
        first = 0 if is_hungry else 1  # even the oldest: its worker may do something else
        if not is_hungry and now - self._since < _OVERRUN:
            return []
        found = self.tasks[first:]
        return [task for task in found if not task.is_asked and task.call is not None]


class Step(NamedTuple):
    """What to send next, and to whom."""

    pid: int
    task: Task | None = None
    prepare: bool = False  # the worker is to be initialised first


NOBODY = Step(0)  # there is nobody left to send to


def put_back(queue: deque[Task], task: Task) -> None:
    """Put a task back where it was in the queue."""
    earlier: list[Task] = []
    while queue and queue[0].serial < task.serial:
        earlier.append(queue.popleft())
    queue.appendleft(task)
    queue.extendleft(reversed(earlier))


def shortest(lanes: dict[int, Lane], now: float, depth: int) -> int:
    """Choose the worker with the fewest tasks on their way; 0 if none may get another."""
    free = [pid for pid, lane in lanes.items() if lane.has_room(now, depth)]
    return min(free, key=lambda pid: len(lanes[pid].tasks), default=0)


def to_recall(lanes: Sequence[Lane], now: float, is_queue_empty: bool) -> list[Task]:
    """Choose the tasks to take back from all workers."""
    if len(lanes) < 2:
        return []
    is_hungry = is_queue_empty and any(not lane.tasks and lane.has_room(now) for lane in lanes)
    return [task for lane in lanes for task in lane.to_recall(now, is_hungry)]


def may_change(lanes: Sequence[Lane], is_queue_empty: bool) -> bool:
    """Tell whether, as time passes, tasks are to be taken back or a worker gets some again."""
    if len(lanes) < 2:
        return False
    if any(not lane.tasks for lane in lanes):
        if not is_queue_empty:
            return True
        return any(not task.is_asked for lane in lanes for task in lane.tasks)
    return any(not task.is_asked for lane in lanes for task in lane.tasks[1:])
