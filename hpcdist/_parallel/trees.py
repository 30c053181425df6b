"""Work handed down a tree of processes, and its outcomes handed up.

One process, the root, wants something done by many. It tells a few, each of which tells a few
more; outcomes come back the same way. Handing on is done by the progress side, so a process in
the middle of a long call does not hold up the ones below it.

Two ways up. *Gathering*: every outcome reaches the root, joined with others on the way.
*Combining*: each process waits for those below it, puts their parts behind its own, in order, and
hands one part up.

A process is named by its position in the root's list, so that one named twice does things twice.
When one dies, the process above it tells the root which ones below may not have been reached; the
root asks these again, and who has heard already only answers again.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._errors import ProcessExitedException
from hpcdist._runtime import references
from hpcdist._runtime.controls import DOWN, UP
from hpcdist._runtime.node import node
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire.codec import Payload, copied
from hpcdist._wire.frames import CONTROL, Buffer, pack

WIDTH = 4  # how many a process tells itself
CALL, LOOP, REDUCE, MAP, RECEIVE = range(5)  # what is to be done
OK, FAILED, DEAD, ORPHAN = range(4)  # how it went; an orphan may not have been reached

Branch = tuple[int, int, tuple[Any, ...]]  # position, pid, the branches below
Outcome = tuple[int, int, bytes, int, bool]  # position, how, what, its buffers, with references
Result = tuple[int, Any, Sequence[Buffer], bool]  # the same at the root, with its buffers
Starter = Callable[["Job", Any, Sequence[Buffer], Any], None]
# What the root sends: the branch, pid and position of who wants its outcomes, what it is to do,
# and whether it hands that on.
Part = tuple[Branch, tuple[int, int], Payload, bool]

starters: dict[int, Starter] = {}  # by kind; called by the driver, so they must not block
_lock = threading.Lock()  # guards the jobs: two threads may end one at once
_jobs: dict[tuple[int, int, int], Job] = {}  # by (root, number, position)
_early: dict[tuple[int, int, int], list[tuple[Any, Any]]] = {}  # outcomes that overtook the work


# Shapes


def fan(pids: Sequence[int], positions: Sequence[int]) -> list[Branch]:
    """Cut a list into few contiguous blocks; the first of each leads the rest of it."""
    if len(positions) <= WIDTH:
        return flat(pids, positions)
    branches: list[Branch] = []
    start = 0
    for size in shares(len(positions), WIDTH):
        block = positions[start : start + size]
        branches.append((block[0], pids[block[0]], tuple(fan(pids, block[1:]))))
        start += size
    return branches


def doubling(pids: Sequence[int], first: int, end: int) -> Branch:
    """Let the first lead blocks of 1, 2, 4 ... others: two parts meet at each step up."""
    branches = []
    start, size = first + 1, 1
    while start < end:
        branches.append(doubling(pids, start, min(start + size, end)))
        start, size = start + size, 2 * size
    return first, pids[first], tuple(branches)


def by_world(pids: Sequence[int], positions: Sequence[int]) -> list[Branch]:
    """Feed each world once, at its first member; our own world from here."""
    worlds: dict[int, list[int]] = {}
    for position in positions:
        worlds.setdefault(world_of(pids[position]), []).append(position)
    own = worlds.pop(world_of(node.me), [])
    heads: list[Branch] = [
        (block[0], pids[block[0]], tuple(fan(pids, block[1:]))) for block in worlds.values()
    ]
    return fan(pids, own) + heads


def world_of(pid: int) -> int:
    """The MPI world of a process: where one message is as cheap as another."""
    member = node.members.living.get(pid)
    if member is not None:
        return member.world
    return 0 if node.progress.plane is not None and pid == 1 else -pid


def flat(pids: Sequence[int], positions: Sequence[int]) -> list[Branch]:
    """Tell everyone directly: where workers may not talk to each other."""
    return [(position, pids[position], ()) for position in positions]


def shares(count: int, parts: int) -> list[int]:
    """Sizes of contiguous parts, as equal as can be, the larger ones first."""
    each, extra = divmod(count, parts) if parts else (0, 0)
    return [each + (k < extra) for k in range(parts)]


def below(branch: Branch) -> list[tuple[int, int]]:
    """List position and pid of all below a branch."""
    found = []
    for sub in branch[2]:
        found.append((sub[0], sub[1]))
        found += below(sub)
    return found


# Jobs


class Job:
    """One process's share of the work, and the shares below it that it waits for."""

    __slots__ = (
        "above",
        "branches",
        "buffers",
        "combines",
        "ended",
        "key",
        "outcomes",
        "own",
        "slots",
        "through",
        "waiting",
    )

    def __init__(
        self,
        key: tuple[int, int, int],
        branches: Sequence[Branch],
        above: tuple[int, int] | None,
        combines: bool,
    ) -> None:
        self.key = key
        self.above = above  # pid and position of who wants the outcomes; None at the root
        self.combines = combines
        self.own = above is not None
        self.branches = branches
        self.waiting = {branch[0]: branch for branch in branches}
        self.outcomes: list[Outcome] = []
        self.buffers: list[Buffer] = []
        self.ended = False
        self.through: Callable[[], None] | None = None  # called once our buffers have been sent
        # Where what is combined arrives: we put it behind our own part in order.
        self.slots = {branch[0]: Slot(branch[1]) for branch in branches} if combines else {}

    def done(
        self, status: int, body: bytes, buffers: Sequence[Buffer] = (), refs: bool = False
    ) -> None:
        """Take in the outcome of our own share."""
        with _lock:
            self.outcomes.append((self.key[2], status, body, len(buffers), refs))
            self.buffers.extend(buffers)
            self.own = False
        self.look()

    def fail(self, failures: Sequence[Outcome]) -> None:
        """Hand failures up in place of a combined part."""
        with _lock:
            self.outcomes.extend(failures)
            self.own = False
        self.look()

    def take(self, position: int, outcomes: Sequence[Outcome], buffers: Sequence[Buffer]) -> None:
        """Take in what came up from a branch."""
        with _lock:
            if self.waiting.pop(position, None) is None:
                return
            slot = self.slots.get(position)
            if slot is None:
                self.outcomes.extend(outcomes)
                self.buffers.extend(buffers)
        if slot is not None:
            slot.value = (outcomes, buffers)
            node.progress.complete(slot)
        self.look()

    def lose(self, position: int) -> None:
        """A process right below us is dead: say so, and who may not have been reached."""
        branch = self.waiting.get(position)
        if branch is not None:
            dead = (position, DEAD, last_words(branch[1]), 0, False)
            orphans = [(p, ORPHAN, b"", 0, False) for p, _ in below(branch)]
            self.take(position, [dead, *orphans], ())

    def look(self) -> None:
        """Hand up what we have once it is all there is."""
        with _lock:
            if self.own or self.above is None or self.ended:
                return
            if self.waiting and not self.combines:
                return
            self.ended = True
            if self.combines or self.above[0] == self.key[0]:
                _jobs.pop(self.key, None)  # nobody will ask again
        self.hand_up()

    def hand_up(self) -> None:
        """Send our outcomes to the process above."""
        assert self.above is not None
        root, number, position = self.key
        head = (root, number, self.above[1], position, self.outcomes)
        sent = send(self.above[0], UP, pickle.dumps(head, 5), self.buffers, self.through)
        if self.through is not None and not (sent and self.buffers):
            self.through()


