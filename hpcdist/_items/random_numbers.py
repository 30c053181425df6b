"""Random numbers: a stream for each item of a map, the same wherever and however often it runs.

Nothing is drawn in advance. A map sends its seed and the index of a batch's first item; the stream
of an item is made when the item first asks for it. Until then an item pays nothing: which of a
batch's items runs is worked out on demand, from what is left of the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from hpcdist._public import public
from hpcdist._runtime.node import here
from hpcdist._transport.machine import Machine

if TYPE_CHECKING:
    from numpy.random import Generator

_SEED_BYTES = 16  # as many as numpy draws


class Streams:
    """The streams of items that run one after the other; a context in which `rng()` gives them.

    Args:
        seed: The seed of the whole map.
        index: Tells the index of the item that runs now.
        rank: Which rank of the item this is, if it has several.
    """

    __slots__ = ("_generator", "_index", "_of", "_rank", "_seed", "_tokens")

    def __init__(self, seed: int, index: Callable[[], int], rank: int | None = None) -> None:
        self._seed = seed
        self._index = index
        self._rank = () if rank is None else (rank,)
        self._of = -1  # the index of the item that the generator belongs to
        self._generator: Any = None
        self._tokens: list[Token[Streams | None]] = []

    @classmethod
    def of_item(cls, seed: int, index: int, rank: int | None = None) -> Streams:
        """Make the stream of one item."""
        return cls(seed, lambda: index, rank)

    @property
    def were_used(self) -> bool:
        """Whether any item has asked for random numbers."""
        return self._of >= 0

    @property
    def index(self) -> int:
        """The index of the item that runs now."""
        return self._index()

    def generator(self) -> Any:
        """Give the generator of the item that runs now: the same one until the item ends."""
        index = self._index()
        if index != self._of:
            self._generator = _stream(self._seed, index, *self._rank)
            self._of = index
        return self._generator

    def __enter__(self) -> Streams:
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._tokens.pop())


# What a thread or a task runs: each is in one process.
_current: ContextVar[Streams | None] = ContextVar("hpcdist_streams", default=None)


@public
def rng() -> Generator:
    """Return the random generator of the item this code runs in.

    In an item of a map or a loop it is fixed by the map's `seed=` and the item's index alone; in
    `spmd` by `seed=` and the rank. Elsewhere each call returns a fresh one. It is numpy's
    `Generator`, or a `random.Random` where numpy is not installed.

    Example:
        >>> import hpcdist
        >>> hpcdist.pmap(lambda _: hpcdist.rng().integers(100).item(), range(4), seed=1)
        [1, 94, 42, 18]
    """
    here.node.admit()
    streams = _current.get()
    made: Generator = _fresh() if streams is None else streams.generator()
    return made


def index() -> int:
    """Tell the index of the item this code runs in."""
    streams = _current.get()
    return 0 if streams is None else streams.index


def _fresh() -> Any:
    try:
        from numpy.random import default_rng
    except ImportError:
        return _of_python()
    return default_rng()


def _stream(seed: int, *place: int) -> Any:
    """Make a stream: child `index` of numpy's `SeedSequence(seed)`, as its `spawn` gives it.

    Of an item with several ranks it is that child's child `rank`.
    """
    try:
        from numpy.random import SeedSequence, default_rng
    except ImportError:
        return _of_python(" ".join(map(str, (seed, *place))))
    return default_rng(SeedSequence(seed, spawn_key=place))


def _of_python(text: str | None = None) -> Any:
    import random  # a worker that has numpy never needs it

    return random.Random(text)  # which hashes a text with SHA-512


def draw(machine: Machine) -> int:
    """Draw the seed of a map that was given none."""
    return int.from_bytes(machine.random_bytes(_SEED_BYTES), "little")


def checked(seed: object) -> int:
    """Check a seed that a user gave."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed is a whole number, not {seed!r}")
    number = int(seed.__index__())
    if number < 0:
        raise ValueError(f"seed is 0 or more, not {number}")
    return number


def run_item(
    f: Callable[..., object],
    seed: int,
    index: int,
    args: tuple[object, ...],
    rank: int | None = None,
) -> Any:
    """Call `f(*args)` as item `index` of a map."""
    streams = Streams.of_item(seed, index, rank)
    with streams:
        value = f(*args)
    return _awaited(value, streams) if type(value) is CoroutineType else value


async def _awaited(value: CoroutineType[Any, Any, Any], streams: Streams) -> Any:
    with streams:
        return await value


class Counted:
    """An iterator over a sequence, and how many of its items it has given."""

    def __init__(self, items: Any) -> None:
        self._items = items
        self._given = 0
        self._size = len(items)
        plain = iter(items)
        # What Python's own iterators know by themselves costs nothing between two items.
        self._exact = type(plain).__module__ == "builtins" and hasattr(plain, "__length_hint__")
        self.items: Iterator[Any] = plain if self._exact else self._count()

    def _count(self) -> Iterator[Any]:
        for item in self._items:
            self._given += 1
            yield item

    def last(self) -> int:
        """Tell the position of the item that was given last."""
        if self._exact:
            return self._size - operator.length_hint(self.items) - 1
        return self._given - 1
