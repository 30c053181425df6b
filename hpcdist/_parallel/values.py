"""Values that many processes hold: broadcast to all, or a part for each.

The process that made a value owns it: it counts the handles of all processes and has the copies
dropped with the last one. A handle travels by reference, and whoever unpickles it gets the value:
from its own copy, else from a process that has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hpcdist._errors import HpcdistError, ProcessExitedException
from hpcdist._parallel import segments, trees
from hpcdist._parallel.copies import Copy, free, held, host_of, mapped_copy
from hpcdist._parallel.reductions import listed_pids
from hpcdist._parallel.sending import raise_all, send, share
from hpcdist._parallel.trees import OK
from hpcdist._remote import calls
from hpcdist._remote.futures import Future
from hpcdist._runtime import references
from hpcdist._runtime.controls import FREE, PULL, STORE
from hpcdist._runtime.node import node, pack_head, unpack_head
from hpcdist._runtime.references import Reference, RefId, outgoing
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Buffer

shares_memory = True  # whether processes of one host share one copy (a test says no)

_FREED = "this value has been freed"
_PLAIN, _SHARED, _NONE = range(3)  # what the answer to PULL holds


class RemoteValue(Reference):
    """A handle of a value that other processes hold.

    Given anywhere inside the arguments of a call it arrives as the value, which all calls of that
    process share: what is made of buffers is read-only there.

    Example:
        >>> import hpcdist
        >>> with hpcdist.bcast([1, 2, 3], pids=[1]) as value:
        ...     value.fetch(), value.pids
        ([1, 2, 3], [1])
    """

    _freed = False
    _copy: Copy | None = None

    def __init__(self) -> None:
        raise TypeError("a RemoteValue is made by bcast() or scatter()")

    @classmethod
    def _made(cls, pids: Sequence[int], nbytes: int) -> RemoteValue:
        self = cls.__new__(cls)
        self.where = self.whence = node.me
        self.id = next(node.ids)
        self._set_facts((list(pids), nbytes, None))
        references.count(self.key, node.me, 1)
        self._held = 1
        return self

    @classmethod
    def _received(cls, where: int, whence: int, ident: int, facts: Any) -> RemoteValue:
        self = cls.__new__(cls)
        self.where, self.whence, self.id = where, whence, ident
        self._set_facts(facts)
        return self

    def _set_facts(self, facts: tuple[list[int], int, str | None]) -> None:
        self._pids, self._nbytes, self._host = facts

    def _facts(self) -> tuple[list[int], int, str | None]:
        return self._pids, self._nbytes, self._host

    def __reduce__(self) -> Any:
        if self._freed:
            raise HpcdistError(_FREED)
        self._travels()
        return _arrived, (self.where, self.whence, self.id, self._facts())

    def __del__(self) -> None:
        if self._held:
            self._let_go()

    def __repr__(self) -> str:
        state = "freed" if self._freed else f"{self._nbytes} bytes on processes {self._pids}"
        return f"<RemoteValue {self.key}, {state}>"

    @property
    def pids(self) -> list[int]:
        """The processes that were given the value."""
        return list(self._pids)

    @property
    def nbytes(self) -> int:
        """The size of one copy, as it travels."""
        return self._nbytes

    def fetch(self) -> Any:
        """Return the value.

        Raises:
            ProcessExitedException: It went with the processes that held it.
            HpcdistError: It has been freed.
        """
        if self._freed:
            raise HpcdistError(_FREED)
        copy = held.get(self.key) or self._copy
        if copy is None:
            copy = self._copy = _pull(self)
        return copy.load()

    def free(self) -> None:
        """Drop all copies now, whoever else holds a handle."""
        if self._freed:
            return
        self._freed = True
        self._held = 0
        self._copy = None
        if self.where == node.me:
            references.free(self.key)
        elif self.where not in node.members.gone:
            node.wait(node.request(self.where, FREE, self.key))

    def __enter__(self) -> RemoteValue:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


def _arrived(where: int, whence: int, ident: int, facts: Any) -> Any:
    """Unpickle a handle: into the value."""
    found: RemoteValue = references.handle(RemoteValue, where, whence, ident, facts)
    return found.fetch()


calls.arrives_as[RemoteValue] = RemoteValue.fetch


# Broadcast


def bcast(value: Any, pids: Any = None) -> RemoteValue:
    """Give a value to many processes, once each, and return its handle when all have it.

    It moves down a tree, and the processes of one host share one copy, which is read-only.

    Args:
        value: Anything that can be pickled.
        pids: The processes; default all workers.

    Raises:
        ProcessExitedException: One of them died; the others got the value.

    Example:
        >>> import hpcdist
        >>> weights = hpcdist.bcast(list(range(10)), pids=[1])
        >>> hpcdist.remotecall_fetch(sum, 1, weights)
        45
    """
    listed = list(dict.fromkeys(listed_pids(pids)))
    references.settle_gone()
    payload = codec.dumps(value)
    handle = RemoteValue._made(listed, payload.nbytes)
    references.owned[handle.key].on_free = _freeing(handle.key, listed)
    try:
        if shares_memory and payload.nbytes >= segments.SHARED_MIN:
            handle._host = host_of(node.me)
            share(handle.key, payload, listed)
        else:
            held[handle.key] = Copy(payload.own().body, payload.buffers, payload.refs)
            send(handle.key, payload, [p for p in listed if p != node.me])
    except BaseException:
        handle.free()
        raise
    return handle


# Parts


def scatter(seq: Any, pids: Any = None) -> list[RemoteValue]:
    """Give each process a contiguous part of a sequence; return a handle for each part.

    Args:
        seq: A list, a range, an array: anything that can be sliced.
        pids: The processes; default all workers.

    Raises:
        ProcessExitedException: One of them died.

    Example:
        >>> import hpcdist
        >>> [part.fetch() for part in hpcdist.scatter([1, 2, 3], pids=[1])]
        [[1, 2, 3]]
    """
    listed = listed_pids(pids)
    references.settle_gone()
    sizes = trees.shares(len(seq), len(listed))
    payloads = []
    start = 0
    for size in sizes:
        payloads.append(codec.dumps(seq[start : start + size]))
        start += size
    handles: list[RemoteValue] = []
    slots: list[Slot] = []
    failures: list[Exception] = []
    for pid, payload in zip(listed, payloads, strict=True):
        handle = RemoteValue._made([pid], payload.nbytes)
        references.owned[handle.key].on_free = _freeing(handle.key, [pid])
        handles.append(handle)
        if pid == node.me:
            held[handle.key] = Copy(payload.own().body, payload.buffers, payload.refs)
            continue
        body, buffers, refs = outgoing(payload, pid)
        try:
            slots.append(node.request(pid, STORE, (handle.key, refs), body, buffers))
        except ProcessExitedException as exc:
            failures.append(exc)
    node.progress.nudge()
    for slot in slots:
        node.wait(slot)
        if isinstance(slot.error, ProcessExitedException):
            failures.append(slot.error)
    raise_all(failures)
    return handles


def _freeing(key: RefId, pids: Sequence[int]) -> Callable[[], None]:
    """Make what is called when no handle is left; it must not hold one itself."""
    return lambda: free(key, pids)


@node.control(STORE)
def _on_store(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (key, with_refs), rest = unpack_head(body)
    refs: Any = ()
    if with_refs:
        refs, rest = references.arrive(rest)
    held[key] = Copy(bytes(rest), buffers, refs)
    node.reply(peer, ident, OK)


def gather(refs: Iterable[Any]) -> list[Any]:
    """Return the values of RemoteValues and futures, in order.

    Example:
        >>> import hpcdist
        >>> hpcdist.gather([hpcdist.bcast(1, pids=[1]), hpcdist.remotecall(int, 1, "2")])
        [1, 2]
    """
    listed = list(refs)
    for ref in listed:
        if not isinstance(ref, RemoteValue | Future):
            raise TypeError(f"gather takes RemoteValues and futures, not {ref!r}")
    return [ref.fetch() for ref in listed]


# Getting a copy


def _pull(handle: RemoteValue) -> Copy:
    """Get a copy from a process that has one; nearer ones are asked first."""
    mine = trees.world_of(node.me)
    shared = handle._host is not None and handle._host == host_of(node.me)
    order = sorted(
        (pid for pid in dict.fromkeys([*handle._pids, handle.where]) if pid != node.me),
        key=lambda pid: (shared and pid != handle.where, trees.world_of(pid) != mine),
    )
    error: BaseException | None = None
    for pid in order:
        try:
            slot = node.request(pid, PULL, (handle.key, shared and pid == handle.where))
            node.wait(slot)
            if slot.error is not None:
                raise slot.error
        except (ProcessExitedException, RuntimeError, ValueError) as exc:
            # Dead, or of a topology that keeps us apart: the next one.
            error = exc
            continue
        copy = _unpacked(*slot.value[1:])
        if copy is not None:
            return copy
    raise error or HpcdistError(_FREED)


def _unpacked(body: Any, buffers: Sequence[Buffer]) -> Copy | None:
    (how, facts, with_refs), rest = unpack_head(body)
    refs: Any = ()
    if with_refs:
        refs, rest = references.arrive(rest)
    if how == _PLAIN:
        return Copy(bytes(rest), buffers, refs)
    if how == _SHARED:
        try:
            place, layout = facts
            return mapped_copy(place, layout, refs)
        except OSError:
            pass
    return None


@node.control(PULL)
def _on_pull(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (key, shared), _ = unpack_head(body)
    copy = held.get(key)
    if copy is None:
        node.reply(peer, ident, OK, pack_head((_NONE, None, False)))
        return
    if shared and copy.segment is not None:
        segments.enter(copy.segment, [peer.pid])
        sizes = [memoryview(part).nbytes for part in (copy.body, *copy.buffers)]
        offsets, _ = segments.lay_out(sizes)
        facts = (copy.segment.place(node.me), (offsets, sizes))
        body, _, with_refs = outgoing(Payload(b"", (), copy.refs), peer.pid)
        node.reply(peer, ident, OK, pack_head((_SHARED, facts, with_refs), body))
        return
    body, parts, with_refs = outgoing(Payload(bytes(copy.body), copy.buffers, copy.refs), peer.pid)
    node.reply(peer, ident, OK, pack_head((_PLAIN, None, with_refs), body), parts)
