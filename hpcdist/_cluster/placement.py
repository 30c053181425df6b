"""Which workers a section gets that asks for any so many, and whose communicators are kept.

Process 1 chooses, so that no two sections have different ideas of what is free: a worker is free if
no section is inside, and if it is idle. It is idle if process 1 has given it nothing else to do.
Of others process 1 finds out when it is a section's turn there: it makes a call that does nothing,
and once that has come back, what the worker had to do before is done. So calls and sections take
turns.

Sets that have a communicator come first, as making one costs more than a short task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from hpcdist._cluster.roster import Roster
from hpcdist._collective.spmd import SectionCalls
from hpcdist._errors import ProcessExitedException
from hpcdist._remote.futures import Future
from hpcdist._runtime.node import Node
from hpcdist._wire.messages import SectionEnter

KEPT_MOST = 64  # communicators of sets that no user has named
Pids = tuple[int, ...]


class Choice(NamedTuple):
    """Workers that a section is given, or that are kept for it until there are enough."""

    pids: Pids
    is_enough: bool


class Placement:
    """Chooses workers for sections.

    Args:
        node: Process 1.
        roster: Its book of workers.
        kept: The communicators that there are.
        changed: Called when a worker has become idle.
    """

    def __init__(
        self, node: Node, roster: Roster, kept: KeptComms, changed: Callable[[], None]
    ) -> None:
        self._node = node
        self._roster = roster
        self._kept = kept
        self._changed = changed
        self._calls = node.service(SectionCalls)
        self._sizes: Counter[int] = Counter()  # workers by world
        self._largest = 0  # of all worlds that there were
        self._asked: set[int] = set()  # busy workers that have been called, and have not answered
        self._answered: set[int] = set()  # those that have

    def world_of(self, pid: int) -> int | None:
        """Name the MPI world of a process; None: it has none."""
        if pid == 1:
            return 0 if self._node.progress.plane is not None else None
        record = self._roster.book[pid]
        if record.world is None:  # a rank of the launch that started this process too
            return record.member.world
        return record.world.number if record.world.mpi else None

    def joined(self, pid: int) -> None:
        """Take note of a worker that has joined."""
        # The other ranks of an MPI launch have this service, too, and no book.
        world = self.world_of(pid) if pid in self._roster.book else None
        if world is not None:
            self._sizes[world] += 1
            self._largest = max(self._largest, self._sizes[world])

    def lost(self, pid: int) -> None:
        """Take note of a worker that has died."""
        world = self.world_of(pid) if pid in self._roster.book else None
        if world is not None:
            self._sizes[world] -= 1

    def worlds(self, asked: SectionEnter) -> list[list[int]]:
        """Sort those who may be chosen by world. Process 1 alone is a world, too."""
        living = self._node.members.living
        pids = asked.pids or sorted(living) or [1]
        worlds: dict[int | None, list[int]] = {}
        for pid in pids:
            if pid == 1 or (pid in living and self._roster.is_registered(pid)):
                worlds.setdefault(self.world_of(pid), []).append(pid)
        apart = worlds.pop(None, [])  # who has no MPI can still be alone
        if 1 in apart:
            worlds[None] = [1]
        return list(worlds.values())

    def largest(self, asked: SectionEnter | None = None) -> int:
        """Tell how many may be chosen of one world."""
        worlds = self.worlds(asked or SectionEnter([], 0.0))
        found = max(map(len, worlds), default=0)
        self._largest = max(self._largest, found)
        return found

    def refusal(self, asked: SectionEnter) -> Exception | None:
        """Say why there cannot be so many ranks, even once others have replaced the dead."""
        largest = self.largest(asked)
        if asked.ranks <= (self._largest if self._node.members.awaited else largest):
            return None
        among = f"of the workers {asked.pids}" if asked.pids else "there are"
        if not largest:
            return ValueError(
                f"ranks={asked.ranks} needs workers of an MPI world, and none {among} is in one: "
                "their isolation is 'process', or their manager starts no MPI"
            )
        return ValueError(
            f"ranks={asked.ranks} needs as many workers of one MPI world, and the largest world "
            f"{among} has {largest}. Workers share a world when one addprocs() has started them"
        )

    # Who is idle

    def busy(self) -> set[int]:
        """Find the workers that process 1 has given something to do, but for sections."""
        pending, busy = self._node.pending, set()
        for ident in set(pending) - self._calls.idents:  # other threads add and take away
            slot = pending.get(ident)
            if slot is not None:
                busy.add(slot.where)
        return busy - self._answered - {1}

    def ask(self, pids: Collection[int]) -> None:
        """Find out when busy workers have done what they have to do now."""
        for pid in sorted(set(pids) - self._asked):
            try:
                call = self._calls.calls.remotecall(_nothing, pid, (), {})
            except ProcessExitedException:
                continue
            self._asked.add(pid)
            self._calls.idents.add(call.id)
            hook = partial(self._on_answer, pid, call)
            if not call._hook(hook):
                hook()

    def _on_answer(self, pid: int, call: Future[None]) -> None:
        self._calls.idents.discard(call.id)
        self._asked.discard(pid)
        if call.error is None:
            self._answered.add(pid)
            self._changed()

    def entered(self, pids: Collection[int], *, is_last: bool) -> None:
        """Take note that a section has got workers, and whether none waits for any more."""
        self._answered.difference_update(pids)
        if is_last:
            self._answered.clear()

    # Choosing

    def choose(self, asked: SectionEnter, taken: Collection[int], busy: Collection[int]) -> Choice:
        """Choose workers for a section.

        Args:
            asked: What it needs.
            taken: Workers that others are to have.
            busy: Those that are not idle.
        """
        worlds = [world for world in self.worlds(asked) if len(world) >= asked.ranks]
        there = [[pid for pid in world if pid not in taken] for world in worlds]
        free = [[pid for pid in world if pid not in busy] for world in there]
        found = [self._best(pids, asked.ranks) for pids in free if len(pids) >= asked.ranks]
        if found:
            return Choice(min(found, key=self._hosts), True)
        self.ask([pid for world in there for pid in world if pid in busy])
        # What is kept grows until it is enough, as nobody else gets it: no section starves.
        best: list[int] = max(free, key=len) if free else []
        return Choice(tuple(best), False)

    def _best(self, free: Sequence[int], ranks: int) -> Pids:
        """Choose among the free workers of one world."""
        fresh = self._fresh(free, ranks)
        kept = self._kept.among(set(free), ranks)
        best = min(kept, key=self._hosts, default=fresh)
        return best if self._hosts(best) <= self._hosts(fresh) else fresh

    def _fresh(self, free: Sequence[int], ranks: int) -> Pids:
        """Choose a set as if none had a communicator."""
        by_host: dict[str, list[int]] = {}
        for pid in free:
            by_host.setdefault(self._host(pid), []).append(pid)
        hosts = sorted(by_host.values(), key=len)
        for pids in hosts:
            if len(pids) >= ranks:  # the least room that is enough: others may need more
                return tuple(pids[:ranks])
        hosts.sort(key=len, reverse=True)  # over as few as can be
        spread = [pid for pids in hosts for pid in pids]
        return tuple(sorted(spread[:ranks]))

    def _hosts(self, pids: Pids) -> int:
        return len({self._host(pid) for pid in pids})

    def _host(self, pid: int) -> str:
        return "" if pid == 1 else self._roster.book[pid].member.host


def _nothing() -> None:
    """Be called when a worker's turn has come."""


