"""A loop's body on all workers, each a contiguous part of the range."""

from __future__ import annotations

import atexit
import functools
import operator
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import accumulate
from typing import Any

from hpcdist._errors import HpcdistError
from hpcdist._parallel import reductions, shipping, trees
from hpcdist._parallel.reductions import listed_pids, raise_failures
from hpcdist._parallel.trees import LOOP, Root
from hpcdist._runtime.node import node
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Buffer

_NOTHING = object()
# In order, but not indexable.
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_NUMBERS = (int, float, complex)
_LAST_CALL = 1.0  # how long the program's end waits for loops that nobody has waited for


def distributed(
    r: Any,
    op: Callable[[Any, Any], Any] | None = None,
    *,
    init: Any = _NOTHING,
    pids: Any = None,
    chunked: bool = False,
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
    if op is not None and not callable(op):
        raise TypeError(f"an operator of two arguments is needed, not {op!r}")
    items = _sequence(r)

    def run(body: Callable[[Any], Any]) -> Any:
        if not callable(body):
            raise TypeError(f"the body of a loop is a function, not {body!r}")
        if not len(items):
            return _empty(op, init)
        listed = listed_pids(pids)[: len(items)]
        if op is None:
            return LoopHandle(items, body, chunked, listed)
        common, payloads = _payloads(items, body, op, chunked, len(listed))
        result = reductions.run(LOOP, listed, common, payloads, body, op, "distributed failed")
        return result if init is _NOTHING else op(init, result)

    return run


def _empty(op: Any, init: Any) -> Any:
    if op is None:
        return LoopHandle((), None, False, [])
    if init is _NOTHING:
        raise ValueError("an empty loop has no result; give init=")
    return init


def _sequence(r: Any) -> Any:
    """Check that `r` can be cut into parts by position."""
    if isinstance(r, _VIEWS):
        return [*r]
    if isinstance(r, Set | Mapping) or not (hasattr(r, "__getitem__") and hasattr(r, "__len__")):
        raise TypeError(f"a loop needs a sequence: items in an order, not {type(r).__name__}")
    return r


def _cut(items: Any, count: int, k: int) -> Any:
    """Give part `k` of `count`."""
    sizes = trees.shares(len(items), count)
    start = sum(sizes[:k])
    return _slice(items, start, start + sizes[k])


def _slice(items: Any, start: int, end: int) -> Any:
    try:
        return items[start:end]
    except TypeError:  # a deque, say: it has positions but no slices
        return [items[k] for k in range(start, end)]


def _payloads(
    items: Any, body: Any, op: Any, chunked: bool, count: int
) -> tuple[Payload | None, Callable[[int], Payload]]:
    """Pack a loop: the same for all where the range says it all, else each with its part."""
    head = (shipping.ship(body), None if op is None else shipping.ship(op), chunked)
    if type(items) is range:
        common = shipping.pack((*head, items, count), head[:2])
        return common, lambda _: common
    sizes = trees.shares(len(items), count)
    ends = list(accumulate(sizes))
    return None, lambda k: codec.dumps((*head, _slice(items, ends[k] - sizes[k], ends[k]), 0))


# On each worker


def _unpack(body: Any, buffers: Sequence[Buffer], position: int) -> tuple[Any, Any]:
    shipped, shipped_op, chunked, items, count = codec.loads(body, buffers)
    if count:
        items = _cut(items, count, position)
    f = shipping.unship(shipped)
    op = None if shipped_op is None else shipping.unship(shipped_op)
    if op is None:
        return lambda: _each(f, [items] if chunked else items), op
    if chunked:
        return lambda: f(items), op
    return lambda: _fold(op, map(f, items)), op


def _fold(op: Callable[[Any, Any], Any], values: Iterator[Any]) -> Any:
    if op is not operator.add:
        return functools.reduce(op, values)
    first = next(values)
    if type(first) in _NUMBERS:
        return sum(values, first)  # a tenth quicker, and no less exact
    return functools.reduce(op, values, first)


def _each(f: Callable[[Any], Any], items: Any) -> None:
    for item in items:
        f(item)


trees.starters[LOOP] = reductions.start(_unpack)


# Loops without a result


_unheard: list[LoopHandle] = []  # loops whose errors nobody has asked for


class LoopHandle:
    """A loop under way that has no result; `wait()` raises what failed in it."""

    def __init__(self, items: Any, body: Any, chunked: bool, pids: Sequence[int]) -> None:
        self.pids = list(pids)
        self._root: Root | None = None
        self._outcomes: dict[int, Any] | None = None
        if not self.pids:
            self._outcomes = {}
            return
        count = len(self.pids)
        common, payloads = _payloads(items, body, None, chunked, count)
        self._root = Root(LOOP, self.pids, combines=False)
        _print_at_exit()
        _tidy()
        if common is not None and node.topology == "all_to_all":
            self._root.begin(common, trees.fan(self.pids, range(count)))
        else:
            self._root.begin_flat(lambda k: payloads(k).own(), trees.flat(self.pids, range(count)))
        _unheard.append(self)

    def __repr__(self) -> str:
        return f"<LoopHandle on {self.pids}: {'done' if self.done() else 'running'}>"

    def done(self) -> bool:
        """Tell whether all parts have ended."""
        return self._outcomes is not None or self._root is None or self._root.is_done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of the loop.

        Raises:
            RemoteException: The body failed in one part; CompositeException: in several.
            ProcessExitedException: A worker died.
            TimeoutError: The loop goes on.
        """
        outcomes = self._wait(timeout)
        if self in _unheard:
            _unheard.remove(self)
        raise_failures(outcomes, "distributed failed")

    def _wait(self, timeout: float | None) -> dict[int, Any]:
        if self._outcomes is None:
            assert self._root is not None
            self._outcomes = self._root.wait(timeout)
        return self._outcomes


def _tidy() -> None:
    """Forget the loops that went well."""
    for handle in list(_unheard):
        if handle._root is not None and handle._root.went_well():
            _unheard.remove(handle)


def _print_unheard() -> None:
    """At the end of the program: no error is lost."""
    deadline = time.monotonic() + _LAST_CALL
    for handle in _unheard:
        try:
            raise_failures(
                handle._wait(max(0.0, deadline - time.monotonic())), "distributed failed"
            )
        except TimeoutError:
            print(f"hpcdist: {handle!r}: the program ended before it", file=sys.stderr)
        except HpcdistError as exc:
            print(f"hpcdist: a loop nobody waited for failed:\n{exc}", file=sys.stderr)


@functools.cache
def _print_at_exit() -> None:
    """Registered late, so that it comes before the workers' end, which is registered before."""
    atexit.register(_print_unheard)
