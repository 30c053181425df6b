"""Shared memory for values that several processes of a host hold: written once, read by all.

A segment is a memfd: it has no name, so nothing is left behind whoever dies. Others of the same
user and host open it through `/proc/<pid>/fd/<n>` of its maker and map it read-only. To fill a
fresh one costs ten times as much as one whose pages are there already, hence the pool: a segment
is used again when every process has dropped its views, and mappings stay for the next use.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hpcdist._wire.frames import Buffer

SHARED_MIN = 256 * 1024  # a smaller value is sent to each
_FREE_MOST = 4  # segments kept for the next value
_FREE_BYTES = 256 << 20  # what they have in all, unless it is one alone
_FREE_FOR = 10.0  # seconds for which they are kept
_MAPPED_MOST = 16  # segments of others kept mapped
_ALIGN = 64
_STEP = 1 << 20

# How a process finds a segment: (maker's pid, its os pid, its descriptor, inode, size).
Place = tuple[int, int, int, int, int]


class Segment:
    """A piece of shared memory of ours."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // _STEP) * _STEP
        self.fd = os.memfd_create("hpcdist", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.size)
            self.memory = mmap.mmap(self.fd, self.size)
            self.inode = os.fstat(self.fd).st_ino
        except BaseException:
            os.close(self.fd)
            raise
        self.users: Counter[int] = Counter()  # how many views each process may still have
        self.kept = False  # whether the value in it is still held by its owner
        self.free_since = 0.0

    def place(self, maker: int) -> Place:
        """Say how others find it."""
        return maker, os.getpid(), self.fd, self.inode, self.size

    def close(self) -> None:
        """Give the memory back, as far as we are concerned."""
        try:
            self.memory.close()
        except BufferError:  # an error that is kept somewhere has a view of it: it goes with that
            pass
        os.close(self.fd)


_lock = threading.Lock()  # guards the pool
_pool: dict[int, Segment] = {}  # ours, by inode


def lend(size: int) -> Segment:
    """Find a free segment, or make one."""
    with _lock:
        fit = [s for s in _pool.values() if _is_free(s) and _fits(s, size)]
        found = min(fit, key=lambda s: s.size, default=None)
        if found is None:
            found = Segment(size)
            _pool[found.inode] = found
        found.kept = True
        found.free_since = 0.0
        return found


def enter(segment: Segment, pids: Iterable[int]) -> None:
    """These processes get a view each."""
    with _lock:
        segment.users.update(pids)


def is_draining(size: int) -> bool:
    """Tell whether no segment is free now and one is about to be."""
    with _lock:
        fit = [s for s in _pool.values() if not s.kept and _fits(s, size)]
        return bool(fit) and not any(_is_free(s) for s in fit)


def _fits(segment: Segment, size: int) -> bool:
    return size <= segment.size <= 4 * size + _STEP


def _is_free(segment: Segment) -> bool:
    return not segment.kept and not segment.users


def release(segment: Segment) -> list[int]:
    """The value in a segment is no longer held; return the inodes of segments now closed."""
    with _lock:
        segment.kept = False
        return _shrink()


def left(inode: int, pid: int) -> list[int]:
    """A process has dropped a view; return the inodes of segments now closed."""
    with _lock:
        segment = _pool.get(inode)
        if segment is not None:
            segment.users[pid] -= 1
            if segment.users[pid] <= 0:
                del segment.users[pid]
        return _shrink()


def left_all(pid: int) -> list[int]:
    """A process is dead: it has no views; return the inodes of segments now closed."""
    with _lock:
        for segment in _pool.values():
            del segment.users[pid]  # nothing happens where it has none
        return _shrink()


def close_free() -> list[int]:
    """Close what nobody uses; return the inodes of segments now closed."""
    with _lock:
        return _shrink(0)


def close_idle() -> list[int]:
    """Close what nobody has used for a while; return the inodes of segments now closed."""
    if not _pool:
        return []
    before = time.monotonic() - _FREE_FOR
    with _lock:
        return _close(s for s in _pool.values() if _is_free(s) and s.free_since < before)


