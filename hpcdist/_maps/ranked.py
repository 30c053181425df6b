"""Maps with `ranks=`: each item is a task of several ranks, and process 1 finds the workers.

The engine keeps as many tasks under way as there is room for, and a few more, which wait at process
1: so a set of workers that becomes free has its next task at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import CoroutineType
from typing import Any, NamedTuple

from hpcdist._collective.function_packing import FunctionPacking, Shipped
from hpcdist._collective.section_members import SectionMembers
from hpcdist._collective.spmd import SectionCall, SectionCalls, SectionTerms
from hpcdist._errors import CompositeException, ProcessExitedException, RemoteException
from hpcdist._items.random_numbers import Streams
from hpcdist._maps.backlog import NEVER, Retries
from hpcdist._maps.blame import item_of, name_unpicklable
from hpcdist._maps.demand import Want
from hpcdist._maps.engine import Engine
from hpcdist._maps.lanes import is_alive
from hpcdist._maps.map_worker import Work
from hpcdist._maps.sources import Part, Source
from hpcdist._maps.terms import Terms
from hpcdist._maps.under_way import Maps
from hpcdist._remote.calls import Calls
from hpcdist._remote.futures import Future
from hpcdist._runtime.node import here

_AHEAD = 2  # tasks that wait at process 1
_LOOK_AGAIN = 0.5  # seconds: workers come in the place of others, or their jobs get more time


class Ran(NamedTuple):
    """What an item has given on rank 0."""

    value: Any
    seconds: float
    drew: bool  # it has asked for random numbers


class _Flight:
    """An item under way."""

    def __init__(self, part: Part, since: float, future: Future[Any]) -> None:
        self.part = part
        self.since = since
        self.future = future
        self.section: SectionCall | None = None  # none: `on_error` runs


class RankedEngine(Engine):
    """One map with `ranks=` under way.

    Args:
        maps: The maps of this process.
        work: What to do with each item.
        source: The items.
        terms: How it is to be run.
        retries: When a failed item is tried again.
        members: Gives the workers to use, each time it is asked.
        sink: Takes results: the index of the first, and the list.
        ranks: How many workers run an item.
    """

    def __init__(
        self,
        maps: Maps,
        work: Work,
        source: Source,
        terms: Terms,
        retries: Retries,
        members: Callable[[], Sequence[int]],
        sink: Callable[[int, list[Any]], None],
        ranks: int,
    ) -> None:
        super().__init__(maps, work, source, terms._replace(unit=1), retries, members, sink)
        self._ranks = ranks
        self._flying: set[_Flight] = set()
        self._sections = self._node.service(SectionCalls)
        self._calls = self._node.service(Calls)
        self._packing = self._node.service(FunctionPacking)

    def begin(self) -> bool:
        """Begin: tasks of several ranks never run in the process that maps alone."""
        node, terms = self._node, self._terms
        node.start()
        if terms.patient and not self.backlog.is_empty:
            self._maps.demand.add(self)
            node.await_workers(terms.tag)
        self._maps.add(self)
        return True

    def want(self) -> Want:
        """Tell what of the map waits for workers. Any thread may ask."""
        flying, ranks = len(self._flying), self._ranks
        waiting = self.backlog.waiting(flying + 1)
        return Want(waiting * ranks, flying * ranks, self._fitting.mean, self._terms.tag)

    @property
    def workers(self) -> int:
        """How many workers it may use."""
        return len(self._living())

    def _is_flying(self) -> bool:
        return bool(self._flying)

    def _refresh(self) -> None:
        self._stale = False

    def end(self) -> None:
        """Give up what is under way: what has not begun never does."""
        flying, self._flying = self._flying, set()
        for flight in flying:
            if flight.section is not None:
                flight.section.withdraw()
        super().end()

    # Sending

    def _living(self) -> list[int]:
        return [pid for pid in self._members() if is_alive(pid, self._node)]

    def _fill(self) -> None:
        self._look_at = NEVER
        self.backlog.wake(self._now())
        living = self._living()
        pids = [pid for pid in living if self._fitting.has_time(pid, 0)]
        if len(pids) < self._ranks and self._waits_for_workers(living):
            self._look_at = self._now() + _LOOK_AGAIN
            return
        room = len(pids) // self._ranks + _AHEAD
        while len(self._flying) < room:
            part = self._take(room)
            if part is None or not self._start(part, pids):
                return

    def _waits_for_workers(self, living: Sequence[int]) -> bool:
        """Tell whether there may be enough workers later."""
        if self._flying or len(living) >= self._ranks:
            return True
        return self._terms.patient and self._node.members.awaits(self._terms.tag)

    def _take(self, room: int) -> Part | None:
        try:
            return self.backlog.take(1, room, lambda part: True)
        except BaseException as exc:  # the user's iterator: its error is this map's
            self._fail(exc, self._source.position)
            return None

    def _start(self, part: Part, pids: list[int]) -> bool:
        """Put an item on its way; tell whether the map can go on."""
        item = tuple(column[0] for column in part.columns)
        named = None if pids == sorted(self._node.members.living) else pids
        terms = SectionTerms(named, self._ranks, seed=self._terms.seed)
        try:
            args = (self._packing.ship(self.work.f), item, self._terms.seed, part.start)
            section = self._sections.prepare(run_item, args, {}, terms)
            self._repeats.look(part.start, part.columns, section.body)
        except Exception as exc:  # cannot be pickled: raised here, the others are unharmed
            name_unpicklable(exc, part, self.work.f)
            self._fail(exc, part.start)
            return False
        flight = self._take_off(part, section.future)
        flight.section = section
        try:
            section.enter()
        except ValueError as exc:  # no world has so many ranks
            self._flying.discard(flight)
            self._fail(self._last_death or exc, part.start)
            return False
        return True

    def _take_off(self, part: Part, future: Future[Any]) -> _Flight:
        flight = _Flight(part, self._now(), future)
        self._flying.add(flight)
        hook = partial(self.note, flight)
        if not future._hook(hook):
            hook()
        return flight

    # Filing what has happened

    def _file(self, what: Any) -> None:
        flight: _Flight = what
        if flight not in self._flying:
            return
        self._flying.discard(flight)
        part = flight.part
        try:
            ran = flight.future.fetch()
        except (RemoteException, CompositeException, ProcessExitedException) as exc:
            self._file_failure(flight, exc)
        except Exception as exc:  # the task was not run: no world has so many ranks any more
            if self._flying:  # what becomes of these says why
                self.backlog.put_later(self._now() + _LOOK_AGAIN, part)
            else:
                self._fail(self._last_death or exc, part.start)
        else:
            self.backlog.done += 1
            if isinstance(ran, Ran):
                self._fitting.note(ran.seconds)
                self.drew = self.drew or ran.drew
                ran = ran.value
            self._sink(part.start, [ran])

    def _file_failure(self, flight: _Flight, error: Exception) -> None:
        errors = error.exceptions if isinstance(error, CompositeException) else [error]
        deaths = [one for one in errors if isinstance(one, ProcessExitedException)]
        if deaths:
            self._file_member_death(flight, deaths[0])
            return
        raised = next(one for one in errors if isinstance(one, RemoteException))
        if flight.section is None or self.work.on_error is None:
            self._file_error(flight.part, error, raised.pid)
            return
        args = (self.work, raised.cause, item_of(flight.part), self._terms.seed, flight.part.start)
        try:
            self._take_off(flight.part, self._calls.remotecall(handle, raised.pid, args, {}))
        except Exception as exc:  # it is dead by now, or `on_error` cannot be pickled
            self._fail(exc, flight.part.start)

    def _file_member_death(self, flight: _Flight, error: ProcessExitedException) -> None:
        part = flight.part
        self._last_death = error
        self._fitting.note_death(error.pid)
        seconds = self._now() - flight.since
        if error.why == "removed" or self._may_rerun(part, seconds, error):
            self.backlog.put(part)


def run_item(shipped: Shipped, item: tuple[object, ...], seed: int, index: int) -> Any:
    """Run an item on a worker, as one rank of several."""
    f = FunctionPacking.here().unship(shipped)
    now = here.node.machine.now
    streams = Streams.of_item(seed, index, SectionMembers.here().rank_here())
    start = now()
    with streams:
        value = f(*item)
    if type(value) is CoroutineType:
        return _awaited(value, streams, start)
    return Ran(value, now() - start, streams.were_used)


async def _awaited(value: CoroutineType[Any, Any, Any], streams: Streams, start: float) -> Ran:
    with streams:
        result = await value
    return Ran(result, here.node.machine.now() - start, streams.were_used)


def handle(work: Work, error: Exception, item: object, seed: int, index: int) -> Any:
    """Let the user's `on_error` give a result, on the worker that failed."""
    with Streams.of_item(seed, index):
        return work.handled(error, item)
