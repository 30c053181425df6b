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
from typing import Any

_MAGIC = b"hpcdist1"
_NONCE = 16
_DIGEST = 32
_LENGTH = struct.Struct("<I")
_HELLO_MAX = 1 << 20


class Refused(ConnectionError):
    """The other side is not one of ours."""


def about() -> dict[str, Any]:
    """Return what a process says of itself."""
    return {
        "host": socket.gethostname(),
        "os_pid": os.getpid(),
        "python": sys.version.split()[0],
        "hpcdist": sys.modules["hpcdist"].__version__,
    }


def accept(sock: Any, cookie: bytes, timeout: float) -> dict[str, Any]:
    """Greet whoever dialled; return what they say of themselves."""
    sock.settimeout(timeout)
    ours = os.urandom(_NONCE)
    sock.sendall(_MAGIC + ours)
    opening = _exactly(sock, len(_MAGIC) + _NONCE + _DIGEST)
    if opening[: len(_MAGIC)] != _MAGIC:
        raise Refused("a stranger dialled: it does not speak this protocol")
    theirs = opening[len(_MAGIC) : -_DIGEST]
    if not hmac.compare_digest(opening[-_DIGEST:], _proof(cookie, b"dial", ours, theirs)):
        raise Refused("a stranger dialled: it does not know this cluster's cookie")
    sock.sendall(_proof(cookie, b"accept", theirs, ours))
    return receive_hello(sock)


def dial(sock: Any, cookie: bytes, hello: dict[str, Any], timeout: float) -> None:
    """Greet the process we dialled and say who we are."""
    sock.settimeout(timeout)
    opening = _exactly(sock, len(_MAGIC) + _NONCE)
    if opening[: len(_MAGIC)] != _MAGIC:
        raise Refused("what answered there does not speak this protocol")
    theirs, ours = opening[len(_MAGIC) :], os.urandom(_NONCE)
    sock.sendall(_MAGIC + ours + _proof(cookie, b"dial", theirs, ours))
    if not hmac.compare_digest(_exactly(sock, _DIGEST), _proof(cookie, b"accept", ours, theirs)):
        raise Refused("what answered there does not know this cluster's cookie")
    send_hello(sock, hello)


def send_hello(sock: Any, hello: dict[str, Any]) -> None:
    """Send one JSON object, its length before it."""
    data = json.dumps(hello).encode()
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive_hello(sock: Any) -> dict[str, Any]:
    """Receive one JSON object."""
    (size,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    if size > _HELLO_MAX:
        raise Refused("the greeting is too long")
    said = json.loads(_exactly(sock, size))
    if not isinstance(said, dict):
        raise Refused("the greeting is not an object")
    return said


def _proof(cookie: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(cookie, role + first + second, "sha256")


def _exactly(sock: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise Refused("the connection ended during the greeting")
        data += part
    return bytes(data)