def job_at(place: tuple[int, int, int]) -> Job | None:
    """Find the share of a job that a process named by root, number and position has."""
    return _jobs.get(place)


def last_words(pid: int) -> bytes:
    """What we know of a death, to be told to others."""
    death = node.members.death(pid)
    return pickle.dumps((pid, death.why, death.host, death.stderr), 5)


def send(
    pid: int,
    op: int,
    body: bytes,
    buffers: Sequence[Buffer] = (),
    through: Callable[[], None] | None = None,
    at_once: bool = False,
) -> bool:
    """Send a control to any process, this one included; tell whether it is alive.

    Args:
        pid: The process.
        op: The control.
        body: What it says.
        buffers: What goes with it.
        through: Called once the buffers are ours again.
        at_once: Not with the next flush; for who holds the wheel.
    """
    if pid == node.me:
        # Copied, as if it had travelled: who gets it may write to it.
        node.handlers[op](None, 0, body, [copied(b) for b in buffers])  # type: ignore[arg-type]
        if through is not None and buffers:
            through()
        return True
    peer = node.peers.get(pid)
    if peer is None or not peer.alive:
        return False
    data, parts = pack(CONTROL, 0, 0, op, body, buffers)
    if at_once and not parts:
        peer.send_now(data)
    else:
        peer.post(data, parts, through if buffers else None)
    return True


