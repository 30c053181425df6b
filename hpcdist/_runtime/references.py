"""Values that live here and are named elsewhere: the owner's table, and its counting.

A reference is `(whence, id)`: the process that made it and a number of its own. The owner counts,
for each process, how many copies of the reference it has been sent; a process counts its copies
down when its handle goes. A value is freed when every process's count is zero. Counts may be
negative for a moment, since "sent" and "gone" can arrive by different ways: only all zeros count.

Whoever sends a reference tells the owner first ("sent to p"), and what it sends carries the list
of references inside, so that a process which merely keeps the bytes (a channel's owner) holds
them too.
"""

from __future__ import annotations

import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._runtime.controls import RELEASE, SENT
from hpcdist._runtime.node import node
from hpcdist._transport.router import Peer, triples
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Buffer

RefId = tuple[int, int]


class Entry:
    """A value owned here."""

    __slots__ = ("counts", "on_free", "value")

    def __init__(self, value: Any = None, counts: dict[int, int] | None = None) -> None:
        self.value = value
        self.counts = {} if counts is None else counts  # copies at each process
        self.on_free: Callable[[], None] | None = None


_lock = threading.RLock()  # guards the table; re-entrant, as freeing a value may free others
owned: dict[RefId, Entry] = {}
handles: weakref.WeakValueDictionary[RefId, Any] = weakref.WeakValueDictionary()


def count(ref: RefId, pid: int, by: int, make: Callable[[], Any] | None = None) -> None:
    """Count copies of a reference at a process up or down; free the value at all zeros."""
    with _lock:
        entry = owned.get(ref)
        if entry is None:
            entry = owned[ref] = Entry(make() if make is not None else None)
        left = entry.counts.get(pid, 0) + by
        if left:
            entry.counts[pid] = left
            return
        entry.counts.pop(pid, None)
        if entry.counts:
            return
        del owned[ref]
    _freed(entry)


def free(ref: RefId) -> None:
    """Free a value whatever the counts say."""
    with _lock:
        entry = owned.pop(ref, None)
    if entry is not None:
        _freed(entry)


def _freed(entry: Entry) -> None:
    if entry.on_free is not None:
        entry.on_free()


class Reference:
    """A handle of a value that may live elsewhere. Futures and remote channels are these."""

    where: int
    whence: int
    id: int
    _held: int = 0

    @property
    def key(self) -> RefId:
        return self.whence, self.id

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reference):
            return NotImplemented
        return self.whence == other.whence and self.id == other.id

    def __hash__(self) -> int:
        return hash((self.whence, self.id))

    def _travels(self) -> None:
        """Take note that this handle is being pickled."""
        handles[self.key] = self
        codec.met.append((threading.get_ident(), self))

    def _let_go(self) -> None:
        """Count this process's copies down at the owner."""
        held, self._held = self._held, 0
        if not held or node is None:  # the interpreter is ending: modules are empty by now
            return
        if self.where == node.me:
            # Not here: this may run in a finaliser, at any moment and under any lock.
            _gone.append((self.key, held))
            return
        peer = node.peers.get(self.where)
        if peer is not None and peer.alive:
            released = peer.released
            released.append((self.whence, self.id, held))
            if len(released) == 256:
                node.progress.dirty.append(peer)
            _with_releases.add(self.where)


_gone: list[tuple[RefId, int]] = []
_with_releases: set[int] = set()


def _before_sleep() -> None:
    """Do what finalisers left to be done."""
    while _gone:
        ref, held = _gone.pop()
        count(ref, node.me, -held)
    while _with_releases:
        peer = node.peers.get(_with_releases.pop())
        if peer is not None and peer.released and not peer.queued:
            peer.queued = True
            node.progress.dirty.append(peer)


node.progress.before_sleep.append(_before_sleep)


def settle_gone() -> None:
    """Count our own handles that have gone, now: a busy loop may never come to sleep."""
    while _gone:
        try:
            ref, held = _gone.pop()
        except IndexError:  # the driver was faster
            return
        count(ref, node.me, -held)


def announce(refs: Sequence[Reference], dest: int) -> bytes:
    """Tell the owners that references are about to be sent; return the list that goes along."""
    for ref in refs:
        if ref.where == node.me:
            count(ref.key, dest, 1)
        else:
            peer = node.peers.get(ref.where)
            if peer is not None and peer.alive:
                peer.control(SENT, 0, pickle.dumps((ref.whence, ref.id, dest), 5))
    data = pickle.dumps([(type(r), r.where, r.whence, r.id, r._facts()) for r in refs], 5)  # type: ignore[attr-defined]
    return len(data).to_bytes(4, "little") + data


def arrive(data: Any) -> tuple[list[Reference], Any]:
    """Take in the references that came with a body; return them and the rest of the body."""
    view = memoryview(data)
    size = int.from_bytes(view[:4], "little")
    refs = []
    for kind, where, whence, ident, facts in pickle.loads(view[4 : 4 + size]):
        ref = handle(kind, where, whence, ident, facts)
        ref._held += 1
        refs.append(ref)
    return refs, view[4 + size :]


def handle(kind: type, where: int, whence: int, ident: int, facts: Any) -> Any:
    """Find this process's handle of a reference, or make one."""
    with _lock:
        found = handles.get((whence, ident))
        if found is None:
            found = kind._received(where, whence, ident, facts)  # type: ignore[attr-defined]
            handles[(whence, ident)] = found
        return found


class Parcel(Payload):
    """A payload that was received: the references inside are held as long as it is."""

    __slots__ = ()

    @classmethod
    def of(cls, body: Any, buffers: Sequence[Buffer], with_refs: bool) -> Payload:
        """Take in what arrived."""
        if with_refs:
            refs, body = arrive(body)
            return cls(body, buffers, refs)
        return cls(body, buffers)


def outgoing(payload: Payload, dest: int) -> tuple[bytes, Sequence[Buffer], bool]:
    """Lay a payload out for one destination: body, buffers, and whether references come first."""
    if payload.refs:
        return announce(payload.refs, dest) + payload.body, payload.buffers, True
    return payload.body, payload.buffers, False


@node.control(RELEASE)
def _on_release(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    for whence, number, held in triples(body):
        count((whence, number), peer.pid, -held)


@node.control(SENT)
def _on_sent(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    whence, number, dest = pickle.loads(body)
    if dest in node.members.gone:
        return
    count((whence, number), dest, 1)


def _on_death(pid: int) -> None:
    """A dead process holds nothing."""
    for ref, entry in list(owned.items()):
        if pid in entry.counts:
            count(ref, pid, -entry.counts[pid])


node.on_death.append(_on_death)
