"""Reading a checkpoint: what a map finds finished, what users read, what the command line shows."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from hpcdist._checkpoints import records
from hpcdist._checkpoints.belonging import Belonging, CheckpointMismatch
from hpcdist._checkpoints.owner import Owner, read_owner, refuse_foreign
from hpcdist._checkpoints.records import BY_INDEX, BY_KEY, HEAD, MAP, Damaged, Record, Run
from hpcdist._public import public

_KEPT_BYTES = 64 << 20  # of records whose results may be asked for again


@public
def read_checkpoint(file: str | PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """Iterate over the finished items of a checkpoint: the index or the key, and the result.

    The map may be running meanwhile, on this host or another. What it finishes during the
    iteration is given too; the iteration ends where nothing more is in the file.

    Args:
        file: What `checkpoint=` of the map has named.

    Raises:
        CheckpointMismatch: The file is no checkpoint.

    Example:
        >>> import hpcdist, tempfile
        >>> file = tempfile.mkdtemp() + "/run.ckpt"
        >>> hpcdist.pmap(abs, [-1, 2, -3], checkpoint=file)
        [1, 2, 3]
        >>> sorted(hpcdist.read_checkpoint(file))
        [(0, 1), (1, 2), (2, 3)]
    """
    path = os.fspath(file)
    fd = _open(path)
    return _items(fd, path)


def _items(fd: int, path: str) -> Iterator[tuple[Any, Any]]:
    try:
        for record in records.records(fd):
            if record.kind in (BY_INDEX, BY_KEY):
                names, values = _names(record, path), _values(record, path)
                if len(names) != len(values):
                    raise Damaged(f"{path}: {len(values)} results of {len(names)} items")
                yield from zip(names, values, strict=True)
    finally:
        os.close(fd)


def _names(record: Record, path: str) -> Sequence[Any]:
    if record.kind == BY_KEY:
        return records.unpack_keys(record)
    runs = list(records.unpack_runs(record.names))
    if sum(count for _, count in runs) != record.count:  # before so many are made
        raise Damaged(f"{path}: a record of {record.count} items names others")
    return [index for start, count in runs for index in range(start, start + count)]


def _values(record: Record, path: str) -> list[Any]:
    try:
        return records.unpack_values(record)
    except Exception as exc:
        exc.add_note(
            f"A result in {path} cannot be unpickled here: the module, or the script, that defines "
            "it has to be the one that made it"
        )
        raise


def _open(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        refuse_foreign(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


# What a map finds


class Found:
    """The finished items that a file held when the map began, and where their results are."""

    def __init__(self, path: str) -> None:
        self.belonging: Belonging | None = None
        self.end = HEAD  # where the last whole record ends
        self.count = 0
        self._path = path
        self._entries: list[tuple[int, int, int, int]] = []  # start, count, record, place in it
        self._starts = array("Q")
        self._keys: dict[Any, int] = {}
        self._records = array("Q")  # of each key: where its record is,
        self._places = array("Q")  # and the place in it
        self._kept: dict[int, list[Any]] = {}  # results of the records used last
        self._kept_bytes: dict[int, int] = {}

    @classmethod
    def in_file(cls, fd: int, path: str) -> Found:
        """Read what a file holds.

        Raises:
            CheckpointMismatch: What the file belongs to cannot be read.
        """
        self = cls(path)
        for record in records.records(fd):
            if record.kind == MAP:
                self.belonging = self.belonging or _belonging(record, path)
            elif self.belonging is None:
                raise CheckpointMismatch(
                    f"the checkpoint {path} is damaged: its first record, which says what map it "
                    "belongs to, cannot be read. read_checkpoint() gives the items it holds",
                    path,
                    "a damaged checkpoint",
                )
            self._enter(record)
            self.end = record.end
        self._put_in_order()
        return self

    def _enter(self, record: Record) -> None:
        place = 0
        if record.kind == BY_INDEX:
            for start, count in records.unpack_runs(record.names):
                self._entries.append((start, count, record.offset, place))
                place += count
        elif record.kind == BY_KEY:
            for place, key in enumerate(records.unpack_keys(record)):
                self._keys[key] = len(self._records)
                self._records.append(record.offset)
                self._places.append(place)

    def _put_in_order(self) -> None:
        """Sort the runs, and let none lie over another: an item may have been finished twice."""
        entries, self._entries = sorted(self._entries), []
        end = 0
        for start, count, offset, place in entries:
            skip = max(0, end - start)
            if skip < count:
                self._entries.append((start + skip, count - skip, offset, place + skip))
                self._starts.append(start + skip)
                end = start + count
                self.count += count - skip
        self.count += len(self._keys)

    @property
    def highest(self) -> int:
        """The highest index; -1 if there is none."""
        return sum(self._entries[-1][:2]) - 1 if self._entries else -1

    def gap(self, index: int) -> tuple[int, int | None]:
        """Tell what is at an index.

        Returns:
            How many items from there on are finished, and how many are not, one of them 0;
            None: all that follow are not.
        """
        k = bisect_right(self._starts, index)
        if k:
            start, count, _, _ = self._entries[k - 1]
            if index < start + count:
                return start + count - index, 0
        return 0, self._starts[k] - index if k < len(self._starts) else None

    def results(self, start: int, count: int) -> list[Any]:
        """Return the results of neighbouring items, all of which are of one record."""
        first, _, offset, place = self._entries[bisect_right(self._starts, start) - 1]
        place += start - first
        return self._values_of(offset)[place : place + count]

    def entry(self, key: Any) -> int | None:
        """Return the number under which the result of a key is found; None if it is not."""
        return self._keys.get(key)

    def result(self, entry: int) -> Any:
        """Return the result of a key, by its number."""
        return self._values_of(self._records[entry])[self._places[entry]]

    def _values_of(self, offset: int) -> list[Any]:
        values = self._kept.pop(offset, None)
        if values is None:
            fd = _open(self._path)
            try:
                record = records.record_at(fd, offset)
            finally:
                os.close(fd)
            if record is None:
                raise OSError(f"{self._path} was changed while it was in use")
            values = _values(record, self._path)
            self._kept_bytes[offset] = len(record.values)
            while self._kept and sum(self._kept_bytes.values()) > _KEPT_BYTES:
                oldest = next(iter(self._kept))
                del self._kept[oldest], self._kept_bytes[oldest]
        self._kept[offset] = values  # the last one used comes last
        return values


def _belonging(record: Record, path: str) -> Belonging:
    try:
        return Belonging.from_json(record.names)
    except ValueError as exc:
        raise CheckpointMismatch(f"{path} is of another version of hpcdist: {exc}", path) from None


@dataclass(frozen=True)
class Look:
    """What a file says of itself, without its items.

    Attributes:
        belonging: The map it belongs to; None: it was cut off before it could say so.
        owner: Who writes it now, as far as it says.
    """

    belonging: Belonging | None
    owner: Owner | None


def look(path: str) -> Look:
    """Look at a file's head.

    Raises:
        CheckpointMismatch: It is no checkpoint.
        FileNotFoundError: There is none.
    """
    fd = _open(path)
    try:
        first = next(records.records(fd), None)
        whose = _belonging(first, path) if first is not None and first.kind == MAP else None
        return Look(whose, read_owner(fd))
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Summary:
    """What `hpcdist checkpoint FILE` shows.

    Attributes:
        items: How many finished items there are.
        nbytes: Of the file.
        first, last: When the first and the last of them were written; None: there is none.
        torn: Bytes behind the last whole record.
    """

    belonging: Belonging | None
    owner: Owner | None
    items: int
    nbytes: int
    first: float | None
    last: float | None
    torn: int


def summary(path: str) -> Summary:
    """Sum up a file; the results in it are not unpickled.

    Raises:
        CheckpointMismatch: It is no checkpoint.
    """
    fd = _open(path)
    try:
        whose, times, items, end = None, [], 0, HEAD
        indices: list[Run] = []
        for record in records.records(fd):
            end = record.end
            if record.kind == MAP:
                whose = whose or _belonging(record, path)
                continue
            times.append(record.time)
            if record.kind == BY_INDEX:
                indices += records.unpack_runs(record.names)
            else:
                items += record.count
        size = os.fstat(fd).st_size
        items += _distinct(indices)
        first, last = (min(times), max(times)) if times else (None, None)
        torn = max(0, size - end)
        return Summary(whose, read_owner(fd), items, size, first, last, torn)
    finally:
        os.close(fd)


def _distinct(runs: list[Run]) -> int:
    """Count the items of runs, each once."""
    total = end = 0
    for start, count in sorted(runs):
        total += max(0, start + count - max(start, end))
        end = max(end, start + count)
    return total
