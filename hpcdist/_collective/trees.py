"""Work handed down a tree of processes, and its outcomes handed up.

One process, the root, wants something done by many. It tells a few, each of which tells a few
more; outcomes come back the same way. Handing on is done by the progress side, so a process in
the middle of a long call does not hold up the ones below it.

Two ways up. *Gathering*: every outcome reaches the root, joined with others on the way.
*Combining*: each process waits for those below it, puts their parts behind its own, in order, and
hands one part up.

A process is named by its position in the root's list, so that one named twice does things twice.
When one dies, the process above it tells the root which ones below may not have been reached; the
root asks these again, and those that have done the work only answer again.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from hpcdist import _errors
from hpcdist._errors import ProcessExitedException
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.references import Reference, References
from hpcdist._transport.contracts import Slot
from hpcdist._transport.wait_loop import WaitLoop
from hpcdist._wire import messages
from hpcdist._wire.codec import Payload, copied
from hpcdist._wire.frames import Buffer
from hpcdist._wire.messages import Down, Up

WIDTH = 4  # how many a process tells itself
CALL, LOOP, REDUCE, MAP, RECEIVE, DROP = range(6)  # what is to be done
OK, FAILED, DEAD, ORPHAN = range(4)  # how it went; an orphan may not have been reached


class Key(NamedTuple):
    """Names a share of a job, on whichever process."""

    root: int
    number: int  # of the job at its root
    position: int  # -1: the root's own


class Branch(NamedTuple):
    """A process, and those that it hands the work on to."""

    position: int
    pid: int
    below: tuple[Branch, ...] = ()


class Outcome(NamedTuple):
    """How one process's share went."""

    position: int
    how: int
    what: bytes
    buffers: int = 0  # how many of the buffers beside it are its own
    with_refs: bool = False


class Result(NamedTuple):
    """The same at the root, with its buffers."""

    how: int
    what: Any
    buffers: Sequence[Buffer]
    with_refs: bool


class Part(NamedTuple):
    """What the root sends to one process."""

    branch: Branch
    above: tuple[int, int]  # pid and position of who wants its outcomes
    payload: Payload  # what it is to do
    forwards: bool  # whether it hands that on


Starter = Callable[["Job", Any, Sequence[Buffer], Any], None]


# Shapes


def fan(pids: Sequence[int], positions: Sequence[int]) -> list[Branch]:
    """Cut a list into few contiguous blocks; the first of each leads the rest of it."""
    if len(positions) <= WIDTH:
        return flat(pids, positions)
    branches: list[Branch] = []
    start = 0
    for size in shares(len(positions), WIDTH):
        block = positions[start : start + size]
        branches.append(Branch(block[0], pids[block[0]], tuple(fan(pids, block[1:]))))
        start += size
    return branches


def doubling(pids: Sequence[int], first: int, end: int) -> Branch:
    """Let the first lead blocks of 1, 2, 4 ... others: two parts meet at each step up."""
    branches = []
    start, size = first + 1, 1
    while start < end:
        branches.append(doubling(pids, start, min(start + size, end)))
        start, size = start + size, 2 * size
    return Branch(first, pids[first], tuple(branches))


def flat(pids: Sequence[int], positions: Sequence[int]) -> list[Branch]:
    """Tell everyone directly: where workers may not talk to each other."""
    return [Branch(position, pids[position]) for position in positions]


def shares(count: int, parts: int) -> list[int]:
    """Return sizes of contiguous parts, as equal as can be, the larger ones first."""
    each, extra = divmod(count, parts) if parts else (0, 0)
    return [each + (k < extra) for k in range(parts)]


