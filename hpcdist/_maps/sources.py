"""What a map runs over: collections cut into parts as they are needed.

Ranges, lists, tuples and arrays are cut by slicing: a part of a range is a range, and a part of a
list is pickled as one. Everything else is an iterator, consumed no further than it has to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from hpcdist._items import timings


class Part(NamedTuple):
    """Neighbouring items: the index of the first, and their columns, one for each collection."""

    start: int
    columns: Sequence[Any]
    alone: bool = False  # the item is not to share a batch: it may have ended a worker

    @property
    def size(self) -> int:
        """How many items these are."""
        return len(self.columns[0])

    def cut(self, first: int, end: int, *, alone: bool = False) -> Part:
        """Take the items from `first` to before `end`."""
        return Part(self.start + first, [c[first:end] for c in self.columns], alone)


class Source:
    """The items of one map, in order; the shortest collection ends them."""

    def __init__(self, collections: Sequence[Iterable[object]]) -> None:
        self.several = len(collections) > 1
        self.taken = 0
        self.size: int | None = None  # how many items there are, where that is known
        self._columns: list[Any] = []
        self._items: Any = None
        self._error: Exception | None = None
        if all(_sliceable(c) for c in collections):
            self._columns = list(collections)
            self.size = min(len(c) for c in self._columns)
        elif self.several:
            self._items = zip(*collections, strict=False)
        else:
            self._items = iter(collections[0])
        self.is_lazy = self.size is None
        self.ended = self.size == 0

    @property
    def position(self) -> int:
        """The index of the next item of the collections."""
        return self.taken

    @property
    def left(self) -> int | None:
        """How many items have not been taken, where that is known."""
        return None if self.size is None else self.size - self.taken

    @property
    def is_small(self) -> bool:
        """Whether its items are small beyond doubt."""
        return timings.are_small(self._columns)

    def take(self, count: int) -> Part | None:
        """Take the next items, fewer at the end; None if there are none."""
        start = self.taken
        if self.size is not None:
            end = min(start + count, self.size)
            self.taken = end
            self.ended = end == self.size
            if start == end:
                return None
            return Part(start, [c[start:end] for c in self._columns])
        if self.ended:
            return None
        if self._error is not None:
            self.ended = True
            raise self._error
        items: list[Any] = []
        try:
            items.extend(islice(self._items, count))
        except Exception as exc:  # what came before it counts: it is raised in its place
            if not items:
                self.ended = True
                raise
            self._error = exc
        self.taken += len(items)
        self.ended = len(items) < count and self._error is None
        if not items:
            return None
        columns = [list(c) for c in zip(*items, strict=True)] if self.several else [items]
        return Part(start, columns)


def _sliceable(collection: object) -> bool:
    """Tell whether slices of a collection hold what iterating over it gives."""
    if type(collection) in (range, list, tuple):
        return True
    # numpy's arrays, and those that behave like them; one without dimensions cannot be iterated.
    return hasattr(collection, "__array_interface__") and bool(getattr(collection, "shape", ()))
