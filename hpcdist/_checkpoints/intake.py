"""What waits to be written into a checkpoint, and how it becomes records."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from hpcdist._checkpoints import records
from hpcdist._checkpoints.records import BY_INDEX, BY_KEY, Run

WAITING_MOST = 64 << 20  # bytes in memory
_RECORD_MOST = 256 << 10  # of what is put together: what still fits on a disk is kept
_PLAIN = {int, float, complex, bool, type(None), str, bytes}
_SIZED = {str, bytes}
_ITEM = 32  # bytes that an item without a size of its own is taken for

Names = int | Sequence[Any]  # the index of the first item, or the keys of all
Plain = tuple[Names, Sequence[Any], int]  # and results, and their size, roughly
Packed = tuple[Names, int, bytes]  # and how many results, pickled


class Intake:
    """Results that the map has handed in, until the writer's thread takes them.

    Args:
        keyed: Whether items go by the user's keys.
    """

    def __init__(self, keyed: bool) -> None:
        self.waiting = 0  # bytes
        self._kind = BY_KEY if keyed else BY_INDEX
        self._room = threading.Condition(threading.Lock())  # guards what follows
        self._plain: list[Plain] = []  # cannot change: pickled together
        self._packed: list[Packed] = []

    def put(self, names: Names, values: Sequence[Any], nbytes: int) -> None:
        """Take in results that nobody can change any more."""
        with self._room:
            self._plain.append((names, values, nbytes))
            self.waiting += nbytes

    def put_packed(self, names: Names, count: int, values: bytes) -> None:
        """Take in results that are pickled already."""
        with self._room:
            self._packed.append((names, count, values))
            self.waiting += len(values)

    def await_room(self, drains: Callable[[], bool]) -> None:
        """Wait while too much waits, as long as something takes it away."""
        with self._room:
            while self.waiting > WAITING_MOST and drains():
                self._room.wait(1.0)

    def payloads(self) -> list[bytes]:
        """Take all that waits, as the payloads of records."""
        with self._room:
            plain, self._plain = self._plain, []
            packed, self._packed = self._packed, []
            self.waiting = 0
            self._room.notify_all()
        return self._payloads(plain, packed)

    def _payloads(self, plain: list[Plain], packed: list[Packed]) -> list[bytes]:
        now = time.time()
        made = []
        for batches in _portions(_in_order(plain), lambda batch: batch[2]):
            body = records.pack_values([*chain.from_iterable(batch[1] for batch in batches)])
            made.append(self._payload(now, [(b[0], len(b[1])) for b in batches], body))
        for parts in _portions(packed, lambda part: len(part[2])):
            body = b"".join(part[2] for part in parts)
            made.append(self._payload(now, [(part[0], part[1]) for part in parts], body))
        return made

    def _payload(self, now: float, batches: Sequence[tuple[Names, int]], body: bytes) -> bytes:
        count = sum(size for _, size in batches)
        return records.payload(self._kind, now, count, self._names(batches), body)

    def _names(self, batches: Sequence[tuple[Names, int]]) -> bytes:
        if self._kind == BY_KEY:
            keys = [key for names, _ in batches if not isinstance(names, int) for key in names]
            return records.pack_values(keys)
        runs: list[Run] = []
        for start, count in batches:
            assert isinstance(start, int)
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((start, count))
        return records.pack_runs(runs)


def size_of_plain(values: Sequence[Any]) -> int | None:
    """Estimate the size of results that nobody can change any more; None if they can be."""
    types = set(map(type, values))
    if types == {tuple}:
        return size_of_plain([*chain.from_iterable(values)])
    if types & _SIZED and types <= _PLAIN:
        return sum(len(v) for v in values if type(v) in _SIZED) + _ITEM * len(values)
    if types <= _PLAIN or all(map(_is_plain, types)):
        return _ITEM * len(values)
    return None


def _is_plain(kind: type) -> bool:
    """Tell whether values of a type never change: numpy's scalars are such, too."""
    if kind in _PLAIN:
        return kind not in _SIZED
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and issubclass(kind, numpy.number | numpy.bool_)


def _in_order(plain: list[Plain]) -> list[Plain]:
    """Put batches in order of index, so that neighbours make one run."""
    if plain and isinstance(plain[0][0], int):
        plain.sort(key=lambda batch: batch[0])  # type: ignore[arg-type, return-value]
    return plain


def _portions(things: Sequence[Any], size: Callable[[Any], int]) -> list[list[Any]]:
    """Divide things so that each portion becomes a record of a moderate size."""
    portions: list[list[Any]] = []
    room = 0
    for thing in things:
        room -= size(thing)
        if not portions or room < 0:
            portions.append([])
            room = _RECORD_MOST - size(thing)
        portions[-1].append(thing)
    return portions
