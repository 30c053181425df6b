"""Messages as bytes: a fixed header, a body, and buffers that travel beside it.

A frame is any number of messages one after the other. On a link each message's buffers follow
it in the stream; over MPI they are messages of their own, in the same order.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence

HEAD = struct.Struct("<BBHIQQ")  # kind, flags, number of buffers, length of the body, id, aux
HEAD_SIZE = HEAD.size

CALL, RESULT, CONTROL = 1, 2, 3

# Flags of every kind: the body itself is the first buffer.
BODY_APART = 0x80
# Flags of a call: what the caller wants back (two bits), and how the body is laid out.
DO, FETCH, FUTURE, WAIT = 0, 1, 2, 3
WANTS = 0x03
DEFINES = 0x04  # the function's definition precedes the arguments
EXTRAS = 0x08  # (extras, args, kwargs) rather than args: captured values or globals travel too
KEYWORDS = 0x10  # (args, kwargs) rather than args
ASYNC = 0x20  # a coroutine function: runs on the event loop and takes no turn
REFS = 0x40  # references inside: their ids precede everything else (calls and results)
# Flags of a result: how the call ended.
OK, FAILED, CANCELLED, KEPT, OURS, WAITED = 0, 1, 2, 3, 4, 5
OUTCOME = 0x0F

BODY_MAX = 64 * 1024  # a longer body travels as a buffer, so that frames stay small
FRAME_MAX = 8 * 1024  # small messages are gathered up to this size

Buffer = bytes | bytearray | memoryview | mmap.mmap
Body = bytes | bytearray | memoryview  # what follows the head of a message
_SIZE = struct.Struct("<Q")


def pack(
    kind: int,
    flags: int,
    ident: int,
    aux: int,
    body: bytes = b"",
    buffers: Sequence[Buffer] = (),
) -> tuple[bytes, Sequence[Buffer]]:
    """Lay out one message: its header and body, and the buffers that follow it."""
    if len(body) > BODY_MAX:
        buffers = [body, *buffers]
        body = b""
        flags |= BODY_APART
    if buffers:
        views = [memoryview(b).cast("B") for b in buffers]
        body = b"".join([_SIZE.pack(v.nbytes) for v in views]) + body
        head = HEAD.pack(kind, flags, len(views), len(body), ident, aux)
        return head + body, views
    return HEAD.pack(kind, flags, 0, len(body), ident, aux) + body, ()


class Garbled(ConnectionError):
    """What came on a connection are no messages."""


def sizes(body: Buffer, count: int) -> list[int]:
    """Read the sizes of the buffers announced at the front of a body.

    Raises:
        Garbled: The body is shorter than that.
    """
    if 8 * count > len(body):
        raise Garbled(f"{count} buffers are announced in {len(body)} bytes")
    return [_SIZE.unpack_from(body, 8 * k)[0] for k in range(count)]
