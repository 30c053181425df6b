"""Values that live here and are named elsewhere: the owner's table, and its counting.

A reference is `(whence, id)`: the process that made it and a number of its own. The owner counts,
for each process, how many copies of the reference it has been sent; a process counts its copies
down when its handle goes. A value is freed when every process's count is zero. Counts may be
negative for a moment, since "sent" and "gone" can arrive by different ways: only all zeros count.

The sender of a reference notifies the owner first ("sent to p"), and its message carries the list
of references inside, so that a process which merely keeps the bytes (a channel's owner) holds
them too.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hpcdist._runtime.node import Mail, Node, Service, on, on_raw
from hpcdist._transport.router import Peer, triples
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Body, Buffer
from hpcdist._wire.messages import RELEASE, RefId, Sent

# The type of what a reference stands for. Who does not say it, of a channel say, has Any.
if TYPE_CHECKING:
    from typing_extensions import TypeVar  # known to type checkers, whether installed or not

    Value = TypeVar("Value", default=Any)
else:
    from typing import TypeVar

    Value = TypeVar("Value")


class Entry:
    """A value owned here."""

    __slots__ = ("counts", "on_free", "value")

    def __init__(self, value: Any = None, counts: dict[int, int] | None = None) -> None:
        self.value = value
        self.counts = {} if counts is None else counts  # copies at each process
        self.on_free: Callable[[], None] | None = None


class Reference:
    """A handle of a value that may live elsewhere. Futures and remote channels are these."""

    where: int
    whence: int
    id: int
    _references: References  # of the process that has this handle
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
        self._references.handles[self.key] = self
        codec.met.refs.append(self)

    def _let_go(self) -> None:
        """Count this process's copies down at the owner."""
        if self._held:
            try:
                self._references.let_go(self)
            finally:
                if self._held:  # an interrupt came first, which a finaliser does not outlive
                    self._references.let_go(self)


