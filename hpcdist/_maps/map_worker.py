"""Batches: the worker's side of `pmap`.

A batch is an ordinary call of `run` with a part of each collection. Its items wait in a deque
from which the running thread takes on the left. When the map wants them back (the batch overruns,
another worker is idle, the map has failed) a control takes them away on the right, on the
progress side, whatever the user's function does meanwhile: both ends are atomic, so an item is
either started or handed back.

A map with a checkpoint wants to have what is finished even if the next item of the batch takes
hours. So a batch that takes long hands its results over while it runs, each once; the report at
its end has the rest.

Each batch says on its map's board which of its items run. Writing costs too much for items of a
tenth of a microsecond, so these are entered a few at a time; an item of more than a fraction of a
millisecond is entered alone.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, repeat, starmap
from threading import Lock
from types import CoroutineType
from typing import Any, NamedTuple

from hpcdist import _errors
from hpcdist._collective.value_copies import ValueCopies
from hpcdist._items import item_names, random_numbers
from hpcdist._items.random_numbers import Streams
from hpcdist._maps.boards import LINE, Boards, place_of
from hpcdist._maps.kept_functions import Forgotten, KeptFunctions, Token, Unmapped, keep_shared
from hpcdist._remote.answers import PackedResult
from hpcdist._remote.calls import Calls
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._transport.router import Peer
from hpcdist._wire import codec, frames, messages, object_paths
from hpcdist._wire.messages import Forget, HandedOver, TakeBack, TakenBack

BUDGET = 0.005  # seconds of work an "auto" batch aims at
_ENTRY = 0.0002  # items of this much work together are entered on the board as one
_ENTRY_MOST = 64
_STEPS_MOST = 64
_HAND_OVER_EVERY = 0.25  # seconds


class Work:
    """What a map does to each item."""

    def __init__(
        self, f: Callable[..., Any], on_error: Callable[[Any], Any] | None, several: bool
    ) -> None:
        self.f = f
        self.on_error = on_error
        self.several = several  # several collections: an item is a tuple of arguments
        self.is_async = inspect.iscoroutinefunction(f)  # each batch asks

    def __reduce__(self) -> Any:
        return Work, (self.f, self.on_error, self.several)

    def guarded(self, *item: object) -> Any:
        """Run one item; its error is `on_error`'s."""
        try:
            return self.f(*item)
        except Exception as exc:
            return self.handled(exc, item if self.several else item[0])

    def handled(self, error: Exception, item: object) -> Any:
        """Let the user's `on_error` give a result in place of an error, which names its item."""
        assert self.on_error is not None
        item_names.name_item(error, random_numbers.index(), item)
        return self.on_error(error)

    def mapped(self, items: Iterator[Any]) -> Iterator[Any]:
        """Run items as they are asked for."""
        f = self.f if self.on_error is None else self.guarded
        return starmap(f, items) if self.several else map(f, items)

    async def awaited(self, item: Any) -> Any:
        """Run one item of a coroutine function."""
        try:
            return await (self.f(*item) if self.several else self.f(item))
        except Exception as exc:
            if self.on_error is None:
                raise
            return self.handled(exc, item)


class Order(NamedTuple):
    """What a worker is told of a batch. It travels as the plain tuple of its fields."""

    token: Token  # the name of the map's work; its first half is the process whose map this is
    ident: int  # the batch's number there
    unit: int  # how many items belong together: the batch ends early only between such groups
    columns: Sequence[Any]  # the same part of each collection
    seed: int  # of the map's random numbers
    start: int  # the index of the first item in the map
    early: bool  # results are to be handed over while the rest of the batch takes long


class Report(NamedTuple):
    """How a batch went, as its map is told. It travels as the plain tuple of its fields."""

    results: list[Any]  # of its first items; then perhaps an error; the rest never ran
    error: bytes | None  # of the next item, packed
    seconds: float
    on_board: bool  # the batch has said on the board what it runs
    drew: bool  # an item asked for random numbers
    first: int  # how many results were handed over before: they are not among these


NOT_WANTED = None  # the answer in place of a report: the map had ended
NOT_THERE = False  # likewise: the worker cannot open the memory that the function is in


