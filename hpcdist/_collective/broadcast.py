"""How a value reaches many processes: by shared memory on a host, in pieces down a tree else."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hpcdist import _errors
from hpcdist._collective import shared_memory, trees
from hpcdist._collective.shared_memory import Segment
from hpcdist._collective.trees import DROP, FAILED, MAP, OK, RECEIVE, Branch, Job, Key, Root, Trees
from hpcdist._collective.value_copies import Copy, Layout, ValueCopies
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.references import Reference
from hpcdist._wire import messages
from hpcdist._wire.blocks import blank
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import Body, Buffer
from hpcdist._wire.messages import Chunk, Drop, Place, RefId

PIECE = 4 << 20
_DIRECT_MOST = 2 * trees.WIDTH  # so many are told by the owner itself that a value is freed


class _Sending(Root):
    """A broadcast under way: the pieces follow the word that they come."""

    __slots__ = ("parts",)

    def __init__(self, trees: Trees, kind: int, pids: Sequence[int], combines: bool) -> None:
        super().__init__(trees, kind, pids, combines)
        self.parts: list[Buffer] = []

    def told(self, branches: Sequence[Branch]) -> None:
        """Send the pieces to the branches that have just got the work."""
        root, number, _ = self.key
        for k, part in enumerate(self.parts):
            view = memoryview(part).cast("B")
            for start in range(0, view.nbytes, PIECE):
                for branch in branches:
                    chunk = Chunk(root, number, branch.position, k, start)
                    self.trees.send(branch.pid, chunk, b"", [view[start : start + PIECE]])


class _Freeing(Root):
    """The word that a value is freed, under way: nobody waits for its end."""

    __slots__ = ("drop",)

    def __init__(self, trees: Trees, pids: Sequence[int], drop: Callable[[int], None]) -> None:
        super().__init__(trees, DROP, pids, combines=False)
        self.drop = drop  # tells one process directly

    def look(self) -> None:
        """Once all have answered, tell those directly that may not have been reached."""
        if not self.waiting:
            self.forget()
            for outcome in self.outcomes:
                if outcome.how == trees.ORPHAN:
                    self.drop(self.pids[outcome.position])


class Announcement(NamedTuple):
    """What is said of a value before it comes."""

    key: RefId
    sizes: list[int]  # of its stream and buffers
    mates: dict[int, list[int]] | None  # who will map the copy, by the process that writes it


class _Incoming:
    """A value that comes in pieces."""

    def __init__(
        self,
        copies: ValueCopies,
        key: RefId,
        sizes: Sequence[int],
        mates: Any,
        refs: Sequence[Reference],
    ) -> None:
        self._copies = copies
        self.key = key
        self.refs = refs
        self.offsets, size = shared_memory.lay_out(sizes)
        self.sizes = list(sizes)
        self.segment: Segment | None = None
        memory: Any
        if mates is not None:
            self.segment = copies.segments.lend(size)
            copies.segments.enter(self.segment, mates)
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
            copy = Copy.in_memory(self.memory.toreadonly(), layout, self.refs)
            self._copies.keep(self.key, copy)
            return b""
        self.memory.release()
        place = self.segment.place(self._copies.node.me)
        copy = self._copies.mapped_copy(place, layout, self.refs)
        copy.segment = self.segment
        self._copies.keep(self.key, copy)
        return pickle.dumps(place, 5)


class Broadcasts(Service):
    """The values that this process sends to many, and those that come in pieces."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._trees = node.service(Trees)
        self._copies = node.service(ValueCopies)
        self._incoming: dict[Key, _Incoming] = {}
        # How values of ours go that are not known to have arrived: whom to, and the tree.
        self._ways: dict[RefId, list[tuple[Sequence[int], Sequence[Branch]]]] = {}
        self._trees.starters[MAP] = self._start_map
        self._trees.starters[RECEIVE] = self._start_receive
        self._trees.starters[DROP] = self._start_drop
        node.on_death.append(self._on_death)

    def share(self, key: RefId, payload: Payload, pids: Sequence[int]) -> None:
        """Write a value into shared memory of this host; send it once to each other host."""
        parts: list[Buffer] = [payload.body, *payload.buffers]
        sizes = [memoryview(part).nbytes for part in parts]
        offsets, size = shared_memory.lay_out(sizes)
        segment = self._copies.written(size, parts, offsets)
        here = self._copies.host_of(self.node.me)
        hosts: dict[str, list[int]] = {}
        for pid in pids:
            if pid != self.node.me:
                hosts.setdefault(self._copies.host_of(pid), []).append(pid)
        near = hosts.pop(here, [])
        layout = (offsets, sizes)
        place = segment.place(self.node.me)
        try:
            self._copies.segments.enter(segment, [self.node.me])
            copy = self._copies.held[key] = self._copies.mapped_copy(place, layout, payload.refs)
            copy.segment = segment
        except BaseException:  # no descriptor left, or Ctrl-C
            self._copies.let_go(segment)
            raise
        self._copies.segments.enter(segment, near)
        jobs = []
        if near:
            jobs.append(self._have_mapped(key, layout, payload, {place: near}))
        leaders = [mates[0] for mates in hosts.values()]
        found: dict[int, Any] = {}
        if leaders:
            mates = {leader: hosts[self._copies.host_of(leader)] for leader in leaders}
            found = self.send(key, payload, leaders, mates)
            places = {found[leader]: mates[leader][1:] for leader in leaders if found.get(leader)}
            jobs.append(self._have_mapped(key, layout, payload, places))
        failures: list[Exception] = []
        without: list[int] = []
        for job, asked in jobs:
            for position, outcome in job.wait().items():
                if outcome.how == trees.DEAD:
                    failures.append(self._trees.death_of(outcome.what))
                    self._copies.forget_views(asked[position])
                elif outcome.how == FAILED:
                    without.append(asked[position])
        if without:
            self.send(key, payload, without)
        raise_all(failures)

    def _have_mapped(
        self, key: RefId, layout: Layout, payload: Payload, places: dict[Place, list[int]]
    ) -> tuple[Root, list[int]]:
        pids = [pid for mates in places.values() for pid in mates]
        place_of = [place for place, mates in places.items() for _ in mates]
        root = Root(self._trees, MAP, pids, combines=False)
        body = pickle.dumps((key, layout, place_of), 5)
        branches = self._trees.fan_or_flat(pids)
        self._ways.setdefault(key, []).append((pids, branches))
        root.begin(Payload(body, (), payload.refs), branches)
        return root, pids

    # Sending the bytes: to other hosts, and where memory cannot be shared

    def send(
        self,
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
        root = _Sending(self._trees, RECEIVE, pids, combines=False)
        if sum(sizes) > PIECE:
            root.parts = parts
        shape = self._trees.by_world if self.node.topology == "all_to_all" else trees.flat
        coming = Announcement(key, sizes, mates)
        head = messages.encode(coming, b"" if root.parts else payload.body)
        body = Payload(head, () if root.parts else payload.buffers, payload.refs)
        branches = shape(pids, range(len(pids)))
        self._ways.setdefault(key, []).append((pids, branches))
        root.begin(body, branches)
        outcomes = root.wait()
        raise_all([self._error_of(o) for o in outcomes.values() if o.how in (trees.DEAD, FAILED)])
        return {pids[k]: pickle.loads(o.what) for k, o in outcomes.items() if o.what}

    def _error_of(self, outcome: trees.Result) -> Exception:
        if outcome.how == trees.DEAD:
            return self._trees.death_of(outcome.what)
        return _errors.decode_error(bytes(outcome.what))

    # Freeing

    def arrived(self, key: RefId) -> None:
        """Take note that a value has come to all."""
        self._ways.pop(key, None)

    def free(self, key: RefId, pids: Sequence[int]) -> None:
        """Have all copies of a value of ours dropped.

        After Ctrl-C it may still be on its way: then the word goes the same way, behind it.
        """
        node = self.node
        self._copies.drop(key)
        ways = self._ways.pop(key, None)
        if ways is not None:
            for whom, branches in ways:
                self._send_word(key, whom, branches)
            return
        living = [pid for pid in pids if pid != node.me and pid not in node.members.gone]
        if len(living) <= _DIRECT_MOST or node.topology != "all_to_all":
            for pid in living:
                self._drop_at(pid, key)
            return
        self._send_word(key, living, self._trees.by_world(living, range(len(living))))

    def _send_word(self, key: RefId, pids: Sequence[int], branches: Sequence[Branch]) -> None:
        root = _Freeing(self._trees, pids, lambda pid: self._drop_at(pid, key))
        root.begin(Payload(pickle.dumps(key, 5)), branches)

    def _drop_at(self, pid: int, key: RefId) -> None:
        self.node.send(pid, Drop(key))
        self.node.progress.soon()

    def _start_drop(
        self, job: Job, body: Body, buffers: Sequence[Buffer], refs: Sequence[Reference]
    ) -> None:
        key = pickle.loads(body)
        for share, incoming in list(self._incoming.items()):
            if incoming.key == key:  # its pieces do not come any more
                del self._incoming[share]
                coming = self._trees.jobs.get(share)
                if coming is not None:
                    coming.done(OK, b"")
        self._copies.drop(key)
        job.done(OK, b"")

    # What comes

    def _start_map(
        self, job: Job, body: Body, buffers: Sequence[Buffer], refs: Sequence[Reference]
    ) -> None:
        key, layout, place_of = pickle.loads(body)
        place = place_of[job.key.position]
        try:
            self._copies.keep(key, self._copies.mapped_copy(place, layout, refs))
        except OSError as exc:  # another namespace, say: it has to be sent
            job.done(FAILED, _errors.encode_error(exc, self.node.me))
            return
        job.done(OK, b"")

    def _start_receive(
        self, job: Job, body: Body, buffers: Sequence[Buffer], refs: Sequence[Reference]
    ) -> None:
        (key, sizes, mates), rest = messages.decode(Announcement, body)
        mine = None if mates is None else mates[self.node.me]
        if len(rest) and mine is None:
            self._copies.keep(key, Copy(bytes(rest), buffers, refs))
            job.done(OK, b"")
            return
        incoming = _Incoming(self._copies, key, sizes, mine, refs)
        if not len(rest):
            self._incoming[job.key] = incoming
            return
        for k, part in enumerate([rest, *buffers]):
            incoming.add(k, 0, part)
        job.done(OK, incoming.end())

    @on(Chunk)
    def _on_chunk(self, said: Chunk, mail: Mail) -> None:
        share = Key(said.root, said.number, said.position)
        job = self._trees.jobs.get(share)
        if job is None:
            return
        for branch in job.branches:
            self._trees.send(branch.pid, said._replace(position=branch.position), b"", mail.buffers)
        incoming = self._incoming.get(share)
        if incoming is not None and incoming.add(said.part, said.start, mail.buffers[0]):
            del self._incoming[share]
            job.done(OK, incoming.end())

    def _on_death(self, pid: int) -> None:
        for share in [share for share in list(self._incoming) if share.root == pid]:
            del self._incoming[share]


def raise_all(failures: list[Exception]) -> None:
    try:
        if len(failures) > 1:
            message = "not every process got its value"
            raise _errors.CompositeException.of_processes(message, failures)
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # this frame and its caller's are of their traceback