class References(Service):
    """The values that this process owns, and its handles of those that it and others own."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        # Guards the tables; re-entrant, as freeing a value may free others.
        self.lock = node.machine.rlock()
        self.owned: dict[RefId, Entry] = {}
        self._outlived: dict[RefId, dict[int, int]] = {}  # copies of what was freed under them
        self.handles: weakref.WeakValueDictionary[RefId, Any] = weakref.WeakValueDictionary()
        self._gone: list[tuple[RefId, int]] = []  # our own handles that finalisers let go of
        self._with_releases: set[int] = set()  # peers that have to be told of some
        node.progress.before_sleep.append(self._before_sleep)
        node.on_death.append(self._on_death)

    # Values owned here

    def count(self, ref: RefId, pid: int, by: int, make: Callable[[], Any] | None = None) -> None:
        """Count copies of a reference at a process up or down; free the value at all zeros.

        What still comes from the dead, or about them, counts no more: then `make` is not called.
        """
        self._count(ref, pid, by, make)

    def _count(
        self,
        ref: RefId,
        pid: int,
        by: int,
        make: Callable[[], Any] | None = None,
        *,
        buries: bool = False,
    ) -> None:
        with self.lock:
            if pid in self.node.members.gone and not buries:
                return
            entry = self.owned.get(ref)
            if entry is None:
                if ref in self._outlived:
                    self._count_outlived(ref, pid, by)
                    return
                entry = self.owned[ref] = Entry(make() if make is not None else None)
            left = entry.counts.get(pid, 0) + by
            if left:
                entry.counts[pid] = left
                return
            entry.counts.pop(pid, None)
            if entry.counts:
                return
            del self.owned[ref]
        _freed(entry)

    def free(self, ref: RefId, pid: int) -> None:
        """Free a value whatever the counts say.

        Args:
            ref: The value.
            pid: The process whose handle has said so; that lets go of it without a word.
        """
        with self.lock:
            entry = self.owned.pop(ref, None)
            if entry is None:
                return
            entry.counts.pop(pid, None)
            if entry.counts:
                self._outlived[ref] = entry.counts
        _freed(entry)

    def _count_outlived(self, ref: RefId, pid: int, by: int) -> None:
        """Count copies of a reference whose value is no more. Called with the lock held."""
        counts = self._outlived[ref]
        left = counts.get(pid, 0) + by
        if left:
            counts[pid] = left
            return
        counts.pop(pid, None)
        if not counts:
            del self._outlived[ref]

    @property
    def lent(self) -> int:
        """How many values of this process others refer to."""
        me = self.node.me
        with self.lock:
            return sum(any(pid != me for pid in e.counts) for e in self.owned.values())

    # Handles

    def handle(self, kind: type, where: int, whence: int, ident: int, facts: Any) -> Any:
        """Find this process's handle of a reference, or make one."""
        with self.lock:
            found = self.handles.get((whence, ident))
            if found is None:
                found = kind._received(where, whence, ident, facts)  # type: ignore[attr-defined]
                found._references = self
                self.handles[(whence, ident)] = found
            return found

    def let_go(self, handle: Reference) -> None:
        """Count this process's copies of a reference down at its owner.

        This may run in a finaliser, at any moment and under any lock: of our own values we only
        take note. That a handle holds nothing any more is one act with the taking of that note:
        CPython looks for signals behind a call, not before it.
        """
        where, whence, ident = handle.where, handle.whence, handle.id
        if where == self.node.me:
            gone = self._gone
            held = ((whence, ident), handle._held)
            handle._held = 0
            gone.append(held)
            return
        peer = self.node.peers.get(where)
        if peer is None or not peer.alive:
            handle._held = 0
            return
        released = peer.released
        count = (whence, ident, handle._held)
        try:
            handle._held = 0
            released.append(count)
        finally:
            self._with_releases.add(where)
            if len(released) == 256:
                self.node.progress.dirty.append(peer)

    def settle_gone(self) -> None:
        """Count our own handles that have gone, now: a busy loop may never come to sleep."""
        gone = self._gone
        while gone:
            try:
                ref, held = gone.pop()
            except IndexError:  # the driver was faster
                return
            self.count(ref, self.node.me, -held)

    def _before_sleep(self) -> None:
        """Do what finalisers left to be done."""
        self.settle_gone()
        while self._with_releases:
            peer = self.node.peers.get(self._with_releases.pop())
            if peer is not None and peer.released and not peer.queued:
                peer.queued = True
                self.node.progress.dirty.append(peer)

    # References that travel

    def announce(self, refs: Sequence[Reference], dest: int) -> bytes:
        """Tell the owners that references are about to be sent; return the list that goes along."""
        node = self.node
        for ref in refs:
            if ref.where == node.me:
                self.count(ref.key, dest, 1)
            else:
                peer = node.peers.get(ref.where)
                if peer is not None and peer.alive:
                    peer.send(Sent(ref.whence, ref.id, dest))
        return self.listed(refs)

    def listed(self, refs: Sequence[Reference]) -> bytes:
        """Return the list that goes along with references."""
        data = pickle.dumps([(type(r), r.where, r.whence, r.id, r._facts()) for r in refs], 5)  # type: ignore[attr-defined]
        return len(data).to_bytes(4, "little") + data

    def arrive(self, data: Body) -> tuple[list[Reference], Any]:
        """Take in the references that came with a body; return them and the rest of the body."""
        view = memoryview(data)
        size = int.from_bytes(view[:4], "little")
        refs = []
        for kind, where, whence, ident, facts in pickle.loads(view[4 : 4 + size]):
            ref = self.handle(kind, where, whence, ident, facts)
            ref._held += 1
            refs.append(ref)
        return refs, view[4 + size :]

    def arrived(self, body: Any, buffers: Sequence[Buffer], with_refs: bool) -> Payload:
        """Take in a payload; the references inside are held as long as it is."""
        if with_refs:
            refs, body = self.arrive(body)
            return Payload(body, buffers, refs)
        return Payload(body, buffers)

    def outgoing(self, payload: Payload, dest: int) -> tuple[bytes, Sequence[Buffer], bool]:
        """Lay a payload out for one destination: body, buffers, whether references come first."""
        if payload.refs:
            return self.announce(payload.refs, dest) + payload.body, payload.buffers, True
        return payload.body, payload.buffers, False

    # What others tell

    @on_raw(RELEASE)
    def _on_release(self, peer: Peer, ident: int, body: Body, buffers: Sequence[Buffer]) -> None:
        pid, owned = peer.pid, self.owned
        freed, others = [], []
        with self.lock:  # once for all: thousands of futures let go together
            if pid in self.node.members.gone:
                return
            for whence, number, held in triples(body):
                ref = (whence, number)
                entry = owned.get(ref)
                if entry is not None and entry.counts == {pid: held}:  # as most are: nobody else's
                    freed.append(owned.pop(ref))
                else:
                    others.append((ref, held))
        for entry in freed:
            _freed(entry)
        for ref, held in others:
            self.count(ref, pid, -held)

    @on(Sent)
    def _on_sent(self, said: Sent, mail: Mail) -> None:
        self.count((said.whence, said.ident), said.to, 1)

    def _on_death(self, pid: int) -> None:
        """Drop all that a dead process holds."""
        with self.lock:
            held = [(ref, entry.counts) for ref, entry in self.owned.items()]
            held += self._outlived.items()
            held = [(ref, counts) for ref, counts in held if pid in counts]
        for ref, counts in held:
            self._count(ref, pid, -counts[pid], buries=True)


def _freed(entry: Entry) -> None:
    if entry.on_free is not None:
        entry.on_free()