def below(branch: Branch) -> list[tuple[int, int]]:
    """List position and pid of all below a branch."""
    found = []
    for sub in branch.below:
        found.append((sub.position, sub.pid))
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
        "trees",
        "waiting",
    )

    def __init__(
        self,
        trees: Trees,
        key: Key,
        branches: Sequence[Branch],
        above: tuple[int, int] | None,
        combines: bool,
    ) -> None:
        self.trees = trees  # of the process whose share it is
        self.key = key
        self.above = above  # pid and position of who wants the outcomes; None at the root
        self.combines = combines
        self.own = above is not None
        self.branches = branches
        self.waiting = {branch.position: branch for branch in branches}
        self.outcomes: list[Outcome] = []
        self.buffers: list[Buffer] = []
        self.ended = False
        self.through: Callable[[], None] | None = None  # called once our buffers have been sent
        # Where what is combined arrives: we put it behind our own part in order.
        self.slots = {b.position: Slot(b.pid) for b in branches} if combines else {}

    def done(
        self, status: int, body: bytes, buffers: Sequence[Buffer] = (), refs: bool = False
    ) -> None:
        """Take in the outcome of our own share; only the first counts.

        After an interrupt that came too late it is given again. None comes within the lock, as
        nothing is called there: `_transport/interrupts` explains it.
        """
        outcome = Outcome(self.key.position, status, body, len(buffers), refs)
        with self.trees.lock:
            if self.own:
                self.outcomes += [outcome]
                self.buffers += buffers
                self.own = False
        self.look()

    def fail(self, failures: Sequence[Outcome]) -> None:
        """Hand failures up in place of a combined part."""
        with self.trees.lock:
            self.outcomes.extend(failures)
            self.own = False
        self.look()

    def take(self, position: int, outcomes: Sequence[Outcome], buffers: Sequence[Buffer]) -> None:
        """Take in what came up from a branch."""
        with self.trees.lock:
            if self.waiting.pop(position, None) is None:
                return
            if self.ended:  # since this outcome was found to be wanted: it comes in vain
                self.trees.has_come_in_vain(self.key, position)
                return
            slot = self.slots.get(position)
            if slot is None:
                self.outcomes.extend(outcomes)
                self.buffers.extend(buffers)
        if slot is not None:
            slot.value = (outcomes, buffers)
            self.trees.node.progress.complete(slot)
        self.look()

    def lose(self, position: int) -> None:
        """Say that a process right below is dead, and which others may not have been reached."""
        branch = self.waiting.get(position)
        if branch is not None:
            dead = Outcome(position, DEAD, self.trees.last_words(branch.pid))
            orphans = [Outcome(p, ORPHAN, b"") for p, _ in below(branch)]
            self.take(position, [dead, *orphans], ())

    def look(self) -> None:
        """Hand up what we have once it is all there is."""
        with self.trees.lock:
            if self.own or self.above is None or self.ended:
                return
            if self.waiting and not self.combines:
                return
            self.ended = True
            if self.combines or self.above[0] == self.key.root:
                self.trees.jobs.pop(self.key, None)  # nobody will ask again
                self.trees.expect_in_vain(self.key, self.waiting.values())
        self.hand_up()

    def hand_up(self) -> None:
        """Send our outcomes to the process above."""
        assert self.above is not None
        root, number, position = self.key
        plain = [tuple(outcome) for outcome in self.outcomes]  # pickled in a third of the time
        up = Up(root, number, self.above[1], position, plain)
        sent = self.trees.send(self.above[0], up, b"", self.buffers, self.through)
        if self.through is not None and not (sent and self.buffers):
            self.through()


