"""Memory for buffers that are about to arrive, kept warm between messages.

The first touch of fresh memory costs more than the transfer: 64 MiB arrive in 14 ms in memory
that is mapped, in 26 ms in fresh huge pages, and in 60-70 ms in fresh small ones (a bytearray, or
a *shared* anonymous mapping, which is what `mmap.mmap(-1, n)` makes by default).
So blocks are used again. A block is free as soon as the pool holds the only reference to
it: a user of its memory, an array for instance, holds one too. A block that was not used for a
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

# How many references a block has when only the pool holds it; interpreters count differently.
_probe = [object()]
_ALONE = getrefcount(_probe[0])


class NoRoom:
    """Stands for the buffers of a message for which there was no memory: they were read away."""

    __slots__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


scrap = bytearray(1 << 18)  # where such buffers go; made now, while there is memory


class _Pool:
    """The blocks of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._blocks: list[mmap.mmap] = []
        self._kept = 0  # bytes in them
        self._last_use = 0.0

    def block(self, size: int) -> memoryview:
        """Return memory of whole pages, `size` bytes of it."""
        whole = -(-size // _PAGE) * _PAGE
        with self._lock:
            self._last_use = time.monotonic()
            best = self._free_one(whole)
            if best is None:
                best = _mapped(whole)
                if self._kept + whole > _KEPT_MOST:
                    self._drop_free()
                if self._kept + whole <= _KEPT_MOST:
                    self._blocks.append(best)
                    self._kept += whole
            view = memoryview(best)
        return view if whole == size else view[:size]

    def trim(self) -> None:
        """Give the memory back that was not used for a while. Called before the driver sleeps."""
        if self._blocks and time.monotonic() - self._last_use > _KEPT_FOR:
            with self._lock:
                self._drop_free()

    def _free_one(self, whole: int) -> mmap.mmap | None:
        best = None
        blocks = self._blocks
        for k in range(len(blocks)):
            length = len(blocks[k])
            if (
                whole <= length <= whole * _SPARE
                and (best is None or length < len(best))
                and getrefcount(blocks[k]) == _ALONE
            ):
                best = blocks[k]
                if length == whole:
                    break
        return best

    def _drop_free(self) -> None:
        for k in reversed(range(len(self._blocks))):
            if getrefcount(self._blocks[k]) == _ALONE:
                self._kept -= len(self._blocks[k])
                del self._blocks[k]


def _mapped(whole: int) -> mmap.mmap:
    try:
        made = mmap.mmap(-1, whole, flags=_FLAGS)
    except (OSError, OverflowError) as exc:  # which a link would take for its own
        raise MemoryError(f"{whole:,} bytes: {exc}") from None
    made.madvise(mmap.MADV_HUGEPAGE)
    return made


_pool = _Pool()
trim = _pool.trim


def blank(size: int) -> Buffer:
    """Make writable memory, its contents arbitrary, for a buffer that is about to arrive.

    Raises:
        MemoryError: There is none.
    """
    return bytearray(size) if size < _SMALL else _pool.block(size)
