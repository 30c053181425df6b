"""Transports of a manager's own: bytes between a pair of streams and an ordinary link.

A link wants a socket that it can wait on. A plain socket is one; for anything else two threads
carry the bytes between the streams and a socket pair, whose other end the link gets.
"""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Callable
from typing import Any

from hpcdist._runtime.node import Node, Service
from hpcdist._transport.link import Link

_CHUNK = 256 * 1024


class Streams(Service):
    """The streams that stand behind links of this process."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.lock()  # guards _attached
        self._attached: list[tuple[Any, Any, socket.socket]] = []  # reader, writer, the link's end

    def attach(self, reader: Any, writer: Any) -> socket.socket:
        """Return a socket that stands for a pair of streams.

        Args:
            reader: Has `recv`, `read1` or `read`; `read(n)` returns what there is, a byte or more.
            writer: Has `sendall` or `write`.
        """
        reader, writer = _binary(reader), _binary(writer)
        if reader is writer and _is_plain(reader):
            if reader.family in (socket.AF_INET, socket.AF_INET6):
                reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock: socket.socket = reader
        else:
            receive, send = _receiver(reader), _sender(writer)
            sock, near = socket.socketpair()
            carry = lambda: _carry(reader, writer, receive, send, near)
            threading.Thread(target=carry, name="hpcdist-stream", daemon=True).start()
        with self._lock:
            self._attached[:] = [a for a in self._attached if a[2].fileno() >= 0]
            self._attached.append((reader, writer, sock))
        return sock

    def pid_behind(self, x: object) -> int:
        """Return the pid of the process at the other end of a stream; -1 if that is not known."""
        if isinstance(x, Link):
            return x.peer.pid if x.peer is not None else -1
        links = [(peer.pid, peer.link) for peer in self.node.peers.values()]
        ends = [(pid, link.sock) for pid, link in links if isinstance(link, Link) and link.open]
        with self._lock:
            attached = list(self._attached)
        for reader, writer, sock in attached:
            if _is_one_of(x, (reader, writer, sock)):
                return next((pid for pid, end in ends if end is sock), -1)
        return next((pid for pid, end in ends if _is_one_of(x, (end,))), -1)


def _binary(stream: object) -> Any:
    return stream.buffer if isinstance(stream, io.TextIOWrapper) else stream


def _is_plain(stream: object) -> bool:
    # Exactly this class: an SSLSocket is one too, and its bytes are not those on the wire.
    return type(stream) is socket.socket and stream.type == socket.SOCK_STREAM


def _receiver(reader: object) -> Callable[[int], bytes]:
    if isinstance(reader, socket.socket):
        reader.settimeout(None)
    for name in ("recv", "read1", "read"):
        method: Callable[[int], bytes] | None = getattr(reader, name, None)
        if method is not None:
            return method
    raise TypeError(f"a reader needs recv() or read(), and {reader!r} has neither")


def _sender(writer: object) -> Callable[[bytes], None]:
    if isinstance(writer, socket.socket):
        writer.settimeout(None)
    if hasattr(writer, "sendall"):
        whole: Callable[[bytes], None] = writer.sendall
        return whole
    if not hasattr(writer, "write"):
        raise TypeError(f"a writer needs sendall() or write(), and {writer!r} has neither")
    flush = getattr(writer, "flush", None)

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = writer.write(view)
            view = view[written:] if written is not None else view[:0]
        if flush is not None:
            flush()

    return write


def _carry(
    reader: object,
    writer: Any,
    receive: Callable[[int], bytes],
    send: Callable[[bytes], None],
    near: socket.socket,
) -> None:
    carry_in = lambda: _carry_in(reader, receive, near)
    incoming = threading.Thread(target=carry_in, name="hpcdist-stream-in", daemon=True)
    incoming.start()
    with contextlib.suppress(OSError, ValueError):  # either end is gone, or a file was closed
        while data := near.recv(_CHUNK):
            send(data)
    for stream in (reader, writer):
        if isinstance(stream, socket.socket):  # wakes a reader there, which close() does not
            with contextlib.suppress(OSError, ValueError):
                stream.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError, ValueError):
        writer.close()
    incoming.join()
    near.close()


def _carry_in(reader: Any, receive: Callable[[int], bytes], near: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := receive(_CHUNK):
            near.sendall(data)
    with contextlib.suppress(OSError):
        near.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError, ValueError):
        reader.close()


def _is_one_of(x: object, streams: tuple[object, ...]) -> bool:
    if isinstance(x, int) and not isinstance(x, bool):
        return x >= 0 and any(_number(stream) == x for stream in streams)
    return any(_binary(x) is stream for stream in streams)


def _number(stream: Any) -> int:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return -1