class KeptComms:
    """The sets of workers that have kept a communicator, as far as process 1 may choose them.

    A set that a user has named is kept for ever: what is attached to its communicator is to stay.
    """

    def __init__(self) -> None:
        self._numbers: dict[Pids, int] = {}  # of sets that were chosen, in the order of their use
        self._named: set[Pids] = set()
        self._unkept: dict[int, list[int]] = {}  # by worker: what it is to free when it can

    def among(self, free: set[int], ranks: int) -> list[Pids]:
        """List the sets of so many ranks that are free as a whole."""
        sets = [*self._numbers, *self._named]
        return [pids for pids in sets if len(pids) == ranks and free.issuperset(pids)]

    def note(self, pids: Pids, comm: int, *, is_named: bool) -> None:
        """Take note that a set uses a communicator."""
        self._numbers.pop(pids, None)
        if is_named:
            self._named.add(pids)
        elif pids not in self._named:
            self._numbers[pids] = comm
        for pid in pids:  # it is in use again
            if comm in self._unkept.get(pid, ()):
                self._unkept[pid].remove(comm)

    def forget(self, pids: Pids) -> None:
        """Take note that the members of a set have let go of its communicator."""
        self._numbers.pop(pids, None)
        self._named.discard(pids)

    def lost(self, dead: int) -> None:
        """Take note of a death: the survivors let go of what they had with it."""
        for pids in [pids for pids in (*self._numbers, *self._named) if dead in pids]:
            self.forget(pids)
        self._unkept.pop(dead, None)

    def limit(self, in_use: Collection[Pids]) -> None:
        """Have those freed that were not used for longest, if there are too many."""
        for pids in list(self._numbers):
            if len(self._numbers) <= KEPT_MOST:
                return
            if pids not in in_use:
                comm = self._numbers.pop(pids)
                for pid in pids:
                    self._unkept.setdefault(pid, []).append(comm)

    def unkept(self, pid: int) -> list[int]:
        """Take what a worker is to free now."""
        return self._unkept.pop(pid, [])
