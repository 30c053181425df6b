"""A loop's body on all workers, each a contiguous part of the range."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import accumulate
from typing import Any, NamedTuple

from hpcdist._collective import trees
from hpcdist._collective.function_packing import FunctionPacking
from hpcdist._collective.reductions import Reductions, listed_pids
from hpcdist._collective.trees import LOOP, Root, Trees
from hpcdist._errors import HpcdistError
from hpcdist._frames import brief
from hpcdist._hints import suggesting
from hpcdist._items import item_names, random_numbers
from hpcdist._items.progress_bars import LoopBars, Place
from hpcdist._items.random_numbers import Counted, Streams
from hpcdist._public import public
from hpcdist._runtime.node import Node, Service
from hpcdist._typing import Pids
from hpcdist._wire import codec, generators, object_paths
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Body, Buffer

_NOTHING = object()
# In order, but not indexable.
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_NUMBERS = (int, float, complex)
_LAST_CALL = 1.0  # how long the program's end waits for loops that nobody has waited for


@public
@suggesting
def distributed(
    r: object,
    op: Callable[[Any, Any], Any] | None = None,
    *,
    init: object = _NOTHING,
    pids: Pids = None,
    chunked: bool = False,
    seed: int | None = None,
    progress: bool = False,
) -> Callable[[Callable[[Any], Any]], Any]:
    """Run a loop's body on all workers, each a contiguous part; combine with `op`.

    It is applied to the body, as a decorator or a call. Each worker folds its part from the left,
    and the parts are combined in order up a tree of workers (or here, if they are few and small
    and `op` is Python's or numpy's own): `op` has to be associative, but need not commute.

    Args:
        r: What to loop over: a range, a list, an array, any sequence.
        op: Combines two values. Without it the loop is only run, and a handle is returned at once.
        init: Combined with the result, once, at the left; the result of an empty loop.
        pids: The workers that take part, in order; default all.
        chunked: Give the body its whole part, a slice of `r`, rather than one item at a time.
        seed: Of the numbers that `rng()` gives in the items; by default drawn anew.
        progress: Show a bar, on a terminal or in a notebook; elsewhere a line every 10 s. Without
            `op` it ends with `wait()`.

    Raises:
        RemoteException: The body or `op` failed in one part; CompositeException: in several.
        ProcessExitedException: A worker died.
        ValueError: An empty loop without `init`.
        TypeError: `r` has no order (a set, say).

    Example:
        >>> import operator, hpcdist
        >>> hpcdist.distributed(range(5), operator.add)(lambda i: i * i)
        30
        >>> hpcdist.distributed([2, 3], max, chunked=True)(sum)
        5
    """
    return Loops.here().distributed(r, op, init, pids, chunked, seed, progress)


class How(NamedTuple):
    """How a loop is to be run."""

    chunked: bool
    seed: int  # of its random numbers
    place: Place | None = None  # where workers say how far they are


def _sequence(r: object) -> Any:
    """Check that `r` can be cut into parts by position."""
    if isinstance(r, _VIEWS):
        return [*r]
    if isinstance(r, Set | Mapping) or not (hasattr(r, "__getitem__") and hasattr(r, "__len__")):
        raise TypeError(f"a loop needs a sequence: items in an order, not {type(r).__name__}")
    return r


def _cut(items: Any, count: int, k: int) -> tuple[Any, int]:
    """Give part `k` of `count`, and where it begins."""
    sizes = trees.shares(len(items), count)
    start = sum(sizes[:k])
    return _slice(items, start, start + sizes[k]), start


def _slice(items: Any, start: int, end: int) -> Any:
    try:
        return items[start:end]
    except TypeError:  # a deque, say: it has positions but no slices
        return [items[k] for k in range(start, end)]


def _payloads(
    packing: FunctionPacking, items: Any, body: object, op: object, count: int, how: How
) -> tuple[Payload | None, Callable[[int], Payload]]:
    """Pack a loop: the same for all where the range says it all, else each with its part."""
    head = (packing.ship(body), None if op is None else packing.ship(op), how)
    if type(items) is range:
        common = packing.pack((*head, items, count, 0), head[:2], body)
        return common, lambda _: common
    sizes = trees.shares(len(items), count)
    starts = list(accumulate(sizes, initial=0))

    def part(k: int) -> Payload:
        mine = _slice(items, starts[k], starts[k + 1])
        payload = object_paths.dumps_call((*head, mine, 0, starts[k]), body, (mine,))
        generators.warn_of_copies(body, [payload.body])
        return payload

    return None, part


def _fold(op: Callable[[Any, Any], Any], values: Iterator[Any]) -> Any:
    if op is not operator.add:
        return functools.reduce(op, values)
    first = next(values)
    if type(first) in _NUMBERS:
        return sum(values, first)  # a tenth quicker, and no less exact
    return functools.reduce(op, values, first)


class LoopHandle:
    """A loop under way that has no result; `wait()` raises what failed in it."""

    def __init__(
        self, loops: Loops, items: Any, body: Any, pids: Sequence[int], how: How, progress: bool
    ) -> None:
        self.pids = list(pids)
        self._loops = loops
        shown = progress and self.pids
        self._bar = loops.bars.show(len(items), len(self.pids)) if shown else None
        self._sizes = trees.shares(len(items), len(self.pids)) if self.pids else []
        self._root: Root | None = None
        self._outcomes: dict[int, Any] | None = None
        if not self.pids:
            self._outcomes = {}
            return
        count = len(self.pids)
        if self._bar is not None:
            how = how._replace(place=self._bar.place)
        common, payloads = _payloads(loops.packing, items, body, None, count, how)
        self._root = Root(loops.trees, LOOP, self.pids, combines=False)
        loops.print_at_exit()
        loops.tidy()
        if common is not None and loops.node.topology == "all_to_all":
            self._root.begin(common, trees.fan(self.pids, range(count)))
        else:
            self._root.begin_flat(lambda k: payloads(k).own(), trees.flat(self.pids, range(count)))
        loops.unheard.append(self)

    def __repr__(self) -> str:
        return f"<LoopHandle on {self.pids}: {'done' if self.done() else 'running'}>"

    def done(self) -> bool:
        """Tell whether all parts have ended."""
        return self._outcomes is not None or self._root is None or self._root.is_done()

    def went_well(self) -> bool:
        """Tell whether all parts have ended, and none failed."""
        return self._root is not None and self._root.went_well()

    @brief
    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of the loop.

        Raises:
            RemoteException: The body failed in one part; CompositeException: in several.
            ProcessExitedException: A worker died.
            TimeoutError: The loop goes on.
        """
        outcomes = self._wait(timeout)
        if self in self._loops.unheard:
            self._loops.unheard.remove(self)
        self._raise_failures(outcomes)

    def check(self, timeout: float) -> None:
        """Raise what failed, for the end of the program."""
        self._raise_failures(self._wait(timeout))

    def _wait(self, timeout: float | None) -> dict[int, Any]:
        if self._outcomes is None:
            assert self._root is not None
            self._outcomes = self._root.wait(timeout)
        if self._bar is not None:
            self._bar.end(sum(outcome[0] != trees.OK for outcome in self._outcomes.values()))
        return self._outcomes

    def _raise_failures(self, outcomes: dict[int, Any]) -> None:
        self._loops.reductions.raise_failures(outcomes, "distributed failed", self._sizes)


