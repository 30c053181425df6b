"""The sure plane: a stream (a socket, or TLS) to one process, read and written by the driver.

The stream is messages one after the other, each followed by its buffers. Nothing blocks: what
the socket does not take now waits in a queue until it can be written.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from hpcdist import _log
from hpcdist._transport.contracts import Deliver, Item
from hpcdist._transport.mpi import Message
from hpcdist._transport.wait_loop import WaitLoop
from hpcdist._wire.blocks import NoRoom, blank, scrap
from hpcdist._wire.frames import BODY_APART, HEAD, HEAD_SIZE, Buffer, Garbled, sizes
from hpcdist._wire.greeting import Socket

_READ = 256 * 1024
_GATHER = 64  # buffers in one system call
_unpack = HEAD.unpack_from
_NOTHING = memoryview(bytearray())
_SOCKET_BUFFER = 4 << 20
_QUIET = 0.005  # seconds after which the other end may have fallen asleep
_GULPS = 64  # reads before others have their turn


def _reading_room() -> memoryview:
    """Make the memory that a link reads to; what is never filled takes none.

    Most of a thousand links bring some hundred bytes now and then. A bytearray would be written all
    over with zeros first: 256 KB a link.
    """
    room = mmap.mmap(-1, _READ, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_NOHUGEPAGE)
    return memoryview(room)


class Link:
    """One end of a link."""

    def __init__(
        self,
        sock: Socket,
        progress: WaitLoop,
        deliver: Deliver,
        ended: Callable[[Link], None],
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        # TLS may hold what the kernel no longer has: epoll would not tell.
        self._held: Callable[[], int] | None = getattr(sock, "pending", None)
        if self._held is None:  # TCP chooses its own, and better
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        self.peer: Any = None
        self.open = True
        self._progress = progress
        self._deliver = deliver
        self._ended = ended
        self._out: deque[memoryview] = deque()
        self._ends: deque[list[Any]] = deque()  # [buffers left before, what to call then]
        self._gone = 0  # how many buffers have been handed to the kernel
        self._writing = False
        self._room = _reading_room()
        self._start = 0  # what has been read and not yet parsed: _room[_start:_end]
        self._end = 0
        self._message: Message | None = None
        self._buffers: Sequence[Buffer] | NoRoom = []
        self._missing: deque[memoryview] = deque()
        self._unwanted = 0  # bytes behind these that are to be read away
        self.last_sent = 0.0

    def begin(self) -> None:
        """Let the driver read from now on."""
        self._progress.register(self.sock.fileno(), self._on_event, select.EPOLLIN)

    # Writing

    def send(self, items: Sequence[Item]) -> None:
        """Send messages with their buffers."""
        if not self.open:
            return
        now = time.monotonic()
        if now - self.last_sent > _QUIET:
            self._progress.woke = True
        self.last_sent = now
        if not self._out and len(items) == 1 and type(items[0]) is bytes:
            data = items[0]
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.lose()
                return
            if sent < len(data):
                self._out.append(memoryview(data)[sent:])
                self._want_write()
            return
        plain: list[bytes] = []
        for item in items:
            if not isinstance(item, tuple):
                plain.append(item)
                continue
            plain.append(item[0])
            self._out.append(memoryview(b"".join(plain)))
            plain = []
            self._out.extend(memoryview(b).cast("B") for b in item[1])
            if item[2] is not None:
                self._ends.append([self._gone + len(self._out), item[2]])
        if plain:
            self._out.append(memoryview(b"".join(plain)))
        self._write()

    def _write(self) -> None:
        out = self._out
        try:
            while out:
                if len(out) == 1:
                    sent = self.sock.send(out[0])
                else:
                    sent = self.sock.sendmsg([out[k] for k in range(min(len(out), _GATHER))])
                while out and sent >= out[0].nbytes:
                    sent -= out.popleft().nbytes
                    self._gone += 1
                while self._ends and self._gone >= self._ends[0][0]:
                    self._ends.popleft()[1]()
                if sent:
                    out[0] = out[0][sent:]
        except BlockingIOError:
            self._want_write()
            return
        except OSError:
            self.lose()
            return
        if self._writing:
            self._writing = False
            self._progress.modify(self.sock.fileno(), select.EPOLLIN)

    def _want_write(self) -> None:
        if not self._writing:
            self._writing = True
            self._progress.modify(self.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    @property
    def idle(self) -> bool:
        """Whether everything given to `send` has been handed to the kernel."""
        return not self._out

    # Reading

    def _on_event(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._write()
        if self.open and events & ~select.EPOLLOUT:
            self._read()
            while self._held is not None and self.open and self._held():
                self._read()

    def _read(self) -> None:
        try:
            if self._missing:
                for _ in range(_GULPS):
                    size = self.sock.recv_into(self._missing[0])
                    if not size:
                        break
                    self._filled(size)
                    if not self._missing:
                        break
            else:
                if self._start == self._end:
                    self._start = self._end = 0
                elif self._end == _READ:
                    left = self._end - self._start
                    self._room[:left] = bytes(self._room[self._start : self._end])
                    self._start, self._end = 0, left
                size = self.sock.recv_into(self._room[self._end :])
                if size:
                    self._end += size
                    self._parse()
        except BlockingIOError:
            return
        except Garbled as exc:  # there is no way to find the next message
            _log.log("warning", f"the link to process {getattr(self.peer, 'pid', '?')} ends: {exc}")
            size = 0
        except OSError:
            size = 0
        if not size and self.open:
            self.lose()

    def _parse(self) -> None:
        room = self._room
        while self._end - self._start >= HEAD_SIZE:
            kind, flags, count, length, ident, aux = _unpack(room, self._start)
            start = self._start + HEAD_SIZE
            if self._end - start < length:
                if length > _READ - HEAD_SIZE:
                    raise Garbled(f"a message of {length:,} bytes without buffers")
                return
            body = bytes(room[start : start + length])
            self._start = start + length
            if count:
                self._await_buffers((kind, flags, ident, aux, body[8 * count :]), body, count)
                if self._missing:
                    return
            else:
                self._deliver(self.peer, kind, flags, ident, aux, body, ())
                if not self.open:
                    return

    def _await_buffers(self, message: Message, body: bytes, count: int) -> None:
        self._message = message
        announced = sizes(body, count)
        try:
            self._buffers = [blank(n) for n in announced]
            self._missing = deque(memoryview(b) for b in self._buffers if len(b))
        except MemoryError:
            self._buffers = NoRoom(sum(announced))
            self._missing = deque()
            self._unwanted = self._buffers.nbytes
            self._read_away()
        while self._missing and self._start < self._end:
            target = self._missing[0]
            size = min(target.nbytes, self._end - self._start)
            target[:size] = self._room[self._start : self._start + size]
            self._start += size
            self._advance(size)
        if not self._missing:
            self._complete()

    def _filled(self, size: int) -> None:
        self._advance(size)
        if not self._missing:
            self._complete()

    def _advance(self, size: int) -> None:
        target = self._missing[0]
        if size == target.nbytes:
            self._missing.popleft()
            if self._unwanted:
                self._read_away()
        else:
            self._missing[0] = target[size:]

    def _read_away(self) -> None:
        """Wait for a part of what there is no room for; any number may have been announced."""
        size = min(self._unwanted, len(scrap))
        self._unwanted -= size
        self._missing.append(memoryview(scrap)[:size])

    def _complete(self) -> None:
        assert self._message is not None
        kind, flags, ident, aux, body = self._message
        buffers = self._buffers
        self._message, self._buffers = None, []
        if flags & BODY_APART and not isinstance(buffers, NoRoom):
            body, buffers = buffers[0], buffers[1:]
        self._deliver(self.peer, kind, flags, ident, aux, body, buffers)

    # Ending

    def lose(self) -> None:
        """Close the link because its other end is gone, and tell."""
        if self.open:
            self.close()
            self._ended(self)

    def close(self) -> None:
        """Close the link quietly."""
        if self.open:
            self.open = False
            self._progress.unregister(self.sock.fileno())
            self.sock.close()
            self._out.clear()
            # A reference to the dead process must not keep its buffers.
            self._room = _NOTHING
            self._start = self._end = 0
            while self._ends:
                self._ends.popleft()[1]()

    def forget_after_fork(self) -> None:
        """Close this copy of the socket in a forked child: the link goes on without it."""
        if self.open:
            self.open = False
            with suppress(OSError):
                os.close(self.sock.detach())
