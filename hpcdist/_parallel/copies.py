"""The copies of broadcast and scattered values that this process holds, and their end."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from typing import Any

from hpcdist._parallel import segments, trees
from hpcdist._parallel.segments import Place, Segment
from hpcdist._runtime.controls import DROP, DROPPED, UNMAP
from hpcdist._runtime.node import node
from hpcdist._runtime.references import RefId
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire import codec
from hpcdist._wire.frames import Buffer

_NOTHING = object()


class Copy:
    """A value as one process holds it."""

    __slots__ = ("body", "buffers", "refs", "segment", "value")

    def __init__(self, body: Any, buffers: Sequence[Buffer], refs: Any = ()) -> None:
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
    def in_memory(cls, memory: memoryview, layout: Layout, refs: Any = ()) -> Copy:
        """Take a copy that lies in one piece of memory."""
        offsets, sizes = layout
        parts = [memory[o : o + n] for o, n in zip(offsets, sizes, strict=True)]
        return cls(parts[0], parts[1:], refs)


Layout = tuple[list[int], list[int]]  # offsets and sizes of the stream and the buffers
held: dict[RefId, Copy] = {}


def host_of(pid: int) -> str:
    if pid == node.me and pid == 1:
        return os.uname().nodename
    member = node.members.living.get(pid)
    return member.host if member is not None else ""


def is_here(pid: int) -> bool:
    """Tell whether a process is of our host, as its name says."""
    return host_of(pid) == host_of(node.me)


def mapped_copy(place: Place, layout: Layout, refs: Any) -> Copy:
    """Map a copy. Its maker is told once that we have no view of it: when it goes, or cannot come.

    Raises:
        OSError: It cannot be opened from here: another container's, say.
    """
    said: list[bool] = []

    def gone() -> None:
        if not said:
            said.append(True)
            dropped.append((place[0], place[3]))

    try:
        return Copy.in_memory(segments.view(place, gone), layout, refs)
    except BaseException:
        gone()
        raise


def written(size: int, parts: Sequence[Buffer], offsets: Sequence[int]) -> Segment:
    """Write parts into shared memory of ours.

    Raises:
        OSError: There is none to be had.
    """
    segment = _lend(size)
    try:
        segments.fill(segment, parts, offsets)
    except BaseException:  # Ctrl-C
        let_go(segment)
        raise
    return segment


def _lend(size: int) -> Segment:
    """Find a segment of ours; wait a moment for one whose readers are just leaving it."""
    _release_all()
    for _ in range(10):
        if not segments.is_draining(size):
            break
        try:
            node.progress.wait(Slot(), time.monotonic() + 0.001)
        except TimeoutError:
            pass
    return segments.lend(size)


# Freeing


def free(key: RefId, pids: Sequence[int]) -> None:
    """Have all copies of a value of ours dropped."""
    drop(key)
    body = pickle.dumps(key, 5)
    for pid in pids:
        if pid != node.me:
            trees.send(pid, DROP, body)
    node.progress.soon()


def drop(key: RefId) -> None:
    copy = held.pop(key, None)
    if copy is not None and copy.segment is not None:
        let_go(copy.segment)
    del copy
    _tidy()


_unwanted: list[Segment] = []


def let_go(segment: Segment) -> None:
    """What is in a segment of ours is no longer wanted. For finalisers, too: under any lock."""
    _unwanted.append(segment)


def _release_all() -> None:
    while _unwanted:
        try:
            segment = _unwanted.pop()
        except IndexError:  # another thread was faster
            return
        _tell_closed(segments.release(segment))


@node.control(DROP)
def _on_drop(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    drop(pickle.loads(body))


dropped: list[tuple[int, int]] = []  # (maker, inode) of segments whose views here have gone


def _tidy() -> None:
    """Tell the makers of segments that we have no more views of them; look after our own."""
    _release_all()
    while dropped:
        try:
            maker, inode = dropped.pop()
        except IndexError:  # another thread was faster
            return
        if maker == node.me:
            _tell_closed(segments.left(inode, node.me))
        else:
            trees.send(maker, DROPPED, pickle.dumps(inode, 5))
    _tell_closed(segments.close_idle())


node.progress.before_sleep.append(_tidy)


@node.control(DROPPED)
def _on_dropped(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    _tell_closed(segments.left(pickle.loads(body), peer.pid))


def _tell_closed(inodes: list[int]) -> None:
    """Tell all who may have them mapped that segments of ours are no more."""
    if inodes:
        segments.unmap(node.me, inodes)
        body = pickle.dumps(inodes, 5)
        here = host_of(node.me)
        for pid in node.members.procs():
            if pid != node.me and host_of(pid) in (here, ""):
                trees.send(pid, UNMAP, body)


@node.control(UNMAP)
def _on_unmap(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    segments.unmap(peer.pid, pickle.loads(body))


def forget_views(pid: int) -> None:
    """A dead process has no views of what is ours."""
    _tell_closed(segments.left_all(pid))


def _on_death(pid: int) -> None:
    """With its owner a value goes; what is in use here stays as long as it is."""
    for key in [key for key in list(held) if key[0] == pid]:
        drop(key)
    forget_views(pid)
    segments.unmap(pid)
    if not node.members.living:  # nobody to share with: the memory and descriptors go back
        segments.unmap(node.me, segments.close_free())


node.on_death.append(_on_death)