class Outcome:
    """How a batch ended: results of its first items, then perhaps an error; the rest never ran."""

    __slots__ = ("drew", "error", "first", "results", "seconds")

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.drew = False  # an item asked for random numbers
        self.first = 0  # how many results have been handed over

    @property
    def hides_coroutines(self) -> bool:
        """Whether the function was a coroutine function in disguise: a lambda around one, say."""
        return bool(self.results) and type(self.results[0]) is CoroutineType

    def end(self, seconds: float, running: Running) -> None:
        """Note how it went."""
        self.seconds = seconds
        self.drew = running.streams.were_used
        self.first = running.close()
        running.queue.clear()  # what never ran must not stay: it and its streams know each other

    def fields(self, pid: int, on_board: bool) -> tuple[Any, ...]:
        """Say how it went, on a process: the fields of a `Report`."""
        error = None if self.error is None else _errors.encode_error(self.error, pid)
        results = self.results[self.first :] if self.first else self.results
        return results, error, self.seconds, on_board, self.drew, self.first

    async def await_results(self, work: Work, order: Order) -> None:
        """Put what coroutines among the results return in their place."""
        pending, self.results = self.results, []
        for k, value in enumerate(pending):
            if type(value) is CoroutineType:
                streams = Streams.of_item(order.seed, order.start + k)
                try:
                    with streams:
                        value = await value
                except Exception as exc:
                    if work.on_error is None:
                        self.error = exc
                        _close(pending[k + 1 :])
                        return
                    value = work.on_error(exc)
                self.drew = self.drew or streams.were_used
            self.results.append(value)


def _close(values: Sequence[object]) -> None:
    """Let go of coroutines that nobody will wait for."""
    for value in values:
        if type(value) is CoroutineType:
            value.close()


Key = tuple[int, int]  # a batch: the process whose map it is of, and its number there


