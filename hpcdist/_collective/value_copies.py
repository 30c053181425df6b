"""The copies of broadcast and scattered values that this process holds, and their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcdist._collective import shared_memory
from hpcdist._collective.shared_memory import Mappings, Segment, Segments
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.references import Reference
from hpcdist._transport.contracts import Slot
from hpcdist._wire import codec
from hpcdist._wire.frames import Body, Buffer
from hpcdist._wire.messages import Drop, Dropped, Place, RefId, Unmap

_NOTHING = object()


class Copy:
    """A value as one process holds it."""

    __slots__ = ("body", "buffers", "refs", "segment", "value")

    def __init__(
        self, body: Body, buffers: Sequence[Buffer], refs: Sequence[Reference] = ()
    ) -> None:
        self.body = body
        self.buffers = buffers
        self.refs = refs  # references inside, held as long as the copy is
        self.segment: Segment | None = None  # ours, if the copy is in one
        self.value: Any = _NOTHING

    def load(self) -> Any:
        """Make the value, once: all who use it here share it."""
        if self.value is _NOTHING:
            self.value = codec.loads(self.body, self.buffers)
        return self.value

    @classmethod
    def in_memory(cls, memory: memoryview, layout: Layout, refs: Sequence[Reference] = ()) -> Copy:
        """Take a copy that lies in one piece of memory."""
        offsets, sizes = layout
        parts = [memory[o : o + n] for o, n in zip(offsets, sizes, strict=True)]
        return cls(parts[0], parts[1:], refs)


Layout = tuple[list[int], list[int]]  # offsets and sizes of the stream and the buffers


class ValueCopies(Service):
    """The copies that this process holds, and the shared memory they lie in."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.segments = node.service(Segments)
        self._mappings = node.service(Mappings)
        self.held: dict[RefId, Copy] = {}
        self.dropped: list[tuple[int, int]] = []  # (maker, inode) of segments with no view here now
        self._unwanted: list[Segment] = []  # our own that are not needed any more
        node.progress.before_sleep.append(self._tidy)
        node.on_death.append(self._on_death)

    def host_of(self, pid: int) -> str:
        """Name the host of a process, as far as this one knows."""
        if pid == self.node.me and pid == 1:
            return self.node.machine.hostname()
        member = self.node.members.living.get(pid)
        return member.host if member is not None else ""

    def is_here(self, pid: int) -> bool:
        """Tell whether a process can share memory with us: it is of our host, as its name says."""
        same = self.host_of(pid) == self.host_of(self.node.me)
        return same and self.node.machine.shares_memory

    def mapped_copy(self, place: Place, layout: Layout, refs: Any) -> Copy:
        """Map a copy. Its maker hears once that we have no view: when it goes, or cannot come.

        Raises:
            OSError: It cannot be opened from here: another container's, say.
        """
        said: list[bool] = []

        def gone() -> None:
            if not said:
                said.append(True)
                self.dropped.append((place.maker, place.inode))

        try:
            return Copy.in_memory(self._mappings.view(place, gone), layout, refs)
        except BaseException:
            gone()
            raise

    def keep(self, key: RefId, copy: Copy) -> None:
        """Keep a copy of another process's value that has come."""
        self.held[key] = copy
        if key[0] in self.node.members.gone:  # its owner died while it was under way
            self.drop(key)

    def written(self, size: int, parts: Sequence[Buffer], offsets: Sequence[int]) -> Segment:
        """Write parts into shared memory of ours.

        Raises:
            OSError: No shared memory is available.
        """
        segment = self._lend(size)
        try:
            shared_memory.fill(segment, parts, offsets)
        except BaseException:  # Ctrl-C
            self.let_go(segment)
            raise
        return segment

    def _lend(self, size: int) -> Segment:
        """Find a segment of ours; wait a moment for one whose readers are just leaving it."""
        self._release_all()
        for _ in range(10):
            if not self.segments.is_draining(size):
                break
            try:
                self.node.progress.wait(Slot(), self.node.machine.now() + 0.001)
            except TimeoutError:
                pass
        return self.segments.lend(size)

    # Freeing

    def drop(self, key: RefId) -> None:
        copy = self.held.pop(key, None)
        if copy is not None and copy.segment is not None:
            self.let_go(copy.segment)
        del copy
        self._tidy()

    def let_go(self, segment: Segment) -> None:
        """Mark one of our segments as no longer needed. Safe in a finaliser, under any lock."""
        self._unwanted.append(segment)

    def _release_all(self) -> None:
        while self._unwanted:
            try:
                segment = self._unwanted.pop()
            except IndexError:  # another thread was faster
                return
            self._send_closed(self.segments.release(segment))

    @on(Drop)
    def _on_drop(self, said: Drop, mail: Mail) -> None:
        self.drop(said.ref)

    def _tidy(self) -> None:
        """Tell the makers of segments that we have no more views of them; look after our own."""
        self._release_all()
        while self.dropped:
            try:
                maker, inode = self.dropped.pop()
            except IndexError:  # another thread was faster
                return
            if maker == self.node.me:
                self._send_closed(self.segments.left(inode, self.node.me))
            else:
                self.node.send(maker, Dropped(inode))
        self._send_closed(self.segments.close_idle())

    @on(Dropped)
    def _on_dropped(self, said: Dropped, mail: Mail) -> None:
        self._send_closed(self.segments.left(said.inode, mail.peer.pid))

    def _send_closed(self, inodes: list[int]) -> None:
        """Send the end of our segments to all that may have them mapped."""
        if inodes:
            self._mappings.unmap(self.node.me, inodes)
            here = self.host_of(self.node.me)
            for pid in self.node.members.procs():
                if pid != self.node.me and self.host_of(pid) in (here, ""):
                    self.node.send(pid, Unmap(inodes))

    @on(Unmap)
    def _on_unmap(self, said: Unmap, mail: Mail) -> None:
        self._mappings.unmap(mail.peer.pid, said.inodes)

    def forget_views(self, pid: int) -> None:
        """Drop a dead process's views of our values."""
        self._send_closed(self.segments.left_all(pid))

    def _on_death(self, pid: int) -> None:
        """Drop the values of a dead owner; those in use here stay as long as they are used."""
        for key in [key for key in list(self.held) if key[0] == pid]:
            self.drop(key)
        self.forget_views(pid)
        self._mappings.unmap(pid)
        if not self.node.members.living:  # nobody to share with: the memory and descriptors go back
            self._mappings.unmap(self.node.me, self.segments.close_free())