class Root(Job):
    """A job as the process sees it that wants it done."""

    __slots__ = ("all_in", "kind", "payload", "pids")

    def __init__(self, kind: int, pids: Sequence[int], combines: bool) -> None:
        super().__init__((node.me, next(node.ids), -1), (), None, combines)
        self.kind = kind
        self.pids = pids
        self.payload = Payload(b"")
        self.all_in = Slot()

    def begin(self, payload: Payload, branches: Sequence[Branch]) -> None:
        """Hand the work down; who is told hands it on."""
        node.start()
        self.payload = payload
        self.hand_out([(branch, (node.me, -1), payload, True) for branch in branches], branches)

    def told(self, branches: Sequence[Branch]) -> None:
        """Send what has to follow the word of what is to be done."""

    def begin_flat(self, payloads: Callable[[int], Payload], branches: Sequence[Branch]) -> None:
        """Tell everyone ourselves, each what it is to do; outcomes come up the tree."""
        node.start()
        me = (node.me, -1)
        todo = [(branch, me) for branch in branches]
        for branch, _ in todo:
            todo += [(sub, (branch[1], branch[0])) for sub in branch[2]]
        # Who waits for others hears last.
        parts = [(branch, above, payloads(branch[0]), False) for branch, above in reversed(todo)]
        self.hand_out(parts, branches)

    def hand_out(self, parts: Sequence[Part], branches: Sequence[Branch]) -> None:
        """Send what is to be done, and wait for these branches."""
        with _lock:
            self.waiting.update((branch[0], branch) for branch in branches)
            self.all_in = Slot()  # a new one: who has just found the last one done may be slow
            self.all_in.ready = not branches
            _jobs[self.key] = self
            oldest = min(key[1] for key in _jobs if key[0] == node.me and key[2] == -1)
        try:
            at_once = node.progress.seize()
            try:
                for part in parts:
                    self.tell(*part, oldest, at_once)
            finally:
                if at_once:
                    node.progress.let_go()
            self.told(branches)
            node.progress.nudge()
        except BaseException:  # Ctrl-C: who has been told does it, nobody waits for it
            self.forget()
            raise

    def look(self) -> None:
        """End the wait once all is there."""
        with _lock:
            over = None if self.waiting else self.all_in
        if over is not None:
            node.progress.complete(over)

    def tell(
        self,
        branch: Branch,
        above: tuple[int, int],
        parcel: Payload,
        forwards: bool,
        oldest: int,
        at_once: bool,
    ) -> None:
        """Send the work to one process."""
        body = parcel.body
        if parcel.refs:
            whom = [branch[1], *(p for _, p in below(branch))] if forwards else [branch[1]]
            for pid in whom:
                listed = references.announce(parcel.refs, pid)
            body = listed + body
        facts = (self.key[0], self.key[1], self.kind, forwards, self.combines, bool(parcel.refs))
        if not hand_down(facts, branch, above, oldest, body, parcel.buffers, at_once):
            self.lose(branch[0])

    def wait(self, timeout: float | None = None) -> dict[int, Result]:
        """Wait for all outcomes; return them by position, as (how, what, buffers, with refs)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                node.wait(self.all_in, left)
                if self.combines:
                    return self.sorted()
                answered = {o[0] for o in self.outcomes if o[1] != ORPHAN}
                orphans = [o[0] for o in self.outcomes if o[1] == ORPHAN and o[0] not in answered]
                self.outcomes = [o for o in self.outcomes if o[1] != ORPHAN]
                if not orphans:
                    return self.sorted()
                self.begin(self.payload, fan(self.pids, orphans))
        except TimeoutError:
            raise
        except BaseException:  # Ctrl-C: the work goes on, nobody waits for it
            self.forget()
            raise

    def is_done(self) -> bool:
        """Tell whether all outcomes are here."""
        return self.all_in.ready

    def went_well(self) -> bool:
        """Tell whether all is done and nothing failed."""
        return self.is_done() and all(outcome[1] == OK for outcome in self.outcomes)

    def sorted(self) -> dict[int, Result]:
        """Sort the outcomes by position."""
        self.forget()
        found = {}
        start = 0
        for position, status, body, count, refs in self.outcomes:
            found[position] = (status, body, self.buffers[start : start + count], refs)
            start += count
        return dict(sorted(found.items()))

    @property
    def nbytes(self) -> int:
        """How large the largest outcome is, or all of their buffers."""
        largest = max((len(outcome[2]) for outcome in self.outcomes), default=0)
        return largest + sum(memoryview(b).nbytes for b in self.buffers)

    def forget(self) -> None:
        """Take in nothing more."""
        with _lock:
            _jobs.pop(self.key, None)


# Of a job: root, number, kind, whether it is handed on, combines, has references in its payload.
Facts = tuple[int, int, int, bool, bool, bool]


def hand_down(
    facts: Facts,
    branch: Branch,
    above: tuple[int, int],
    oldest: int,
    body: Any,
    buffers: Sequence[Buffer],
    at_once: bool = False,
) -> bool:
    """Send work to the first of a branch; tell whether it is alive."""
    data = pickle.dumps((facts, branch, above, oldest, bytes(body)), 5)
    return send(branch[1], DOWN, data, buffers, at_once=at_once)


@node.control(DOWN)
def _on_down(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    facts, branch, above, oldest, rest = pickle.loads(body)
    root, number, kind, forwards, combines, with_refs = facts
    position, _, branches = branch
    if len(_jobs) > 1:
        _drop_old(root, oldest)
    place = (root, number, position)
    known = _jobs.get(place)
    job = known or Job(place, branches, above, combines)
    with _lock:
        _jobs[place] = job
        early = _early.pop(place, ())
        if known is not None:  # done or being done: only who wants to know has changed
            known.above, known.ended = above, False
            known.branches = branches
            known.waiting = {branch[0]: branch for branch in branches}
    for sub in branches:
        if forwards:
            alive = hand_down(facts, sub, (node.me, position), oldest, rest, buffers)
        else:
            alive = sub[1] not in node.members.gone
        if not alive:
            job.lose(sub[0])
    for (below_position, outcomes), parts in early:
        job.take(below_position, outcomes, parts)
    if known is not None:
        known.look()
    else:
        refs: Any = ()
        if with_refs:
            refs, rest = references.arrive(rest)
        starters[kind](job, rest, buffers, refs)


def _drop_old(root: int, oldest: int) -> None:
    with _lock:
        for key in [k for k, j in _jobs.items() if k[0] == root and k[1] < oldest and j.ended]:
            del _jobs[key]


@node.control(UP)
def _on_up(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    root, number, position, below_position, outcomes = pickle.loads(body)
    key = (root, number, position)
    with _lock:
        job = _jobs.get(key)
        if job is None:
            if root != node.me and root not in node.members.gone:
                _early.setdefault(key, []).append(((below_position, outcomes), buffers))
            return
    job.take(below_position, outcomes, buffers)


def _on_death(pid: int) -> None:
    for key, job in list(_jobs.items()):
        for position, branch in list(job.waiting.items()):
            if pid in (key[0], branch[1]):  # nobody wants the others' outcomes any more, or it
                job.lose(position)
        if key[0] == pid:
            with _lock:
                _jobs.pop(key, None)
    for key in [key for key in list(_early) if key[0] == pid]:
        _early.pop(key, None)


node.on_death.append(_on_death)


def death_of(words: bytes) -> ProcessExitedException:
    """Make the error of a death that another process told of."""
    pid, why, host, stderr = pickle.loads(words)
    known = node.members.gone.get(pid)
    return known.copy() if known is not None else ProcessExitedException(pid, why, host, stderr)
