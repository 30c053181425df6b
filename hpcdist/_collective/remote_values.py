"""Values that many processes hold: broadcast to all, or a part for each.

The process that made a value owns it: it counts the handles of all processes and has the copies
dropped with the last one. A handle travels by reference, and unpickling it gives the value:
from its own copy, else from a process that has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Self

from hpcdist import _errors
from hpcdist._collective import shared_memory, trees
from hpcdist._collective.broadcast import Broadcasts, raise_all
from hpcdist._collective.reductions import listed_pids
from hpcdist._collective.trees import OK, Trees
from hpcdist._collective.value_copies import Copy, ValueCopies
from hpcdist._errors import HpcdistError, ProcessExitedException
from hpcdist._frames import brief
from hpcdist._hints import suggesting
from hpcdist._public import public
from hpcdist._remote.calls import StandIn
from hpcdist._remote.futures import Future
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.references import Reference, References, Value
from hpcdist._transport.contracts import Slot
from hpcdist._typing import Pids
from hpcdist._wire import messages, object_paths
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import FAILED, OUTCOME, Body, Buffer
from hpcdist._wire.messages import Free, Pull, Pulled, RefId, Store

_FREED = "this value has been freed"
_PLAIN, _SHARED, _NONE = range(3)  # what the answer to PULL holds


@public
class RemoteValue(Reference, StandIn, Generic[Value]):
    """A handle of a value that other processes hold.

    Given anywhere inside the arguments of a call it arrives as the value, which all calls of that
    process share: what is made of buffers is read-only there.

    Example:
        >>> import hpcdist
        >>> with hpcdist.bcast([1, 2, 3], pids=[1]) as value:
        ...     value.fetch(), value.pids
        ([1, 2, 3], [1])
    """

    _values: RemoteValues  # of the process that has this handle
    _freed = False
    _copy: Copy | None = None

    def __init__(self) -> None:
        raise TypeError("a RemoteValue is made by bcast() or scatter()")

    @classmethod
    def _received(cls, where: int, whence: int, ident: int, facts: Any) -> RemoteValue[Any]:
        return cls._at(RemoteValues.here(), where, whence, ident, facts)

    @classmethod
    def _at(
        cls, values: RemoteValues, where: int, whence: int, ident: int, facts: Any
    ) -> RemoteValue[Any]:
        self = cls.__new__(cls)
        self._values = values
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

    @brief
    def fetch(self) -> Value:
        """Return the value.

        Raises:
            ProcessExitedException: It went with the processes that held it.
            HpcdistError: It has been freed.
        """
        if self._freed:
            raise HpcdistError(_FREED)
        copy = self._values.copies.held.get(self.key) or self._copy
        if copy is None:
            copy = self._copy = self._values.pull(self)
        value: Value = copy.load()
        return value

    def free(self) -> None:
        """Drop all copies now, even if others hold a handle."""
        if self._freed:
            return
        self._freed = True
        self._held = 0
        self._copy = None
        node = self._values.node
        if self.where == node.me:
            self._references.free(self.key, self.where)
        elif self.where not in node.members.gone:
            node.wait(node.request(self.where, Free(self.key)))

    def _hpcdist_arrive(self) -> Any:
        return self.fetch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


def _arrived(where: int, whence: int, ident: int, facts: object) -> Any:
    """Unpickle a handle: into the value."""
    found: RemoteValue[Any] = References.here().handle(RemoteValue, where, whence, ident, facts)
    return found.fetch()


@public
@brief
@suggesting
def bcast(value: Value, pids: Pids = None) -> RemoteValue[Value]:
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
    return RemoteValues.here().bcast(value, pids)


@public
@brief
@suggesting
def scatter(seq: Value, pids: Pids = None) -> list[RemoteValue[Value]]:
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
    return RemoteValues.here().scatter(seq, pids)


@public
@brief
@suggesting
def gather(refs: Iterable[RemoteValue[Value] | Future[Value]]) -> list[Value]:
    """Return the values of RemoteValues and futures, in order.

    Example:
        >>> import hpcdist
        >>> hpcdist.gather([hpcdist.bcast(1, pids=[1]), hpcdist.remotecall(int, 1, "2")])
        [1, 2]
    """
    return RemoteValues.here().gather(refs)


class RemoteValues(Service):
    """The values that this process gives to others, and those it gets from them."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._references = node.service(References)
        self._trees = node.service(Trees)
        self._broadcasts = node.service(Broadcasts)
        self.copies = node.service(ValueCopies)
        self.shares_memory = node.machine.shares_memory

    def bcast(self, value: object, pids: Pids) -> RemoteValue[Any]:
        """Do what the public `bcast` says."""
        listed = list(dict.fromkeys(listed_pids(self.node, pids)))
        self._references.settle_gone()
        payload = object_paths.dumps(value, "the value")
        handle = self._made(listed, payload.nbytes)
        try:
            if self.shares_memory and payload.nbytes >= shared_memory.SHARED_MIN:
                handle._host = self.copies.host_of(self.node.me)
                self._broadcasts.share(handle.key, payload, listed)
            else:
                self.copies.held[handle.key] = Copy(
                    payload.own().body, payload.buffers, payload.refs
                )
                self._broadcasts.send(handle.key, payload, [p for p in listed if p != self.node.me])
        except BaseException:
            handle.free()
            raise
        self._broadcasts.arrived(handle.key)
        return handle

    def scatter(self, seq: Any, pids: Pids) -> list[RemoteValue[Any]]:
        """Do what the public `scatter` says."""
        listed = listed_pids(self.node, pids)
        self._references.settle_gone()
        sizes = trees.shares(len(seq), len(listed))
        payloads: list[Payload] = []
        start = 0
        for size in sizes:
            payloads.append(object_paths.dumps(seq[start : start + size], f"part {len(payloads)}"))
            start += size
        handles: list[RemoteValue[Any]] = []
        slots: list[Slot] = []
        failures: list[Exception] = []
        for pid, payload in zip(listed, payloads, strict=True):
            handle = self._made([pid], payload.nbytes)
            handles.append(handle)
            if pid == self.node.me:
                self.copies.held[handle.key] = Copy(
                    payload.own().body, payload.buffers, payload.refs
                )
                continue
            body, buffers, refs = self._references.outgoing(payload, pid)
            try:
                slots.append(self.node.request(pid, Store(handle.key, refs), body, buffers))
            except ProcessExitedException as exc:
                failures.append(exc)
        self.node.progress.nudge()
        for slot in slots:
            self.node.wait(slot)
            if isinstance(slot.error, ProcessExitedException):
                failures.append(slot.error)
        raise_all(failures)
        return handles

    def gather(self, refs: Iterable[Any]) -> list[Any]:
        """Do what the public `gather` says."""
        self.node.admit()
        listed = list(refs)
        for ref in listed:
            if not isinstance(ref, RemoteValue | Future):
                raise TypeError(f"gather takes RemoteValues and futures, not {ref!r}")
        return [ref.fetch() for ref in listed]

    def _made(self, pids: Sequence[int], nbytes: int) -> RemoteValue[Any]:
        """Make the handle of a value of ours; the copies go with the last."""
        me = self.node.me
        handle = RemoteValue._at(self, me, me, next(self.node.ids), (list(pids), nbytes, None))
        handle._references = self._references
        with self.node.progress.interrupts.section():  # what is counted has a holder
            self._references.count(handle.key, me, 1)
            handle._held = 1
            self._references.owned[handle.key].on_free = self._freeing(handle.key, list(pids))
        return handle

    def _freeing(self, key: RefId, pids: Sequence[int]) -> Callable[[], None]:
        """Make what is called when no handle is left; it must not hold one itself."""
        return lambda: self._broadcasts.free(key, pids)

    @on(Store)
    def _on_store(self, said: Store, mail: Mail) -> None:
        refs: Sequence[Reference] = ()
        rest = mail.body
        if said.with_refs:
            refs, rest = self._references.arrive(rest)
        self.copies.keep(said.ref, Copy(bytes(rest), mail.buffers, refs))
        self.node.reply(mail.peer, mail.ident, OK)

    # Getting a copy

    def pull(self, handle: RemoteValue[Any]) -> Copy:
        """Get a copy from a process that has one; nearer ones are asked first."""
        mine = self._trees.world_of(self.node.me)
        shared = handle._host is not None and handle._host == self.copies.host_of(self.node.me)
        order = sorted(
            (pid for pid in dict.fromkeys([*handle._pids, handle.where]) if pid != self.node.me),
            key=lambda pid: (shared and pid != handle.where, self._trees.world_of(pid) != mine),
        )
        error: BaseException | None = None
        for pid in order:
            try:
                slot = self.node.request(pid, Pull(handle.key, shared and pid == handle.where))
                self.node.wait(slot)
                if slot.error is not None:
                    raise slot.failure()
                if slot.value[0] & OUTCOME == FAILED:  # it came, and there was no memory for it
                    raise _errors.decode_error(bytes(slot.value[1]))
            except (ProcessExitedException, RuntimeError, ValueError) as exc:
                # Dead, or of a topology that keeps us apart: the next one.
                error = exc
                continue
            copy = self._unpacked(*slot.value[1:])
            if copy is not None:
                return copy
        raise error or HpcdistError(_FREED)

    def _unpacked(self, body: Body, buffers: Sequence[Buffer]) -> Copy | None:
        said, rest = messages.decode(Pulled, body)
        refs: Sequence[Reference] = ()
        if said.with_refs:
            refs, rest = self._references.arrive(rest)
        if said.how == _PLAIN:
            return Copy(bytes(rest), buffers, refs)
        if said.place is not None and said.layout is not None:
            try:
                return self.copies.mapped_copy(said.place, said.layout, refs)
            except OSError:
                pass
        return None

    @on(Pull)
    def _on_pull(self, said: Pull, mail: Mail) -> None:
        peer, ident = mail.peer, mail.ident
        copy = self.copies.held.get(said.ref)
        if copy is None:
            self.node.reply(peer, ident, OK, messages.encode(Pulled(_NONE)))
            return
        if said.shared and copy.segment is not None:
            self.copies.segments.enter(copy.segment, [peer.pid])
            sizes = [memoryview(part).nbytes for part in (copy.body, *copy.buffers)]
            offsets, _ = shared_memory.lay_out(sizes)
            body, _, with_refs = self._references.outgoing(Payload(b"", (), copy.refs), peer.pid)
            found = Pulled(_SHARED, copy.segment.place(self.node.me), (offsets, sizes), with_refs)
            self.node.reply(peer, ident, OK, messages.encode(found, body))
            return
        body, parts, with_refs = self._references.outgoing(
            Payload(bytes(copy.body), copy.buffers, copy.refs), peer.pid
        )
        found = Pulled(_PLAIN, with_refs=with_refs)
        self.node.reply(peer, ident, OK, messages.encode(found, body), parts)