def _shrink(keep: int = _FREE_MOST) -> list[int]:
    free = [s for s in _pool.values() if _is_free(s)]
    for segment in free:
        segment.free_since = segment.free_since or time.monotonic()
    nbytes = sum(s.size for s in free)
    surplus = []
    while len(free) > keep or (len(free) > 1 and nbytes > _FREE_BYTES):
        surplus.append(free.pop(0))
        nbytes -= surplus[-1].size
    return _close(surplus)


def _close(meant: Iterable[Segment]) -> list[int]:
    closed = []
    for segment in list(meant):
        del _pool[segment.inode]
        segment.close()
        closed.append(segment.inode)
    return closed


def lay_out(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Place parts one behind the other; return their offsets and the size of all."""
    offsets = []
    end = 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGN) * _ALIGN
    return offsets, end


def fill(segment: Segment, parts: Sequence[Buffer], offsets: Sequence[int]) -> None:
    """Write parts into a segment."""
    with memoryview(segment.memory) as memory:
        for part, offset in zip(parts, offsets, strict=True):
            view = memoryview(part).cast("B")
            memory[offset : offset + view.nbytes] = view


# Mapping the segments of others (and, to read them, our own)


class _Mapping:
    """A segment in our address space, read-only."""

    def __init__(self, place: Place) -> None:
        _, os_pid, fd, inode, size = place
        mine = os.open(f"/proc/{os_pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(mine).st_ino != inode:
                raise OSError(f"descriptor {fd} of process {os_pid} is something else")
            self.address = _map(mine, size)
        finally:
            os.close(mine)
        self.size = size
        self.views = 0

    def close(self) -> None:
        _libc().munmap(self.address, self.size)


_mapped: dict[tuple[int, int], _Mapping] = {}  # by (maker's pid, inode), least used first
_exports: dict[int, tuple[Any, Callable[[], None]]] = {}
_map_lock = threading.RLock()  # guards the two above; re-entrant, as views die at any moment


def view(place: Place, on_drop: Callable[[], None]) -> memoryview:
    """Map a segment and return a read-only view of it.

    Args:
        place: The segment.
        on_drop: Called, at any moment and from any thread, when the last view has gone.

    Raises:
        OSError: It cannot be opened from here.
    """
    import ctypes  # 4 ms: not at start-up

    key = (place[0], place[3])
    with _map_lock:
        mapping = _mapped.pop(key, None) or _Mapping(place)
        _mapped[key] = mapping
        mapping.views += 1
        _forget_some()
    exporter = (ctypes.c_char * mapping.size).from_address(mapping.address)
    number = id(exporter)

    def gone(_: Any) -> None:
        with _map_lock:
            _exports.pop(number, None)
            mapping.views -= 1
        on_drop()

    with _map_lock:
        _exports[number] = (weakref.ref(exporter, gone), on_drop)
    return memoryview(exporter).cast("B").toreadonly()


def _forget_some() -> None:
    """Keep few mappings that nobody uses."""
    spare = [key for key, mapping in _mapped.items() if not mapping.views]
    for key in spare[: max(0, len(_mapped) - _MAPPED_MOST)]:
        _mapped.pop(key).close()


def unmap(maker: int, inodes: Sequence[int] | None = None) -> None:
    """Forget segments that their maker has closed; all of them, if it is dead."""
    with _map_lock:
        for key in list(_mapped):
            meant = key[0] == maker and (inodes is None or key[1] in inodes)
            if meant and not _mapped[key].views:
                _mapped.pop(key).close()


_library: Any = None


def _libc() -> Any:
    global _library
    if _library is None:
        import ctypes

        _library = ctypes.CDLL(None, use_errno=True)
        _library.mmap.restype = ctypes.c_void_p
        _library.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        _library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return _library


def _map(fd: int, size: int) -> int:
    """Map a descriptor read-only, its page table filled; Python's mmap hides the address."""
    import ctypes

    address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED | mmap.MAP_POPULATE, fd, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(address)
