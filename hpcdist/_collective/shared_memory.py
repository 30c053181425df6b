"""Shared memory for values that several processes of a host hold: written once, read by all.

A segment is a memfd: it has no name, so nothing is left behind when a process dies. Others of the
same user and host open it through `/proc/<pid>/fd/<n>` of its maker and map it read-only. To fill
a fresh one costs ten times as much as one whose pages are there already, hence the pool: a segment
is used again when every process has dropped its views, and mappings stay for the next use.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from hpcdist._runtime.node import Node, Service
from hpcdist._wire.frames import Buffer
from hpcdist._wire.messages import Place

if TYPE_CHECKING:
    import ctypes

SHARED_MIN = 256 * 1024  # a smaller value is sent to each
_FREE_MOST = 4  # segments kept for the next value
_FREE_BYTES = 256 << 20  # what they have in all, unless it is one alone
_FREE_FOR = 10.0  # seconds for which they are kept
_MAPPED_MOST = 16  # segments of others kept mapped
_ALIGN = 64
_STEP = 1 << 20


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
        return Place(maker, os.getpid(), self.fd, self.inode, self.size)

    def close(self) -> None:
        """Give the memory back, as far as we are concerned."""
        try:
            self.memory.close()
        except BufferError:  # an error that is kept somewhere has a view of it: it goes with that
            pass
        os.close(self.fd)


class Segments(Service):
    """The segments of this process."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.lock()  # guards the pool
        self._pool: dict[int, Segment] = {}  # by inode

    def lend(self, size: int) -> Segment:
        """Find a free segment, or make one."""
        with self._lock:
            fit = [s for s in self._pool.values() if _is_free(s) and _fits(s, size)]
            found = min(fit, key=lambda s: s.size, default=None)
            if found is None:
                found = Segment(size)
                self._pool[found.inode] = found
            found.kept = True
            found.free_since = 0.0
            return found

    def enter(self, segment: Segment, pids: Iterable[int]) -> None:
        """Give these processes a view each."""
        with self._lock:
            segment.users.update(pids)

    def is_draining(self, size: int) -> bool:
        """Tell whether no segment is free now and one is about to be."""
        with self._lock:
            fit = [s for s in self._pool.values() if not s.kept and _fits(s, size)]
            return bool(fit) and not any(_is_free(s) for s in fit)

    def release(self, segment: Segment) -> list[int]:
        """Let go of the value in a segment; return the inodes of segments now closed."""
        with self._lock:
            segment.kept = False
            return self._shrink()

    def left(self, inode: int, pid: int) -> list[int]:
        """Note that a process dropped a view; return the inodes of segments now closed."""
        with self._lock:
            segment = self._pool.get(inode)
            if segment is not None:
                segment.users[pid] -= 1
                if segment.users[pid] <= 0:
                    del segment.users[pid]
            return self._shrink()

    def left_all(self, pid: int) -> list[int]:
        """Drop the views of a dead process; return the inodes of segments now closed."""
        with self._lock:
            for segment in self._pool.values():
                del segment.users[pid]  # nothing happens where it has none
            return self._shrink()

    def close_free(self) -> list[int]:
        """Close what nobody uses; return the inodes of segments now closed."""
        with self._lock:
            return self._shrink(0)

    def close_idle(self) -> list[int]:
        """Close what nobody has used for a while; return the inodes of segments now closed."""
        if not self._pool:
            return []
        before = self.node.machine.now() - _FREE_FOR
        with self._lock:
            return self._close(
                s for s in self._pool.values() if _is_free(s) and s.free_since < before
            )

    def _shrink(self, keep: int = _FREE_MOST) -> list[int]:
        free = [s for s in self._pool.values() if _is_free(s)]
        for segment in free:
            segment.free_since = segment.free_since or self.node.machine.now()
        nbytes = sum(s.size for s in free)
        surplus = []
        while len(free) > keep or (len(free) > 1 and nbytes > _FREE_BYTES):
            surplus.append(free.pop(0))
            nbytes -= surplus[-1].size
        return self._close(surplus)

    def _close(self, meant: Iterable[Segment]) -> list[int]:
        closed = []
        for segment in list(meant):
            del self._pool[segment.inode]
            segment.close()
            closed.append(segment.inode)
        return closed


def _fits(segment: Segment, size: int) -> bool:
    return size <= segment.size <= 4 * size + _STEP


def _is_free(segment: Segment) -> bool:
    return not segment.kept and not segment.users


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
        os_pid, fd = place.os_pid, place.descriptor
        mine = os.open(f"/proc/{os_pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(mine).st_ino != place.inode:
                raise OSError(f"descriptor {fd} of process {os_pid} is something else")
            self.address = _map(mine, place.size)
        finally:
            os.close(mine)
        self.size = place.size
        self.views = 0

    def close(self) -> None:
        _libc().munmap(self.address, self.size)


class Mappings(Service):
    """The segments that this process has mapped, others' and its own."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.rlock()  # guards the two; re-entrant: views die at any moment
        self._mapped: dict[tuple[int, int], _Mapping] = {}  # by (maker, inode), least used first
        self._exports: dict[int, tuple[Any, Callable[[], None]]] = {}

    def view(self, place: Place, on_drop: Callable[[], None]) -> memoryview:
        """Map a segment and return a read-only view of it.

        Args:
            place: The segment.
            on_drop: Called, at any moment and from any thread, when the last view has gone.

        Raises:
            OSError: It cannot be opened from here.
        """
        import ctypes  # 4 ms: not at start-up

        key = (place.maker, place.inode)
        with self._lock:
            mapping = self._mapped.pop(key, None) or _Mapping(place)
            self._mapped[key] = mapping
            mapping.views += 1
            self._forget_some()
        exporter = (ctypes.c_char * mapping.size).from_address(mapping.address)
        number = id(exporter)

        def gone(_: object) -> None:
            with self._lock:
                self._exports.pop(number, None)
                mapping.views -= 1
            on_drop()

        with self._lock:
            self._exports[number] = (weakref.ref(exporter, gone), on_drop)
        return memoryview(exporter).cast("B").toreadonly()

    def _forget_some(self) -> None:
        """Keep few mappings that nobody uses."""
        spare = [key for key, mapping in self._mapped.items() if not mapping.views]
        for key in spare[: max(0, len(self._mapped) - _MAPPED_MOST)]:
            self._mapped.pop(key).close()

    def unmap(self, maker: int, inodes: Sequence[int] | None = None) -> None:
        """Forget segments that their maker has closed; all of them, if it is dead."""
        with self._lock:
            for key in list(self._mapped):
                meant = key[0] == maker and (inodes is None or key[1] in inodes)
                if meant and not self._mapped[key].views:
                    self._mapped.pop(key).close()


@cache
def _libc() -> ctypes.CDLL:
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def _map(fd: int, size: int) -> int:
    """Map a descriptor read-only, its page table filled; Python's mmap hides the address."""
    import ctypes

    address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED | mmap.MAP_POPULATE, fd, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(address)
