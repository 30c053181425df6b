"""The items of a map that its checkpoint does not hold yet, and those that it does.

They stand in for the collections: parts keep their places in the map, only less is left to run.
Finished items are noticed as the collections reach them, and wait here until the map takes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from hpcdist._checkpoints.reading import Found
from hpcdist._maps.blame import item_of
from hpcdist._maps.sources import Part, Source

_SKIP = 1 << 14  # items passed over at once


class Finished(NamedTuple):
    """Neighbouring items that need not run: the index of the first, and how to get the results."""

    start: int
    size: int
    results: Callable[[], list[Any]]


class Remaining(Source):
    """What is left of a map's items, by index.

    Attributes:
        finished: What was passed over, in order.
        on_finished: Called when there is more of that.
    """

    def __init__(self, source: Source, found: Found) -> None:
        self.several = source.several
        self.size = source.size
        self.is_lazy = source.is_lazy
        self.ended = source.ended
        self.taken = 0
        self.finished: deque[Finished] = deque()
        self.on_finished: Callable[[], None] = lambda: None
        self._source = source
        self._found = found
        self._passed = 0

    @property
    def position(self) -> int:
        """How far the collections have been taken, finished items included."""
        return self._source.taken

    @property
    def left(self) -> int | None:
        """How many items have not been taken, where that is known."""
        left = self._source.left
        return None if left is None else max(0, left - self._found.count + self._passed)

    @property
    def is_small(self) -> bool:
        """Whether its items are small beyond doubt."""
        return self._source.is_small

    def take(self, count: int) -> Part | None:
        """Take the next items that are to run, fewer at the end; None if there are none."""
        try:
            part = self._next(count)
        finally:
            self.ended = self._has_ended()
        if part is not None:
            self.taken += part.size
        return part

    def _has_ended(self) -> bool:
        return self._source.ended

    def _next(self, count: int) -> Part | None:
        while not self._source.ended:
            finished, gap = self._found.gap(self._source.taken)
            if not finished:
                return self._source.take(count if gap is None else min(count, gap))
            start = self._source.taken
            try:
                self._pass_over(finished)
            finally:
                self._notice_run(start, self._source.taken - start)
        return None

    def _pass_over(self, count: int) -> None:
        while count > 0 and (part := self._source.take(min(count, _SKIP))) is not None:
            count -= part.size

    def _notice_run(self, start: int, count: int) -> None:
        if count:
            self._notice(Finished(start, count, lambda: self._found.results(start, count)))

    def _notice(self, run: Finished) -> None:
        self._passed += run.size
        self.finished.append(run)
        self.on_finished()


class RemainingByKey(Remaining):
    """What is left of a map's items, by the user's keys.

    Args:
        source: The items.
        found: What is finished.
        key: Gives an item's key.
    """

    def __init__(self, source: Source, found: Found, key: Callable[[Any], Any]) -> None:
        super().__init__(source, found)
        self.keys: dict[int, Any] = {}  # of the items that are to run, by index
        self._key = key
        self._seen: dict[Any, int] = {}
        self._parts: deque[Part] = deque()  # looked through, and to run

    def _has_ended(self) -> bool:
        return self._source.ended and not self._parts

    def _next(self, count: int) -> Part | None:
        while not self._parts:
            part = self._source.take(count)
            if part is None:
                return None
            self._look_through(part)
        part = self._parts.popleft()
        if part.size > count:
            self._parts.appendleft(part.cut(count, part.size))
        return part.cut(0, count)

    def _look_through(self, part: Part) -> None:
        entries = [self._entry(part, k) for k in range(part.size)]
        for is_found, group in groupby(range(part.size), lambda k: entries[k] is not None):
            first, *_, last = [*group] * 2
            if is_found:
                self._notice_entries(part.start + first, entries[first : last + 1])
            else:
                self._parts.append(part.cut(first, last + 1))

    def _notice_entries(self, start: int, entries: list[int | None]) -> None:
        results = lambda: [self._found.result(entry) for entry in entries if entry is not None]
        self._notice(Finished(start, len(entries), results))

    def _entry(self, part: Part, k: int) -> int | None:
        """Return the number under which an item is found; None if it is to run."""
        index = part.start + k
        key = self._key(item_of(part.cut(k, k + 1)))
        try:
            first = self._seen.setdefault(key, index)
        except TypeError:
            raise TypeError(
                f"the key of item {index} cannot be one: {key!r} is not hashable. Let key= return "
                "a text, a number, or a tuple of these"
            ) from None
        if first != index:
            raise ValueError(
                f"items {first} and {index} have the same key, {key!r}: a checkpoint could not "
                "tell one from the other. Let key= return what tells them apart"
            )
        entry = self._found.entry(key)
        if entry is None:
            self.keys[index] = key
        return entry

    def keys_of(self, start: int, count: int) -> Iterator[Any]:
        """Give the keys of items that have run."""
        return (self.keys[index] for index in range(start, start + count))

    def forget(self, start: int, count: int) -> None:
        """Let go of the keys of items that are filed."""
        for index in range(start, start + count):
            self.keys.pop(index, None)