class Running:
    """The items of a batch that runs; a context in which they can be taken away.

    Args:
        order: The batch.
        results: Of its items; it grows.
        active: The batches that run in this process.
        lock: Guards taking away, and the count of it; handing over, and the end of it.
    """

    __slots__ = (
        *("_active", "handed", "hands_over", "key", "lock", "queue", "results", "streams"),
        *("seen", "taken", "total", "unit"),
    )

    def __init__(
        self, order: Order, results: list[Any], active: dict[Key, Running], lock: Lock
    ) -> None:
        token, ident, self.unit, columns, seed, start, early = order
        first = columns[0]
        self.key = (token[0], ident)
        self._active = active
        self.queue: deque[Any] = deque(first if len(columns) == 1 else zip(*columns, strict=False))
        self.total = len(self.queue)
        self.lock = lock
        self.taken = 0
        self.results = results
        self.handed = 0  # results
        self.seen = 0  # results, at the last look
        self.hands_over = early and self.total > 1
        self.streams = Streams(seed, lambda: start + self.started() - 1)

    def __enter__(self) -> Running:
        self.streams.__enter__()
        self._active[self.key] = self
        return self

    def __exit__(self, *_: object) -> None:
        self._active.pop(self.key, None)
        self.streams.__exit__()

    def started(self) -> int:
        """Tell how many items have been started."""
        with self.lock:
            return self.total - self.taken - len(self.queue)

    def hand_over(self, first: int, upto: int, post: Callable[[], None]) -> bool:
        """Have results posted, unless the batch has ended, or they were; tell whether they are."""
        with self.lock:
            if not self.hands_over or self.handed != first:
                return False
            post()
            self.handed = upto
            return True

    def close(self) -> int:
        """Hand nothing over any more; return how many results were."""
        with self.lock:
            self.hands_over = False
            return self.handed

    def is_over(self, done: int) -> bool:
        """Tell whether every item was run or taken away."""
        with self.lock:
            return not self.queue and done + self.taken == self.total

    def fed(self) -> Iterator[Any]:
        """Yield the items as they are started."""
        queue = self.queue
        while queue:
            try:
                item = queue.popleft()
            except IndexError:  # taken away between the two lines
                return
            yield item

    def shorten(self, everything: bool) -> int:
        """Take items away that have not started, all or about half of them; return how many."""
        queue, unit = self.queue, self.unit
        count = 0
        with self.lock:
            left = len(queue)
            started = self.total - self.taken - left
            loose = max(0, left - (-started % unit))  # what belongs to a begun group stays with it
            groups = -(-loose // unit)
            wanted = loose if everything else loose - groups // 2 * unit
            try:
                while count < wanted:
                    queue.pop()
                    count += 1
            except IndexError:  # the running thread was quicker
                pass
            self.taken += count
        return count


class Batches(Service):
    """The batches that run in this process, for its own maps and for others'."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._calls = node.service(Calls)
        self._functions = node.service(KeptFunctions)
        self._boards = node.service(Boards)
        self._copies = node.service(ValueCopies)
        self._clock = node.machine.now
        self._lock = node.machine.lock  # makes one
        self._active: dict[Key, Running] = {}
        self._looks = False  # for results to hand over
        self._looking = node.machine.lock()  # guards beginning to
        # How many items of each map were last entered on the board as one.
        self._steps: dict[Token, int] = {}

    def run(self, order: Order) -> Any:
        """Run a batch for another process; return what to send back."""
        try:
            work = self._functions.get(order.token)
        except (Forgotten, Unmapped) as exc:
            return _cannot(exc)
        out = self.perform(work, order)
        if out.hides_coroutines:
            return self._awaited(work, out, order)
        return self._packed(work, out, order)

    async def _awaited(self, work: Work, out: Outcome, order: Order) -> PackedResult:
        await out.await_results(work, order)
        return self._packed(work, out, order)

    async def run_async(self, order: Order) -> Any:
        """Run a batch of a coroutine function for another process."""
        try:
            work = self._functions.get(order.token)
        except (Forgotten, Unmapped) as exc:
            return _cannot(exc)
        return self._packed(work, await self.perform_async(work, order), order)

    def _packed(self, work: Work, out: Outcome, order: Order) -> PackedResult:
        """Pickle an outcome here, where a result that cannot be pickled can still be found."""
        fields = out.fields(self.node.me, order.token[0] in self._boards.others)
        try:
            return PackedResult(codec.dumps(fields))
        except Exception:
            report = self._without_unpicklable(work, Report._make(fields))
            return PackedResult(codec.dumps(tuple(report)))

    def _without_unpicklable(self, work: Work, report: Report) -> Report:
        """Leave out the first result that cannot be pickled, and those behind it: its item failed.

        With an `on_error` of the user's, that gives a result in its place.
        """
        results: list[Any] = []
        for value in report.results:
            try:
                object_paths.dumps(value, "the result")
            except Exception as exc:
                if work.on_error is None:
                    error = _errors.encode_error(exc, self.node.me)
                    return report._replace(results=results, error=error)
                value = work.on_error(exc)
            results.append(value)
        return report._replace(results=results)

    def perform(self, work: Work, order: Order) -> Outcome:
        """Run the items of a batch in order."""
        token, ident, unit = order[:3]
        out, clock = Outcome(), self._clock
        running = Running(order, out.results, self._active, self._lock())
        queue = running.queue
        memory, place = self._boards.others.get(token[0]), place_of(ident)
        results, mapped = out.results, work.mapped
        # No Python code of ours between two items: they cost a tenth of a microsecond each.
        source = map(deque.popleft, repeat(queue))
        step, done = 1 if unit > 1 else self._steps.get(token, 1), 0
        began = now = clock()
        end = began + 2 * BUDGET
        try:
            with running:
                if running.hands_over and not self._looks:
                    self._look_later()
                while queue:
                    many = min(step, len(queue) if unit == 1 else unit - done % unit)
                    if memory is not None:
                        LINE.pack_into(memory, place, ident, done, done + many)
                    results.extend(mapped(islice(source, many)))
                    done += many
                    before, now = now, clock()
                    if now > end and done % unit == 0:  # slower than thought: others may have some
                        break
                    if now - before > _ENTRY:
                        step = max(1, step // 4)
                    elif step < _ENTRY_MOST and now - before < _ENTRY / 2:
                        step *= 2
        except BaseException as exc:  # the item's: it goes to the caller
            # Or ours: items were taken away while we were about to run them.
            if type(exc) is not IndexError or not running.is_over(len(results)):
                out.error = exc
        if unit == 1:
            self._steps[token] = step if out.error is None else 1
            if len(self._steps) > _STEPS_MOST:
                del self._steps[next(iter(self._steps))]
        out.end(clock() - began, running)
        return out

    async def perform_async(self, work: Work, order: Order) -> Outcome:
        """Run the items of a batch in order, on the event loop."""
        import asyncio  # 20 ms: not before the first map

        out, clock = Outcome(), self._clock
        running = Running(order, out.results, self._active, self._lock())
        memory, place = self._boards.others.get(order.token[0]), place_of(order.ident)
        began = clock()
        try:
            with running:
                if running.hands_over and not self._looks:
                    self._look_later()
                for done, item in enumerate(running.fed()):
                    if memory is not None:
                        LINE.pack_into(memory, place, order.ident, done, done + 1)
                    out.results.append(await work.awaited(item))
                    if (done + 1) % order.unit == 0 and clock() - began > 2 * BUDGET:
                        break
        except asyncio.CancelledError:  # interrupted: the event loop tells the caller
            raise
        except BaseException as exc:  # the item's: it goes to the caller
            out.error = exc
        out.end(clock() - began, running)
        return out

    # Handing results over, while the thread that runs the batch is in an item that takes long.

    def _look_later(self) -> None:
        with self._looking:
            looks, self._looks = self._looks, True
        if not looks:
            self.node.progress.call_later(_HAND_OVER_EVERY, self._look)

    def _look(self) -> None:
        """Hand over what has been finished for a while. Called by the driver."""
        self._looks = False
        waiting = [running for running in list(self._active.values()) if running.hands_over]
        for running in waiting:
            seen, running.seen = running.seen, len(running.results)
            if seen > running.handed:
                self.node.turns.background(partial(self._hand_over, running, seen))
        if waiting:
            self._look_later()

    def _hand_over(self, running: Running, upto: int) -> None:
        """Send results of a batch that goes on. Whatever cannot be sent stays for its report."""
        (pid, ident), first = running.key, running.handed
        try:
            results = codec.dumps(running.results[first:upto])
        except Exception:  # the thread that runs the batch will tell
            return
        peer = self.node.peers.get(pid)
        if peer is None or results.refs or first >= upto:  # references are counted as they leave
            return
        said = HandedOver(ident, first)
        results.own()
        post = lambda: peer.send(said, 0, results.body, results.buffers)
        if running.hand_over(first, upto, post):
            self.node.progress.soon()

    # Handing items back. Called by the driver, beside the thread that runs the batch.

    def take_back(
        self, caller: Peer | None, pid: int, everything: bool, idents: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Take items away that have not started; return (batch, how many) for each that had some.

        Args:
            caller: Whose batches they are; None: this process's own.
            pid: Its id.
            everything: All of them; else the newest batch that waits for its turn, or half of those
                that the running one has left.
            idents: The batches, the newest first.
        """
        taken: list[tuple[int, int]] = []
        for ident in idents:
            if self.node.turns.withdraw(caller, ident):
                taken.append((ident, -1))
            else:
                running = self._active.get((pid, ident))
                count = running.shorten(everything) if running is not None else 0
                if count:
                    taken.append((ident, count))
            if taken and not everything:
                break
        return taken

    @on(TakeBack)
    def _on_take_back(self, said: TakeBack, mail: Mail) -> None:
        taken = self.take_back(mail.peer, mail.peer.pid, said.everything, said.batches)
        self.node.reply(mail.peer, mail.ident, frames.OK, messages.encode(TakenBack(taken)))

    @on(Forget)
    def _on_forget(self, said: Forget, mail: Mail) -> None:
        peer = mail.peer
        self._functions.forget(said.tokens)
        for token in said.tokens:
            call = self.node.turns.withdraw(peer, token[1])  # what brings it, if it has not started
            if call is not None and self._calls.functions.function(call.aux) is keep_shared:
                _, place, *_ = codec.loads(call.body)
                self._copies.dropped.append((place[0], place[3]))
        if said.batches:
            self.take_back(peer, peer.pid, True, said.batches)


def _cannot(why: Forgotten | Unmapped) -> bool | None:
    """Say that a batch could not run."""
    return NOT_THERE if type(why) is Unmapped else NOT_WANTED


# What runs on the worker.


def run(*order: Any) -> Any:
    """Run a batch for another process."""
    return Batches.here().run(Order._make(order))


async def run_async(*order: Any) -> Any:
    """Run a batch of a coroutine function for another process."""
    return await Batches.here().run_async(Order(*order))