class Root(Job):
    """A job as the process sees it that wants it done."""

    __slots__ = ("all_in", "announced", "kind", "payload", "pids")

    def __init__(self, trees: Trees, kind: int, pids: Sequence[int], combines: bool) -> None:
        node = trees.node
        super().__init__(trees, Key(node.me, next(node.ids), -1), (), None, combines)
        self.kind = kind
        self.pids = pids
        self.payload = Payload(b"")
        self.all_in = Slot()
        self.announced = set[int]()  # positions that the references inside are on their way to

    def begin(self, payload: Payload, branches: Sequence[Branch]) -> None:
        """Hand the work down; each process below hands it on."""
        self.trees.node.start()
        self.payload = payload
        me = (self.key.root, -1)
        self.hand_out([Part(b, me, payload, True) for b in branches], branches)

    def told(self, branches: Sequence[Branch]) -> None:
        """Send what has to follow the word of what is to be done."""

    def begin_flat(self, payloads: Callable[[int], Payload], branches: Sequence[Branch]) -> None:
        """Tell everyone ourselves, each what it is to do; outcomes come up the tree."""
        self.trees.node.start()
        me = (self.key.root, -1)
        todo = [(branch, me) for branch in branches]
        for branch, _ in todo:
            todo += [(sub, (branch.pid, branch.position)) for sub in branch.below]
        # Processes that wait for others come last.
        parts = [Part(b, above, payloads(b.position), False) for b, above in reversed(todo)]
        self.hand_out(parts, branches)

    def hand_out(self, parts: Sequence[Part], branches: Sequence[Branch]) -> None:
        """Send what is to be done, and wait for these branches."""
        progress = self.trees.node.progress
        try:
            with (
                progress.interrupts.section()
            ):  # what is begun, and which references travel, is told
                self._hand_out(parts, branches, progress)
            self.told(branches)
            progress.nudge()
        except BaseException:  # Ctrl-C: those that have the work do it, nothing waits for it
            self.forget()
            raise

    def _hand_out(
        self, parts: Sequence[Part], branches: Sequence[Branch], progress: WaitLoop
    ) -> None:
        with self.trees.lock:
            self.waiting.update((branch.position, branch) for branch in branches)
            # A new one: a thread that has just found the last one done may be slow.
            self.all_in = Slot()
            self.all_in.ready = not branches
            self.trees.jobs[self.key] = self
            oldest = self.trees.oldest_of_ours()
        at_once = progress.seize()
        try:
            for part in parts:
                self.send(part, oldest, at_once)
        finally:
            if at_once:
                progress.let_go()

    def look(self) -> None:
        """End the wait once all is there. Where nobody waits, after Ctrl-C, that is the end."""
        with self.trees.lock:
            over = None if self.waiting else self.all_in
            if over is not None and all(outcome.how != ORPHAN for outcome in self.outcomes):
                self.trees.jobs.pop(self.key, None)
        if over is not None:
            self.trees.node.progress.complete(over)

    def send(self, part: Part, oldest: int, at_once: bool) -> None:
        """Send the work to one process."""
        branch, above, parcel, forwards = part
        body = parcel.body
        if parcel.refs:
            references = self.trees.references
            for position, pid in [branch[:2], *(below(branch) if forwards else ())]:
                if position not in self.announced:  # who is asked again takes them in only once
                    self.announced.add(position)
                    references.announce(parcel.refs, pid)
            body = references.listed(parcel.refs) + body
        down = Down(
            root=self.key.root,
            number=self.key.number,
            kind=self.kind,
            forwards=forwards,
            combines=self.combines,
            with_refs=bool(parcel.refs),
            position=branch.position,
            below=branch.below,
            above=above,
            oldest=oldest,
        )
        if not self.trees.send(branch.pid, down, body, parcel.buffers, at_once=at_once):
            self.lose(branch.position)

    def wait(self, timeout: float | None = None) -> dict[int, Result]:
        """Wait for all outcomes; return them by position, as (how, what, buffers, with refs)."""
        node = self.trees.node
        now = node.machine.now
        deadline = None if timeout is None else now() + timeout
        try:
            while True:
                left = None if deadline is None else max(0.0, deadline - now())
                node.wait(self.all_in, left)
                if self.combines:
                    return self.sorted()
                lost = [o.position for o in self.outcomes if o.how == ORPHAN]
                self.outcomes = [o for o in self.outcomes if o.how != ORPHAN]
                answered = {o.position for o in self.outcomes}
                orphans = [position for position in lost if position not in answered]
                if not orphans:
                    return self.sorted()
                self.begin(self.payload, fan(self.pids, orphans))
        except TimeoutError:
            raise
        except BaseException:  # Ctrl-C: the work goes on, nothing waits for it
            self.forget()
            raise

    def is_done(self) -> bool:
        """Tell whether all outcomes are here."""
        return self.all_in.ready

    def went_well(self) -> bool:
        """Tell whether all is done and nothing failed."""
        return self.is_done() and all(outcome.how == OK for outcome in self.outcomes)

    def sorted(self) -> dict[int, Result]:
        """Sort the outcomes by position."""
        self.forget()
        found = {}
        start = 0
        for position, status, body, count, refs in self.outcomes:
            found[position] = Result(status, body, self.buffers[start : start + count], refs)
            start += count
        return dict(sorted(found.items()))

    @property
    def nbytes(self) -> int:
        """How large the largest outcome is, or all of their buffers."""
        largest = max((len(outcome.what) for outcome in self.outcomes), default=0)
        return largest + sum(memoryview(b).nbytes for b in self.buffers)

    def forget(self) -> None:
        """Take in nothing more."""
        with self.trees.lock:
            self.trees.jobs.pop(self.key, None)


