"""How a value reaches many processes: by shared memory on a host, in pieces down a tree else."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._parallel import copies, segments, trees
from hpcdist._parallel.copies import Copy, Layout, held, host_of, mapped_copy
from hpcdist._parallel.segments import Place, Segment
from hpcdist._parallel.trees import FAILED, MAP, OK, RECEIVE, Branch, Job, Root
from hpcdist._runtime.controls import CHUNK
from hpcdist._runtime.node import node, pack_head, unpack_head
from hpcdist._runtime.references import RefId
from hpcdist._transport.router import Peer
from hpcdist._wire.blocks import blank
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Buffer

PIECE = 4 << 20


def share(key: RefId, payload: Payload, pids: Sequence[int]) -> None:
    """Write a value into shared memory of this host; send it once to each other host."""
    parts: list[Buffer] = [payload.body, *payload.buffers]
    sizes = [memoryview(part).nbytes for part in parts]
    offsets, size = segments.lay_out(sizes)
    segment = copies.written(size, parts, offsets)
    here = host_of(node.me)
    hosts: dict[str, list[int]] = {}
    for pid in pids:
        if pid != node.me:
            hosts.setdefault(host_of(pid), []).append(pid)
    near = hosts.pop(here, [])
    layout = (offsets, sizes)
    place = segment.place(node.me)
    try:
        segments.enter(segment, [node.me])
        copy = held[key] = mapped_copy(place, layout, payload.refs)
        copy.segment = segment
    except BaseException:  # no descriptor left, or Ctrl-C
        copies.let_go(segment)
        raise
    segments.enter(segment, near)
    jobs = []
    if near:
        jobs.append(_tell_to_map(key, layout, payload, {place: near}))
    leaders = [mates[0] for mates in hosts.values()]
    found: dict[int, Any] = {}
    if leaders:
        mates = {leader: hosts[host_of(leader)] for leader in leaders}
        found = send(key, payload, leaders, mates)
        places = {found[leader]: mates[leader][1:] for leader in leaders if found.get(leader)}
        jobs.append(_tell_to_map(key, layout, payload, places))
    failures: list[Exception] = []
    without: list[int] = []
    for job, asked in jobs:
        for position, outcome in job.wait().items():
            if outcome[0] == trees.DEAD:
                failures.append(trees.death_of(outcome[1]))
                copies.forget_views(asked[position])
            elif outcome[0] == FAILED:
                without.append(asked[position])
    if without:
        send(key, payload, without)
    raise_all(failures)


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


def _start_map(job: Job, body: Any, buffers: Sequence[Buffer], refs: Any) -> None:
    key, layout, place_of = pickle.loads(body)
    place = place_of[job.key[2]]
    try:
        held[key] = mapped_copy(place, layout, refs)
    except OSError as exc:  # another namespace, say: it has to be sent
        job.done(FAILED, _errors.encode_error(exc, node.me))
        return
    job.done(OK, b"")


trees.starters[MAP] = _start_map


# Sending the bytes: to other hosts, and where memory cannot be shared


def send(
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
    raise_all([trees.death_of(o[1]) for o in outcomes.values() if o[0] == trees.DEAD])
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
            segments.enter(self.segment, mates)
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
            held[self.key] = Copy.in_memory(self.memory.toreadonly(), layout, self.refs)
            return b""
        self.memory.release()
        place = self.segment.place(node.me)
        copy = held[self.key] = mapped_copy(place, layout, self.refs)
        copy.segment = self.segment
        return pickle.dumps(place, 5)


_incoming: dict[tuple[int, int, int], _Incoming] = {}


def _start_receive(job: Job, body: Any, buffers: Sequence[Buffer], refs: Any) -> None:
    (key, sizes, mates), rest = unpack_head(body)
    mine = None if mates is None else mates[node.me]
    if len(rest) and mine is None:
        held[key] = Copy(bytes(rest), buffers, refs)
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


def _on_death(pid: int) -> None:
    for place in [place for place in list(_incoming) if place[0] == pid]:
        del _incoming[place]


node.on_death.append(_on_death)


def raise_all(failures: Sequence[Exception]) -> None:
    if len(failures) > 1:
        raise _errors.CompositeException("not every process got its value", failures)
    if failures:
        raise failures[0]
