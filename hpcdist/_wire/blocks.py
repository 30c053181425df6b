"""Memory for buffers that are about to arrive, kept warm between messages.

The first touch of fresh memory costs more than the transfer: 64 MiB arrive in 14 ms in memory
that is mapped, in 26 ms in fresh huge pages, and in 60-70 ms in fresh small ones (a bytearray, or
a *shared* anonymous mapping, which is what `mmap.mmap(-1, n)` makes unless it is told otherwise).
So blocks are used again. A block is free as soon as the list below holds the only reference to
it: whoever looks at its memory, an array for instance, holds one too. What nobody used for a
while goes back to the system before the driver sleeps.
"""

from __future__ import annotations

import mmap
import threading
import time
from sys import getrefcount

from hpcdist._wire.frames import Buffer

_SMALL = 1 << 20  # below, the allocator's own memory is warm enough
_PAGE = 1 << 21
_KEPT_MOST = 256 << 20  # what is watched for being used again, in use or free
_SPARE = 1.25  # a block may be so much larger than what is asked for
_KEPT_FOR = 1.0  # seconds
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

_lock = threading.Lock()  # guards all below
_blocks: list[mmap.mmap] = []
_kept = 0
_last_use = 0.0

# How many references a block has when only the list holds it; interpreters count differently.
_probe = [object()]
_ALONE = getrefcount(_probe[0])


def blank(size: int) -> Buffer:
    """Make writable memory, its contents arbitrary, for a buffer that is about to arrive."""
    global _kept, _last_use
    if size < _SMALL:
        return bytearray(size)
    whole = -(-size // _PAGE) * _PAGE
    with _lock:
        _last_use = time.monotonic()
        best = None
        for k in range(len(_blocks)):
            length = len(_blocks[k])
            if (
                whole <= length <= whole * _SPARE
                and (best is None or length < len(best))
                and getrefcount(_blocks[k]) == _ALONE
            ):
                best = _blocks[k]
                if length == whole:
                    break
        if best is None:
            best = mmap.mmap(-1, whole, flags=_FLAGS)
            best.madvise(mmap.MADV_HUGEPAGE)
            if _kept + whole > _KEPT_MOST:
                _drop_free()
            if _kept + whole <= _KEPT_MOST:
                _blocks.append(best)
                _kept += whole
        view = memoryview(best)
    return view if whole == size else view[:size]


def trim() -> None:
    """Give the memory back that was not used for a while. Called before the driver sleeps."""
    if _blocks and time.monotonic() - _last_use > _KEPT_FOR:
        with _lock:
            _drop_free()


def _drop_free() -> None:
    global _kept
    for k in reversed(range(len(_blocks))):
        if getrefcount(_blocks[k]) == _ALONE:
            _kept -= len(_blocks[k])
            del _blocks[k]