# This process's part in all jobs


class Trees(Service):
    """The jobs that this process has a share in."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.references = node.service(References)
        self.starters: dict[int, Starter] = {}  # by kind; the driver calls them: they may not block
        self.lock = node.machine.lock()  # guards the jobs: two threads may end one at once
        self.jobs: dict[Key, Job] = {}
        self._early: dict[Key, list[tuple[Any, Any]]] = {}  # outcomes that overtook the work
        # Outcomes still to come for jobs that have ended without them: positions and pids.
        self._in_vain: dict[Key, dict[int, int]] = {}
        node.on_death.append(self._on_death)

    # Shapes

    def fan_or_flat(self, pids: Sequence[int]) -> list[Branch]:
        """Let few tell the others, unless workers may not talk to each other."""
        shape = fan if self.node.topology == "all_to_all" else flat
        return shape(pids, range(len(pids)))

    def by_world(self, pids: Sequence[int], positions: Sequence[int]) -> list[Branch]:
        """Feed each world once, at its first member; our own world from here."""
        worlds: dict[int, list[int]] = {}
        for position in positions:
            worlds.setdefault(self.world_of(pids[position]), []).append(position)
        own = worlds.pop(self.world_of(self.node.me), [])
        heads = [Branch(b[0], pids[b[0]], tuple(fan(pids, b[1:]))) for b in worlds.values()]
        return fan(pids, own) + heads

    def world_of(self, pid: int) -> int:
        """Return the MPI world of a process: where one message is as cheap as another."""
        member = self.node.members.living.get(pid)
        if member is not None:
            return member.world
        return 0 if self.node.progress.plane is not None and pid == 1 else -pid

    # Jobs

    def oldest_of_ours(self) -> int:
        """Return the number of the oldest job that is ours. Called with the lock held."""
        return min(
            key.number for key in self.jobs if key.root == self.node.me and key.position == -1
        )

    def last_words(self, pid: int) -> bytes:
        """Return what this process knows of a death, for others."""
        death = self.node.members.death(pid)
        return pickle.dumps(death.facts, 5)

    def death_of(self, words: bytes) -> ProcessExitedException:
        """Make the error of a death that another process told of."""
        told = ProcessExitedException(*pickle.loads(words))
        known = self.node.members.gone.get(told.pid)
        return known.copy() if known is not None else told

    def send(
        self,
        pid: int,
        message: NamedTuple,
        body: bytes = b"",
        buffers: Sequence[Buffer] = (),
        through: Callable[[], None] | None = None,
        at_once: bool = False,
    ) -> bool:
        """Send a control to any process, this one included; tell whether it is alive.

        Args:
            pid: The process.
            message: The control.
            body: What lies behind it.
            buffers: What goes with it.
            through: Called once the buffers are ours again.
            at_once: Not with the next flush. Only for the thread that holds the wheel.
        """
        if pid == self.node.me:
            # Copied, as if it had travelled: who gets it may write to it.
            self.node.send(pid, message, 0, body, [copied(b) for b in buffers])
            if through is not None and buffers:
                through()
            return True
        peer = self.node.peers.get(pid)
        if peer is None or not peer.alive:
            return False
        data, parts = messages.packed(message, 0, body, buffers)
        if at_once and not parts:
            peer.send_now(data)
        else:
            peer.post(data, parts, through if buffers else None)
        return True

    # What others tell

    @on(Down)
    def _on_down(self, said: Down, mail: Mail) -> None:
        branches = said.below
        if len(self.jobs) > 1:
            self._drop_old(said.root, said.oldest)
        key = Key(said.root, said.number, said.position)
        known = self.jobs.get(key)
        job = known or Job(self, key, branches, said.above, said.combines)
        with self.lock:
            self.jobs[key] = job
            early = self._early.pop(key, ())
            asked: Collection[Branch] = ()
            if known is not None:  # done or being done: only the process above has changed
                asked = known.waiting.values()  # if asked again, they would answer twice
                known.above, known.ended = said.above, False
                known.branches = branches
                known.waiting = {branch.position: branch for branch in branches}
        for sub in branches:
            if sub in asked:
                continue
            if said.forwards:
                above = (self.node.me, said.position)
                onward = said._replace(position=sub.position, below=sub.below, above=above)
                alive = self.send(sub.pid, onward, mail.body, mail.buffers)
            else:
                alive = sub.pid not in self.node.members.gone
            if not alive:
                job.lose(sub.position)
        for (below_position, outcomes), parts in early:
            job.take(below_position, outcomes, parts)
        if known is not None:
            known.look()
        else:
            self._start(job, said, mail)

    def _start(self, job: Job, said: Down, mail: Mail) -> None:
        """Begin our own share."""
        refs: Sequence[Reference] = ()
        rest = mail.body
        if said.with_refs:
            refs, rest = self.references.arrive(rest)
        try:
            self.starters[said.kind](job, rest, mail.buffers, refs)
        except Exception as exc:  # no memory for the message, say: the waiter gets it
            job.done(FAILED, _errors.encode_error(exc, self.node.me))

    def _drop_old(self, root: int, oldest: int) -> None:
        with self.lock:
            for key in [
                k for k, j in self.jobs.items() if k.root == root and k.number < oldest and j.ended
            ]:
                del self.jobs[key]

    @on(Up)
    def _on_up(self, said: Up, mail: Mail) -> None:
        key = Key(said.root, said.number, said.position)
        outcomes = [Outcome._make(plain) for plain in said.outcomes]
        with self.lock:
            job = self.jobs.get(key)
            if job is None:
                if self.has_come_in_vain(key, said.below):
                    return
                if said.root != self.node.me and said.root not in self.node.members.gone:
                    self._early.setdefault(key, []).append(((said.below, outcomes), mail.buffers))
                return
        job.take(said.below, outcomes, mail.buffers)

    def _on_death(self, pid: int) -> None:
        for key, job in list(self.jobs.items()):
            for position, branch in list(job.waiting.items()):
                # It has died, or nobody wants the others' outcomes any more.
                if pid in (key.root, branch.pid):
                    job.lose(position)
            if key.root == pid:
                with self.lock:
                    self.jobs.pop(key, None)
        for key in [key for key in list(self._early) if key.root == pid]:
            self._early.pop(key, None)
        with self.lock:
            for key, left in list(self._in_vain.items()):
                for position in [p for p, other in left.items() if pid in (key.root, other)]:
                    self.has_come_in_vain(key, position)

    def expect_in_vain(self, key: Key, branches: Iterable[Branch]) -> None:
        """Note whose outcomes a job does not need any more. Called with the lock held."""
        left = {branch.position: branch.pid for branch in branches}
        if left:
            self._in_vain[key] = left

    def has_come_in_vain(self, key: Key, position: int) -> bool:
        """Tell whether an outcome is one of those, and wait for it no more. Likewise."""
        left = self._in_vain.get(key)
        if left is None or left.pop(position, None) is None:
            return False
        if not left:
            del self._in_vain[key]
        return True
