"""Formats of ours: what travels between processes, and what lies in files."""

import io
import itertools
import json
import os
import pickle
import select
import struct
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

from hpcdist._checkpoints import records
from hpcdist._checkpoints.belonging import CheckpointMismatch
from hpcdist._checkpoints.owner import read_owner
from hpcdist._checkpoints.reading import Found, look, read_checkpoint, summary
from hpcdist._checkpoints.records import BY_KEY, HEAD, Damaged
from hpcdist._cli.trace import read_trace
from hpcdist._cli.trace_page import page
from hpcdist._cli.trace_summary import summarize
from hpcdist._events.chrome import convert
from hpcdist._keeper import processes
from hpcdist._schedulers import job_watch
from hpcdist._transport import link
from hpcdist._transport.link import Link
from hpcdist._transport.router import triples
from hpcdist._wire import codec, frames, greeting, messages
from hpcdist._worker.join_file import CannotJoin, read_join
from tests.fuzz.target import Target

_COOKIE = b"0123456789abcdef"
_ROOM = 1 << 16  # bytes that buffers of a link may take; the rest is read away
_ITEMS = 1000  # of a checkpoint; damage may announce any number


class Replies:
    """A connection whose other end says what is given, in pieces, and then hangs up."""

    def __init__(self, data: bytes, piece: int = 1 << 20) -> None:
        self._data = memoryview(data)
        self._piece = piece
        self.said = b""

    def fileno(self) -> int:
        return -1

    def settimeout(self, value: float | None) -> None:
        pass

    def setblocking(self, flag: bool) -> None:
        pass

    def setsockopt(self, level: int, name: int, value: int) -> None:
        pass

    def recv(self, size: int) -> bytes:
        size = min(size, self._piece)
        part, self._data = bytes(self._data[:size]), self._data[size:]
        return part

    def recv_into(self, buffer: memoryview) -> int:
        part = self.recv(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def sendall(self, data: bytes) -> None:
        self.said += data

    def close(self) -> None:
        pass


class _Silent:
    """A log that nobody reads."""

    @staticmethod
    def log(*_: str) -> None:
        pass


class _Loop:
    """A wait loop that watches nothing."""

    def register(self, *_: Any) -> None:
        pass

    modify = unregister = register


# Greetings


def strangers_greeting(data: bytes) -> None:
    """Let somebody dial who does not know the cookie: nothing but the proof gets further."""
    talk = greeting.accepting(_COOKIE)
    left, step = io.BytesIO(data), next(talk)
    while True:
        part = left.read(step) if isinstance(step, int) else b""
        if isinstance(step, int) and len(part) < step:
            return
        step = talk.send(part)
        assert not (isinstance(step, bytes) and left.tell() >= 56), "it was believed"


def dialled_stranger(data: bytes) -> None:
    """Dial somebody who does not know the cookie."""
    said = Replies(data)
    greeting.dial(said, _COOKIE, {"secret": 1}, 1.0)
    raise AssertionError("it was believed")


def hello(data: bytes) -> None:
    """Hear what one of ours says of itself."""
    assert isinstance(greeting.receive_hello(Replies(data)), dict)


# Frames


def frames_of_a_link(data: bytes) -> None:
    """Read a stream of messages in pieces; the first byte says how large these are."""
    room = _ROOM

    def blank(size: int) -> bytearray:
        nonlocal room
        if size > room:
            raise MemoryError
        room -= size
        return bytearray(size)

    got: list[int] = []

    def deliver(*message: Any) -> None:
        body, buffers = message[-2:]
        if isinstance(buffers, link.NoRoom):
            got.append(buffers.nbytes)
        else:
            got.append(len(body) + sum(len(buffer) for buffer in buffers))

    lost: list[Link] = []
    sock = Replies(data[1:], 1 + (data[0] if data else 0))
    with mock.patch.multiple(link, blank=blank, _log=_Silent):
        ours = Link(sock, _Loop(), deliver, lost.append)
        for _ in range(len(data) + 2):
            if not ours.open:
                break
            ours._on_event(select.EPOLLIN)
    assert lost == [ours], "it did not see the end"
    assert sum(got) <= len(data), "more has come out than went in"


def releases(data: bytes) -> None:
    """Read references that are counted down."""
    assert len(triples(data)) * 24 == len(data)


# Values and messages


class Maker:
    """Makes values out of bytes: the same ones of the same bytes."""

    def __init__(self, data: bytes) -> None:
        self._left = io.BytesIO(data)

    def number(self, below: int) -> int:
        return int.from_bytes(self._left.read(1), "little") % below

    def value(self, depth: int = 0) -> Any:
        """Make one; nothing is left, nothing is made."""
        kind = self._left.read(1)
        if not kind:
            return None
        make = _MAKERS[kind[0] % (len(_MAKERS) if depth < 4 else _PLAIN)]
        return make(self, depth + 1)

    def text(self) -> str:
        return self.bytes().decode(errors="surrogateescape")

    def bytes(self) -> bytes:
        return self._left.read(self.number(256))

    def several(self, depth: int) -> Iterator[Any]:
        return (self.value(depth) for _ in range(self.number(6)))


_MAKERS: list[Callable[[Maker, int], Any]] = [
    lambda maker, _: int.from_bytes(maker.bytes(), "little", signed=True),
    lambda maker, _: maker.text(),
    lambda maker, _: maker.bytes(),
    lambda maker, _: maker.number(2) == 1,
    lambda maker, _: maker.number(256) / 7,
    lambda maker, _: complex(maker.number(256), -1),
    lambda maker, _: bytearray(maker.bytes()) * maker.number(40),
    lambda maker, _: bytearray(codec.APART_MIN + maker.number(3) - 1),
    lambda maker, depth: tuple(maker.several(depth)),
    lambda maker, depth: list(maker.several(depth)),
    lambda maker, depth: {maker.text(): each for each in maker.several(depth)},
    lambda maker, depth: frozenset(map(repr, maker.several(depth))),
    lambda maker, depth: ValueError(*maker.several(depth)).args,
]
_PLAIN = 8  # of these hold no others
_BROKEN = (EOFError, ValueError, IndexError, KeyError, pickle.UnpicklingError)


def values(data: bytes) -> None:
    """Pickle a value and read it; cut off, it is refused."""
    maker = Maker(data)
    cut = maker.number(256)
    value = maker.value()
    payload = codec.dumps(value)
    assert codec.loads(payload.body, payload.buffers) == value
    pieces, apart = codec.in_pieces(value)
    assert codec.loads(b"".join(pieces), apart.buffers) == value
    try:
        codec.loads(payload.body[: cut % len(payload.body)], payload.buffers)
    except _BROKEN:
        return
    raise AssertionError("half a value was read")


_KINDS = sorted(messages.NUMBERS, key=lambda kind: messages.NUMBERS[kind])


def controls(data: bytes) -> None:
    """Lay out a control with fields of any type, and read it as a link does."""
    maker = Maker(data)
    kind = _KINDS[maker.number(len(_KINDS))]
    sent = kind._make(maker.value() for _ in kind._fields)
    body, buffers = maker.bytes(), [maker.bytes() for _ in range(maker.number(3))]
    stream, parts = messages.packed(sent, 7, body, buffers)
    got: list[Any] = []
    said = Replies(b"".join([stream, *parts]), 200 + 99 * maker.number(256))
    ours = Link(said, _Loop(), lambda *message: got.append(message), lambda _: None)
    while ours.open:
        ours._on_event(select.EPOLLIN)
    ((_, number, _, ident, aux, behind, beside),) = got
    assert (number, ident, aux) == (frames.CONTROL, 7, messages.NUMBERS[kind])
    assert messages.decode(kind, behind) == (sent, body)
    assert [bytes(each) for each in beside] == buffers


# Files


def checkpoint(data: bytes) -> None:
    """Read a file as a map does, as users do, and as the command line does."""
    with _file(data) as path:
        try:
            summary(path)
        finally:
            try:
                look(path)
            finally:
                list(itertools.islice(read_checkpoint(path), _ITEMS))
        fd = os.open(path, os.O_RDONLY)
        try:
            found = Found.in_file(fd, path)
        finally:
            os.close(fd)
        index = 0
        for _ in range(_ITEMS):
            finished, gap = found.gap(index)
            if finished:
                found.results(index, 1)
            elif gap is None:
                break
            index += finished or gap or 0


_VALUES = pickle.dumps([1, 2, 3], 5)


def checkpoint_records(data: bytes) -> None:
    """Read records whose checksum is right and whose contents are not."""
    maker = Maker(data)
    whole = bytearray(records.MAGIC.ljust(HEAD))
    for _ in range(maker.number(4)):
        kind, count, names = maker.number(4), maker.number(256), maker.bytes()
        if kind == BY_KEY:  # pickled: what is unpickled is the user's own
            names = pickle.dumps([maker.text()], 5)
        body = records.payload(kind, 1e300 * maker.number(3), count, names, _VALUES)
        whole += records.framed(body, len(whole))
    checkpoint(bytes(whole))


def checkpoint_head(data: bytes) -> None:
    """Read who owns a file, if its checksum is right."""
    line = data + b" %08x" % records.crc32(data)
    with _file(records.MAGIC + line.ljust(HEAD - len(records.MAGIC))) as path:
        fd = os.open(path, os.O_RDONLY)
        try:
            read_owner(fd)
        finally:
            os.close(fd)


def spool(data: bytes) -> None:
    """Read what grows while a program is traced."""
    json.loads("".join(convert(io.BytesIO(data))))


def trace(data: bytes) -> None:
    """Make the page of a trace."""
    with _file(data) as path:
        assert "</html>" in page(summarize(read_trace(path)), "a title")


_ODD: tuple[Any, ...] = ("x", -1, 1e308, None, [], {}, True, float("nan"))


def trace_events(data: bytes) -> None:
    """Make the page of events, some of whose parts are missing or odd."""
    maker = Maker(data)
    events = []
    for _ in range(maker.number(6)):
        whole = {
            "ph": "XXMi"[maker.number(4)],
            "pid": maker.number(3),
            "tid": 0,
            "ts": 5,
            "dur": 1,
            "cat": ("call", "wait", "map", "message", "note")[maker.number(5)],
            "name": ("process_name", "lost", "f")[maker.number(3)],
            "args": {"name": "n", "queued_us": 2, "to": 1, "bytes": 7, "why": "w", "records": 1},
        }
        for _ in range(maker.number(3)):
            at: Any = whole.get("args") if maker.number(2) else whole
            if not isinstance(at, dict) or not at:
                continue
            name = sorted(at)[maker.number(len(at))]
            at[name] = _ODD[maker.number(len(_ODD))]
            if maker.number(4) == 0:
                del at[name]
        events.append(whole)
    assert "</html>" in page(summarize(events), "a title")


def exit_file(data: bytes) -> None:
    """Read what a job script leaves."""
    with _file(data, "exit") as path:
        found = job_watch.exit_verdict(os.path.dirname(path))
    assert found is None or isinstance(found.end, datetime)


def join_file(data: bytes) -> None:
    """Read how to come to process 1."""
    with _file(data) as path:
        assert "cookie" in read_join(path)


def keeper(data: bytes) -> None:
    """Read what a keeper says."""
    left = bytearray(data)
    assert all(isinstance(op, dict) for op in processes.unpack(left))
    assert len(left) <= len(data)


class _file:
    """A file with contents, for as long as it is looked at."""

    def __init__(self, data: bytes, name: str = "file") -> None:
        self._data, self._name = data, name

    def __enter__(self) -> str:
        self._folder = tempfile.TemporaryDirectory(prefix="hpcdist-fuzz-")
        path = Path(self._folder.name) / self._name
        path.write_bytes(self._data)
        path.chmod(0o600)
        return str(path)

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


_FRAME_WORDS = tuple(
    [frames.HEAD.pack(kind, flags, count, length, 7, 1)
     for kind in (0, frames.CALL, frames.CONTROL)
     for flags in (0, frames.BODY_APART)
     for count, length in ((0, 0), (0, 4), (1, 8), (2, 16), (1, 0), (65535, 8), (0, 2**32 - 1))]
    + [size.to_bytes(8, "little") for size in (0, 1, 5, 2**20, 2**40, 2**63, 2**64 - 1)]
)  # fmt: skip
_FILE_WORDS = (records.MAGIC, b"\xa9rec", b'{"function": {"name": "f"}', b'"items": null', b"{}")
_TRACE_WORDS = tuple(
    word.encode()
    for word in (
        *('{"ph": "X"', '"ph": "M"', '"ph": "i"', '"cat": "call"', '"cat": "message"', "},\n"),
        *('"pid": 1', '"pid": "x"', '"ts": 1e999', '"ts": "x"', '"dur": -1', '"name": 7', "["),
        *('"args": {"to": 2, "bytes": 3}', '"args": []', '"args": {"records": "x"}', "NaN", "}]"),
        *('{"traceEvents": [', '"tid": null', "{", "}", ", ", "]", "null", '"args": 1'),
    )
)
_HELLO_WORDS = tuple(len(t).to_bytes(4, "little") + t for t in (b"{}", b"[]", b'{"a":', b"\xff"))


def targets() -> list[Target]:
    """List them."""
    mismatch = (CheckpointMismatch, Damaged)
    return [
        Target("greeting of a stranger", strangers_greeting, (greeting.Refused,), "greeting"),
        Target("greeting by a stranger", dialled_stranger, (greeting.Refused,), "greeting"),
        Target("hello", hello, (greeting.Refused,), words=_HELLO_WORDS),
        Target("link", frames_of_a_link, words=_FRAME_WORDS),
        Target("releases", releases, (struct.error,)),
        Target("codec", values),
        Target("messages", controls),
        Target("checkpoint", checkpoint, mismatch, words=_FILE_WORDS),
        Target("checkpoint records", checkpoint_records, mismatch),
        Target("checkpoint head", checkpoint_head, (CheckpointMismatch,)),
        Target("trace spool", spool, (ValueError,)),
        Target("trace", trace, (ValueError,), words=_TRACE_WORDS),
        Target("trace events", trace_events, (ValueError,)),
        Target("exit file", exit_file),
        Target("join file", join_file, (CannotJoin,)),
        Target("keeper", keeper, (ValueError,), words=_HELLO_WORDS),
    ]
