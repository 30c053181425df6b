"""The first words on a link: both sides prove the cookie before a byte is unpickled.

A challenge each way: the cookie itself never travels, and a recorded greeting is of no use.
Then each side says who it is, as JSON.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import struct
import sys
from collections.abc import Generator, Sequence
from typing import Any, Protocol, TypeAlias

from hpcdist import _version
from hpcdist._wire.frames import Buffer

Hello: TypeAlias = dict[str, Any]  # what a process says of itself, as JSON
Talk: TypeAlias = Generator[bytes | int, bytes, Hello]

_MAGIC = b"hpcdist1"
_NONCE = 16
_DIGEST = 32
_LENGTH = struct.Struct("<I")
_HELLO_MAX = 1 << 20


class Socket(Protocol):
    """A connection: a plain socket, or TLS, which has its manners."""

    def fileno(self) -> int: ...
    def setblocking(self, flag: bool, /) -> None: ...
    def settimeout(self, value: float | None, /) -> None: ...
    def setsockopt(self, level: int, name: int, value: int, /) -> None: ...
    def recv(self, size: int, /) -> bytes: ...
    def recv_into(self, buffer: memoryview, /) -> int: ...
    def send(self, data: Buffer, /) -> int: ...
    def sendall(self, data: Buffer, /) -> None: ...
    def sendmsg(self, views: Sequence[memoryview], /) -> int: ...
    def detach(self) -> int: ...
    def close(self) -> None: ...


class Refused(ConnectionError):
    """The other side is not one of ours."""


def about() -> Hello:
    """Return what a process says of itself."""
    return {
        "host": socket.gethostname(),
        "os_pid": os.getpid(),
        "python": sys.version.split()[0],
        "hpcdist": _version.VERSION,
    }


def accept(sock: Any, cookie: bytes, timeout: float) -> dict[str, Any]:
    """Greet a dialler; return what it says of itself."""
    sock.settimeout(timeout)
    return _carry_out(accepting(cookie), sock)


def accepting(cookie: bytes) -> Talk:
    """Greet a dialler, without a socket: yield the bytes to send, and how many to await.

    Each `yield` of bytes is answered by nothing, each of a number by as many bytes as were awaited.

    >>> talk = accepting(b"secret")
    >>> next(talk)[:8]
    b'hpcdist1'
    >>> talk.send(b"")
    56
    """
    ours = os.urandom(_NONCE)
    yield _MAGIC + ours
    opening = yield len(_MAGIC) + _NONCE + _DIGEST
    if opening[: len(_MAGIC)] != _MAGIC:
        raise Refused("a stranger dialled: it does not speak this protocol")
    theirs = opening[len(_MAGIC) : -_DIGEST]
    if not hmac.compare_digest(opening[-_DIGEST:], _proof(cookie, b"dial", ours, theirs)):
        raise Refused("a stranger dialled: it does not know this cluster's cookie")
    yield _proof(cookie, b"accept", theirs, ours)
    return (yield from _hello())


def dial(sock: Socket, cookie: bytes, hello: Hello, timeout: float) -> None:
    """Greet the process we dialled and say who we are."""
    sock.settimeout(timeout)
    opening = _exactly(sock, len(_MAGIC) + _NONCE)
    if opening[: len(_MAGIC)] != _MAGIC:
        raise Refused("the process that answered does not speak this protocol")
    theirs, ours = opening[len(_MAGIC) :], os.urandom(_NONCE)
    sock.sendall(_MAGIC + ours + _proof(cookie, b"dial", theirs, ours))
    if not hmac.compare_digest(_exactly(sock, _DIGEST), _proof(cookie, b"accept", ours, theirs)):
        raise Refused("the process that answered does not know this cluster's cookie")
    send_hello(sock, hello)


def send_hello(sock: Socket, hello: Hello) -> None:
    """Send one JSON object, its length before it."""
    data = json.dumps(hello).encode()
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive_hello(sock: Socket) -> Hello:
    """Receive one JSON object."""
    return _carry_out(_hello(), sock)


def _hello() -> Talk:
    (size,) = _LENGTH.unpack((yield _LENGTH.size))
    if size > _HELLO_MAX:
        raise Refused("the greeting is too long")
    try:
        said = json.loads((yield size))
    except (ValueError, RecursionError):
        raise Refused("the greeting is no JSON") from None
    if not isinstance(said, dict):
        raise Refused("the greeting is not an object")
    return said


def _proof(cookie: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(cookie, role + first + second, "sha256")


def _carry_out(talk: Talk, sock: Socket) -> Hello:
    try:
        step = next(talk)
        while True:
            if isinstance(step, int):
                step = talk.send(_exactly(sock, step))
            else:
                sock.sendall(step)
                step = talk.send(b"")
    except StopIteration as exc:
        said: Hello = exc.value
        return said


def _exactly(sock: Socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise Refused("the connection ended during the greeting")
        data += part
    return bytes(data)