class Loops(Service):
    """The loops that this process runs, and its own part in those of others."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.trees = node.service(Trees)
        self.reductions = node.service(Reductions)
        self.packing = node.service(FunctionPacking)
        self.bars = node.service(LoopBars)
        self.unheard: list[LoopHandle] = []  # whose errors nobody has asked for
        self._prints_at_exit = False
        self.trees.starters[LOOP] = self.reductions.starter(self._unpack)

    def distributed(
        self,
        r: object,
        op: Callable[[Any, Any], Any] | None,
        init: object,
        pids: Pids,
        chunked: bool,
        seed: int | None,
        progress: bool,
    ) -> Callable[[Callable[[Any], Any]], Any]:
        """Do what the public `distributed` says."""
        node = self.node
        node.admit()
        if op is not None and not callable(op):
            raise TypeError(f"an operator of two arguments is needed, not {op!r}")
        items = _sequence(r)
        number = random_numbers.draw(node.machine) if seed is None else random_numbers.checked(seed)

        @brief
        def run(body: Callable[[Any], Any]) -> Any:
            if not callable(body):
                raise TypeError(f"the body of a loop is a function, not {body!r}")
            how = How(chunked, number)
            if not len(items):
                return self._empty(op, init, how)
            if pids is None:
                self._check_deserted()
            listed = listed_pids(node, pids)[: len(items)]
            if op is None:
                return LoopHandle(self, items, body, listed, how, progress)
            with self.bars.of_loop(len(items), len(listed), progress) as place:
                how = how._replace(place=place)
                common, payloads = _payloads(self.packing, items, body, op, len(listed), how)
                sizes = trees.shares(len(items), len(listed))
                result = self.reductions.run(
                    LOOP, listed, common, payloads, body, op, "distributed failed", sizes
                )
            return result if init is _NOTHING else op(init, result)

        return run

    def _empty(self, op: object, init: object, how: How) -> Any:
        if op is None:
            return LoopHandle(self, (), None, [], how, False)
        if init is _NOTHING:
            raise ValueError("an empty loop has no result; give init=")
        return init

    def _check_deserted(self) -> None:
        """Raise if all workers are dead, and none comes in their place."""
        self.node.await_workers()
        death = self.node.members.deserted() if self.node.me == 1 else None
        if death is not None:
            death.add_note("No worker is left. addprocs() starts new ones; pids=[1] runs it here")
            raise death

    # Loops without a result

    def print_at_exit(self) -> None:
        """Print unheard errors at the program's end: before the workers', registered before."""
        if not self._prints_at_exit:
            self._prints_at_exit = True
            self.node.machine.at_exit(self._print_unheard)

    def tidy(self) -> None:
        """Forget the loops that went well."""
        for handle in list(self.unheard):
            if handle.went_well():
                self.unheard.remove(handle)

    def _print_unheard(self) -> None:
        """Print, at the end of the program, the errors that no `wait()` has raised."""
        now = self.node.machine.now
        deadline = now() + _LAST_CALL
        for handle in self.unheard:
            try:
                handle.check(max(0.0, deadline - now()))
            except TimeoutError:
                print(f"hpcdist: {handle!r}: the program ended before it", file=sys.stderr)
            except HpcdistError as exc:
                print(f"hpcdist: a loop failed without a wait() for it:\n{exc}", file=sys.stderr)

    # On each worker

    def _unpack(self, body: Body, buffers: Sequence[Buffer], position: int) -> tuple[Any, Any]:
        shipped, shipped_op, how, items, count, start = codec.loads(body, buffers)
        if count:
            items, start = _cut(items, count, position)
        f = self.packing.unship(shipped)
        op = None if shipped_op is None else self.packing.unship(shipped_op)
        return lambda: self._run_part(f, op, [items] if how.chunked else items, how, start), op

    def _run_part(self, f: Callable[[Any], Any], op: Any, items: Any, how: How, start: int) -> Any:
        """Run the body on the items of a part, each with random numbers of its own.

        Args:
            f: The body.
            op: Combines two of its values; None: these are not wanted.
            items: What it is called with.
            how: What else was asked for.
            start: The index of the first item.
        """
        counted = Counted(items)
        try:
            with Streams(how.seed, lambda: start + counted.last()):
                given = counted.items
                if how.place is not None:
                    given = self.bars.reported(how.place, given)
                if op is not None:
                    return _fold(op, map(f, given))
                for item in given:
                    f(item)
                return None
        except Exception as exc:
            k = counted.last()
            if not how.chunked and k >= 0:
                item_names.name_item(exc, start + k, items[k], whole="loop")
            raise
