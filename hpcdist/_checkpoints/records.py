"""The format of a checkpoint: a head of fixed size, and records that are only ever appended.

    head      512 bytes: a line that says what the file is, and one that says who writes it now
    record    mark, checksum, size; then the payload, of `size` bytes
    payload   kind, time, count, size of the names; then the names, then the values

The first record says which map the file belongs to, as JSON. Each of the others holds some
finished items: their names (runs of indices, or the pickled list of the user's keys), and their
values, as one or several pickled lists, one after the other.

The checksum also covers the place in the file, so that a record is valid only where it was written.
What a killed writer leaves is at most one torn record at the end: it is no record, and the next
writer writes over it. Where a disk has lost bytes in the middle, reading goes on at the next mark.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from hpcdist import _pickler

MAGIC = b"hpcdist checkpoint 1\n"
HEAD = 512  # bytes before the first record
MAP, BY_INDEX, BY_KEY = 0, 1, 2  # kinds of records

_MARK = b"\xa9rec"
_FRAME = struct.Struct("<4sIQ")  # mark, checksum, size of the payload
_FIELDS = struct.Struct("<BdII")  # kind, time, count, size of the names
_CHUNK = 1 << 20
_PIECE = 1 << 30  # Linux reads and writes no more than 2 GiB at a time

Run = tuple[int, int]  # neighbouring items: the index of the first, and how many


class Damaged(Exception):
    """A record is not what its checksum says it was: it cannot be decoded."""


@dataclass(frozen=True)
class Record:
    """A record that was read and found whole.

    Attributes:
        offset: Where it begins.
        end: Where the next one begins.
        kind: `MAP`, `BY_INDEX` or `BY_KEY`.
        time: When it was written, by the writer's clock.
        count: How many items it holds.
        names: Which ones.
        values: Their results.
    """

    offset: int
    end: int
    kind: int
    time: float
    count: int
    names: bytes
    values: bytes


# Writing


def payload(kind: int, time: float, count: int, names: bytes, values: bytes = b"") -> bytes:
    """Lay out a record, but for its frame."""
    return b"".join((_FIELDS.pack(kind, time, count, len(names)), names, values))


def framed(body: bytes, offset: int) -> bytes:
    """Frame a payload that is to stand at `offset`."""
    return _FRAME.pack(_MARK, _checksum(body, offset), len(body)) + body


def write(fd: int, data: bytes, offset: int) -> None:
    """Write all of it, or raise."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[:_PIECE], offset)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += written
        view = view[written:]


def pack_values(values: Sequence[Any]) -> bytes:
    """Pickle a list of results.

    Plain pickle first: what the script defines is found again by its name when the same script
    runs again. cloudpickle does what has no name that could be found.
    """
    try:
        return pickle.dumps(list(values), 5)
    except Exception:
        return _pickler.dumps(list(values))


def pack_runs(runs: Iterable[Run]) -> bytes:
    """Write runs as pairs of numbers: the distance from the end of the one before, and the count.

    >>> list(unpack_runs(pack_runs([(5, 3), (8, 1), (0, 2)])))
    [(5, 3), (8, 1), (0, 2)]
    """
    out = bytearray()
    end = 0
    for start, count in runs:
        distance = start - end
        _put(out, distance << 1 if distance >= 0 else (-distance << 1) - 1)
        _put(out, count)
        end = start + count
    return bytes(out)


def _put(out: bytearray, number: int) -> None:
    """Append a number, seven bits a byte."""
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


# Reading


def unpack_runs(names: bytes) -> Iterator[Run]:
    """Read runs."""
    numbers = _numbers(names)
    end = 0
    for distance in numbers:
        start = end + (distance >> 1 if not distance & 1 else -((distance + 1) >> 1))
        count = next(numbers, None)
        if count is None:
            raise Damaged("a run without a count")
        yield start, count
        end = start + count


def _numbers(names: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in names:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0


def unpack_values(record: Record) -> list[Any]:
    """Unpickle the results of a record."""
    values: list[Any] = []
    stream = io.BytesIO(record.values)
    while stream.tell() < len(record.values):
        values.extend(pickle.load(stream))
    return values


def unpack_keys(record: Record) -> list[Any]:
    """Unpickle the user's keys of a record."""
    keys: list[Any] = []
    stream = io.BytesIO(record.names)
    while stream.tell() < len(record.names):
        keys.extend(pickle.load(stream))
    return keys


def records(fd: int, offset: int = HEAD) -> Iterator[Record]:
    """Yield the whole records of a file, from `offset` to where there is none any more."""
    while True:
        record = record_at(fd, offset)
        if record is not None:
            yield record
            offset = record.end
            continue
        further = _next_mark(fd, offset + 1)
        if further is None:
            return
        offset = further


def record_at(fd: int, offset: int) -> Record | None:
    """Read the record that begins at `offset`; None if there is none, or none that is whole."""
    frame = _read(fd, _FRAME.size, offset)
    if len(frame) < _FRAME.size:
        return None
    mark, checksum, size = _FRAME.unpack(frame)
    begin = offset + _FRAME.size
    if mark != _MARK or size < _FIELDS.size or begin + size > os.fstat(fd).st_size:
        return None
    body = _read(fd, size, begin)
    if len(body) < size or _checksum(body, offset) != checksum:
        return None
    kind, time, count, names = _FIELDS.unpack_from(body)
    values = _FIELDS.size + names
    return Record(
        offset, begin + size, kind, time, count, body[_FIELDS.size : values], body[values:]
    )


def _next_mark(fd: int, offset: int) -> int | None:
    """Find the next place where a record may begin."""
    while chunk := _read(fd, _CHUNK, offset):
        found = chunk.find(_MARK)
        if found >= 0:
            return offset + found
        if len(chunk) < len(_MARK):
            return None
        offset += len(chunk) - len(_MARK) + 1  # a mark may lie across the border
    return None


def _read(fd: int, size: int, offset: int) -> bytes:
    if size <= _PIECE:
        return os.pread(fd, size, offset)
    parts = []
    while size > 0 and (part := os.pread(fd, min(size, _PIECE), offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def _checksum(body: bytes, offset: int) -> int:
    return crc32(body, crc32(_FRAME.pack(_MARK, 0, len(body)) + offset.to_bytes(8, "little")))
