"""Values that many processes hold: broadcast to all, or a part for each.

The process that made a value owns it: it counts the handles of all processes and has the copies
dropped with the last one. A handle travels by reference, and whoever unpickles it gets the value:
from its own copy, else from a process that has one.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._errors import HpcdistError, ProcessExitedException
from hpcdist._parallel import segments, trees
from hpcdist._parallel.reductions import listed_pids
from hpcdist._parallel.segments import Place, Segment
from hpcdist._parallel.trees import FAILED, MAP, OK, RECEIVE, Branch, Job, Root
from hpcdist._remote import calls
from hpcdist._remote.futures import Future
from hpcdist._runtime import references
from hpcdist._runtime.controls import CHUNK, DROP, DROPPED, FREE, PULL, STORE, UNMAP
from hpcdist._runtime.node import node, pack_head, unpack_head
from hpcdist._runtime.references import RefId, Reference, outgoing
from hpcdist._transport.progress import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.blocks import blank
from hpcdist._wire.frames import Buffer

PIECE = 4 << 20
shares_memory = True  # whether processes of one host share one copy (a test says no)

_NOTHING = object()
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
        copy = _copies.get(self.key) or self._copy
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
_copies: dict[RefId, Copy] = {}


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
            _share(handle, payload, listed)
        else:
            _copies[handle.key] = Copy(payload.own().body, payload.buffers, payload.refs)
            _send(handle.key, payload, [p for p in listed if p != node.me])
    except BaseException:
        handle.free()
        raise
    return handle


def _share(handle: RemoteValue, payload: Payload, pids: Sequence[int]) -> None:
    """Write the value into shared memory of this host; send it once to each other host."""
    key = handle.key
    parts: list[Buffer] = [payload.body, *payload.buffers]
    sizes = [memoryview(part).nbytes for part in parts]
    offsets, size = segments.lay_out(sizes)
    segment = _lend(size)
    segments.fill(segment, parts, offsets)
    here = _host_of(node.me)
    handle._host = here
    hosts: dict[str, list[int]] = {}
    for pid in pids:
        if pid != node.me:
            hosts.setdefault(_host_of(pid), []).append(pid)
    near = hosts.pop(here, [])
    layout = (offsets, sizes)
    segment.users = {node.me, *near}
    place = segment.place(node.me)
    copy = _copies[key] = _mapped_copy(place, layout, payload.refs)
    copy.segment = segment
    jobs = []
    if near:
        jobs.append(_tell_to_map(key, layout, payload, {place: near}))
    leaders = [mates[0] for mates in hosts.values()]
    found: dict[int, Any] = {}
    if leaders:
        mates = {leader: hosts[_host_of(leader)] for leader in leaders}
        found = _send(key, payload, leaders, mates)
        places = {found[leader]: mates[leader][1:] for leader in leaders if found.get(leader)}
        jobs.append(_tell_to_map(key, layout, payload, places))
    failures: list[Exception] = []
    without: list[int] = []
    for job, asked in jobs:
        for position, outcome in job.wait().items():
            if outcome[0] == trees.DEAD:
                failures.append(trees.death_of(outcome[1]))
            elif outcome[0] == FAILED:
                without.append(asked[position])
    if without:
        _send(key, payload, without)
    _raise(failures)


def _tell_to_map(
    key: RefId, layout: Layout, payload: Payload, places: dict[Place, list[int]]
) -> tuple[Root, list[int]]:
    pids = [pid for mates in places.values() for pid in mates]
    place_of = [place for place, mates in places.items() for _ in mates]
    root = Root(MAP, pids, combines=False)
    body = pickle.dumps((key, layout, place_of), 5)
    shape = trees.fan if node.topology == "all_to_all" else trees.flat
    root.begin(Payload(body, (), payload.refs), shape(pids, range(len(pids))))
    return root, pids


def _lend(size: int) -> Segment:
    """Find a segment; wait a moment for one whose readers are just leaving it."""
    for _ in range(10):
        if not segments.is_draining(size):
            break
        try:
            node.wait(Slot(), 0.001)
        except TimeoutError:
            pass
    return segments.lend(size)


def _host_of(pid: int) -> str:
    if pid == node.me and pid == 1:
        return os.uname().nodename
    member = node.members.living.get(pid)
    return member.host if member is not None else ""


def _mapped_copy(place: Place, layout: Layout, refs: Any) -> Copy:
    maker, _, _, inode, _ = place
    memory = segments.view(place, lambda: _dropped.append((maker, inode)))
    return Copy.in_memory(memory, layout, refs)


def _start_map(job: Job, body: Any, buffers: Sequence[Buffer], refs: Any) -> None:
    key, layout, place_of = pickle.loads(body)
    place = place_of[job.key[2]]
    try:
        _copies[key] = _mapped_copy(place, layout, refs)
    except OSError as exc:  # another namespace, say: it has to be sent
        _dropped.append((place[0], place[3]))
        job.done(FAILED, _errors.encode_error(exc, node.me))
        return
    job.done(OK, b"")


trees.starters[MAP] = _start_map


# Sending the bytes: to other hosts, and where memory cannot be shared


def _send(
    key: RefId,
    payload: Payload,
    pids: Sequence[int],
    mates: dict[int, list[int]] | None = None,
) -> dict[int, Any]:
    """Send a value down a tree in pieces, passed on as they come.

    Args:
        key: Whose value it is.
        payload: The value.
        pids: Who gets it.
        mates: For each of these the processes of its host, who will map its copy.

    Returns:
        Where each one's copy lies in shared memory, if `mates` were given.
    """
    if not pids:
        return {}
    parts: list[Buffer] = [payload.body, *payload.buffers]
    sizes = [memoryview(part).nbytes for part in parts]
    root = _Sending(RECEIVE, pids, combines=False)
    if sum(sizes) > PIECE:
        root.parts = parts
    shape = trees.by_world if node.topology == "all_to_all" else trees.flat
    head = pack_head((key, sizes, mates), b"" if root.parts else payload.body)
    body = Payload(head, () if root.parts else payload.buffers, payload.refs)
    root.begin(body, shape(pids, range(len(pids))))
    outcomes = root.wait()
    _raise([trees.death_of(o[1]) for o in outcomes.values() if o[0] == trees.DEAD])
    return {pids[k]: pickle.loads(o[1]) for k, o in outcomes.items() if o[1]}


class _Sending(Root):
    """A broadcast under way: the pieces follow the word that they come."""

    __slots__ = ("parts",)

    def __init__(self, kind: int, pids: Sequence[int], combines: bool) -> None:
        super().__init__(kind, pids, combines)
        self.parts: list[Buffer] = []

    def told(self, branches: Sequence[Branch]) -> None:
        """Send the pieces to those who have just been told."""
        for k, part in enumerate(self.parts):
            view = memoryview(part).cast("B")
            for start in range(0, view.nbytes, PIECE):
                for branch in branches:
                    head = pickle.dumps((*self.key[:2], branch[0], k, start), 5)
                    trees.send(branch[1], CHUNK, head, [view[start : start + PIECE]])


class _Incoming:
    """A value that comes in pieces."""

    def __init__(self, key: RefId, sizes: Sequence[int], mates: Any, refs: Any) -> None:
        self.key = key
        self.refs = refs
        self.offsets, size = segments.lay_out(sizes)
        self.sizes = list(sizes)
        self.segment: Segment | None = None
        memory: Any
        if mates is not None:
            self.segment = segments.lend(size)
            self.segment.users = {node.me, *mates}
            memory = self.segment.memory
        else:
            memory = blank(size)
        self.memory = memoryview(memory)
        self.seen: set[tuple[int, int]] = set()
        self.missing = sum(sizes)

    def add(self, part: int, start: int, data: Any) -> bool:
        """Take in a piece; tell whether it was the last."""
        if (part, start) in self.seen:
            return False
        self.seen.add((part, start))
        offset = self.offsets[part] + start
        piece = memoryview(data).cast("B")
        self.memory[offset : offset + piece.nbytes] = piece
        self.missing -= piece.nbytes
        return not self.missing

    def end(self) -> bytes:
        """Keep the value; say where it lies, if in shared memory."""
        layout = (self.offsets, self.sizes)
        if self.segment is None:
            _copies[self.key] = Copy.in_memory(self.memory.toreadonly(), layout, self.refs)
            return b""
        self.memory.release()
        place = self.segment.place(node.me)
        copy = _copies[self.key] = _mapped_copy(place, layout, self.refs)
        copy.segment = self.segment
        return pickle.dumps(place, 5)


_incoming: dict[tuple[int, int, int], _Incoming] = {}


def _start_receive(job: Job, body: Any, buffers: Sequence[Buffer], refs: Any) -> None:
    (key, sizes, mates), rest = unpack_head(body)
    mine = None if mates is None else mates[node.me]
    if len(rest) and mine is None:
        _copies[key] = Copy(bytes(rest), buffers, refs)
        job.done(OK, b"")
        return
    incoming = _Incoming(key, sizes, mine, refs)
    if not len(rest):
        _incoming[job.key] = incoming
        return
    for k, part in enumerate([rest, *buffers]):
        incoming.add(k, 0, part)
    job.done(OK, incoming.end())


trees.starters[RECEIVE] = _start_receive


@node.control(CHUNK)
def _on_chunk(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    root, number, position, part, start = pickle.loads(body)
    place = (root, number, position)
    job = trees.job_at(place)
    if job is None:
        return
    for branch in job.branches:
        head = pickle.dumps((root, number, branch[0], part, start), 5)
        trees.send(branch[1], CHUNK, head, buffers)
    incoming = _incoming.get(place)
    if incoming is not None and incoming.add(part, start, buffers[0]):
        del _incoming[place]
        job.done(OK, incoming.end())


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
            _copies[handle.key] = Copy(payload.own().body, payload.buffers, payload.refs)
            continue
        body, buffers, refs = outgoing(payload, pid)
        try:
            slots.append(node.request(pid, STORE, (handle.key, refs), body, buffers))
        except ProcessExitedException as exc:
            failures.append(exc)
    node.progress.nudge()
    for slot in slots:
        node.wait(slot)
        if slot.error is not None:
            failures.append(slot.error)
    _raise(failures)
    return handles


def _freeing(key: RefId, pids: Sequence[int]) -> Callable[[], None]:
    """Make what is called when no handle is left; it must not hold one itself."""
    return lambda: _free(key, pids)


@node.control(STORE)
def _on_store(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (key, with_refs), rest = unpack_head(body)
    refs: Any = ()
    if with_refs:
        refs, rest = references.arrive(rest)
    _copies[key] = Copy(bytes(rest), buffers, refs)
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
    shared = handle._host is not None and handle._host == _host_of(node.me)
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
        except (ProcessExitedException, ValueError) as exc:
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
            return _mapped_copy(*facts, refs)
        except OSError:
            _dropped.append((facts[0][0], facts[0][3]))
    return None


@node.control(PULL)
def _on_pull(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (key, shared), _ = unpack_head(body)
    copy = _copies.get(key)
    if copy is None:
        node.reply(peer, ident, OK, pack_head((_NONE, None, False)))
        return
    if shared and copy.segment is not None:
        copy.segment.users.add(peer.pid)
        sizes = [memoryview(part).nbytes for part in (copy.body, *copy.buffers)]
        offsets, _ = segments.lay_out(sizes)
        facts = (copy.segment.place(node.me), (offsets, sizes))
        body, _, with_refs = outgoing(Payload(b"", (), copy.refs), peer.pid)
        node.reply(peer, ident, OK, pack_head((_SHARED, facts, with_refs), body))
        return
    body, parts, with_refs = outgoing(Payload(bytes(copy.body), copy.buffers, copy.refs), peer.pid)
    node.reply(peer, ident, OK, pack_head((_PLAIN, None, with_refs), body), parts)


# Freeing


def _free(key: RefId, pids: Sequence[int]) -> None:
    """Have all copies of a value of ours dropped."""
    _drop(key)
    body = pickle.dumps(key, 5)
    for pid in pids:
        if pid != node.me:
            trees.send(pid, DROP, body)
    node.progress.soon()


def _drop(key: RefId) -> None:
    copy = _copies.pop(key, None)
    if copy is not None and copy.segment is not None:
        _tell_closed(segments.release(copy.segment))
    del copy
    _tell_dropped()


@node.control(DROP)
def _on_drop(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    _drop(pickle.loads(body))


_dropped: list[tuple[int, int]] = []  # (maker, inode) of segments whose views here have gone


def _tell_dropped() -> None:
    """Tell the makers of segments that we have no more views of them."""
    while _dropped:
        try:
            maker, inode = _dropped.pop()
        except IndexError:  # another thread was faster
            return
        if maker == node.me:
            _tell_closed(segments.left(inode, node.me))
        else:
            trees.send(maker, DROPPED, pickle.dumps(inode, 5))


node.progress.before_sleep.append(_tell_dropped)


@node.control(DROPPED)
def _on_dropped(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    _tell_closed(segments.left(pickle.loads(body), peer.pid))


def _tell_closed(inodes: list[int]) -> None:
    """Tell all who may have them mapped that segments of ours are no more."""
    if inodes:
        segments.unmap(node.me, inodes)
        body = pickle.dumps(inodes, 5)
        here = _host_of(node.me)
        for pid in node.members.procs():
            if pid != node.me and _host_of(pid) in (here, ""):
                trees.send(pid, UNMAP, body)


@node.control(UNMAP)
def _on_unmap(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    segments.unmap(peer.pid, pickle.loads(body))


def _on_death(pid: int) -> None:
    """With its owner a value goes; what is in use here stays as long as it is."""
    for key in [key for key in list(_copies) if key[0] == pid]:
        _drop(key)
    for place in [place for place in list(_incoming) if place[0] == pid]:
        del _incoming[place]
    segments.left_all(pid)
    segments.unmap(pid)


node.on_death.append(_on_death)


def _raise(failures: Sequence[Exception]) -> None:
    if len(failures) > 1:
        raise _errors.CompositeException("not every process got its value", failures)
    if failures:
        raise failures[0]
