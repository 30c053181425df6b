"""The place of a world in a launch that replaces its worlds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hpcdist._cluster import adaptation, renewal
from hpcdist._cluster.retirement import FAREWELL
from hpcdist._cluster.roster import Roster, State
from hpcdist._cluster.world import World
from hpcdist._contract.kept_managers import KeptManager, LaunchView
from hpcdist._errors import LaunchError

_SETTLING = 3.0  # seconds within which the workers of a job that has ended are known to be lost


class RenewedLaunch(LaunchView, Protocol):
    """A launch, as those see it who replace what it has lost."""

    kept: KeptManager | None

    @property
    def hoped(self) -> int:
        """For how many workers somebody waits."""

    def make_world(self, size: int | None) -> World:
        """Make one world more; it is not among the launch's yet."""

    def exchange(self, come: Sequence[World], gone: Sequence[World]) -> None:
        """Count worlds among the launch's, and others no more."""

    def end_renewing(self, error: LaunchError) -> None:
        """Take note that nothing can be started any more."""


class Berth:
    """The place of a world of the launch: in it lie that world and those that replace it."""

    def __init__(self, launch: RenewedLaunch, size: int) -> None:
        self._roster = launch.node.service(Roster)
        self._launch = launch
        self.seats: Sequence[int] = range(size)
        self.label = ""
        self.size = size
        self.worlds: list[World] = []
        self._lost = 0  # workers, when it was last looked at
        self._lost_at = 0.0
        self.given_back = False  # nobody needs it any more: it goes as soon as it is idle
        self.may_start = True  # another world, in place of one that is lost or about to end

    @classmethod
    def of(cls, launch: RenewedLaunch, world: World) -> Berth:
        """Make the place of a world that is there."""
        # The user may have been content with fewer than the world was to have.
        berth = cls(launch, len(world.registered) if world.settled else world.expected or 0)
        berth.seats, berth.label, berth.worlds = world.seats, world.label, [world]
        return berth

    def standings(self) -> list[renewal.Standing]:
        """Return how its worlds are."""
        return [self._standing(world) for world in self.worlds]

    def wanted(self) -> int:
        """Return how many workers it is to have."""
        return 0 if self.given_back else renewal.wanted(self.size, self.standings())

    def as_job(self, idle: float) -> adaptation.Standing:
        """Return how it is, as one of the places for jobs.

        Args:
            idle: For how many seconds its workers have had nothing to do.
        """
        staying = [
            s for s in self.standings() if not (s.retired or s.damaged or s.ending or s.over)
        ]
        return adaptation.Standing(
            sound=any(s.living or s.coming for s in staying),
            working=bool(self.living()),
            queued=bool(self.queued()),
            submitted=min((w.submitted_at if w.job else 0.0 for w in self.queued()), default=0.0),
            idle=idle,
        )

    def orders(self) -> renewal.Orders:
        """Return what is to be done."""
        return renewal.orders(self.size, self.standings())

    def lead(self) -> float:
        """Return how long before the end of a job its successor is started."""
        waits = [world.up_at - world.submitted_at for world in self.worlds if world.submitted_at]
        came = [wait for wait in waits if wait >= 0]
        return renewal.lead(came[-1] if came else 0.0, self._launch.walltime)

    def next_look(self) -> float | None:
        """Return in how many seconds a job needs a successor, or comes to its end."""
        lead, soonest = self.lead(), None
        for left in [world.time_left for world in self.worlds if not world.retired]:
            for moment in () if left is None else (left - lead, left - FAREWELL):
                if moment > 0 and (soonest is None or moment < soonest):
                    soonest = moment
        return soonest

    def is_full(self) -> bool:
        """Tell whether it has all its workers, and those in one piece."""
        sound = [s for s in self.standings() if not (s.retired or s.damaged)]
        return sum(standing.living for standing in sound) >= self.wanted()

    def free_seats(self, count: int) -> list[int]:
        """Return the numbers in the launch that so many new workers are to have."""
        taken = set()
        for world in self.worlds:
            standing = self._standing(world)
            if not (standing.retired or standing.damaged):
                taken |= {
                    seat for rank, seat in enumerate(world.seats) if self._is_taken(world, rank)
                }
        return [seat for seat in self.seats if seat not in taken][:count]

    def lost(self) -> list[int]:
        """Return the workers that have died in its worlds of now."""
        pids = (pid for world in self.worlds if not world.retired for pid in world.registered)
        return [pid for pid in pids if self._has_died(pid)]

    def living(self) -> list[int]:
        """Return the workers that it has, and that are not to leave."""
        pids = (pid for world in self.worlds if not world.retired for pid in world.registered)
        return [pid for pid in pids if self._roster.is_registered(pid)]

    def coming(self) -> list[World]:
        """Return the worlds of which nobody has registered yet, and that still may."""
        return [w for w in self.worlds if not (w.settled or w.registered or w.retired)]

    def queued(self) -> list[World]:
        """Return those of them whose jobs have not started."""
        return [world for world in self.coming() if not world.up]

    def next_end(self) -> tuple[str, float] | None:
        """Return the job that runs and ends next, and in how many seconds; None: none is known."""
        running = [w for w in self.worlds if w.registered and not w.retired and w.job is not None]
        ends = [(str(w.job), w.time_left) for w in running if w.time_left is not None]
        return min(ends, key=lambda end: end[1], default=None)

    def has_ended(self) -> bool:
        """Tell whether nothing of it is left."""
        return all(w.closed and w.ended() and not self._has_workers(w) for w in self.worlds)

    def settles_in(self, now: float) -> float:
        """Tell in how many seconds all will have been lost that go with those lost just now.

        The workers of a job that ends are lost one after the other, and one job replaces them all.
        """
        if any(standing.damaged for standing in self.standings()):
            return 0.0  # its world is replaced as a whole in any case
        lost = len(self.lost())
        if lost != self._lost:
            self._lost, self._lost_at = lost, now
        in_job = any(world.job is not None for world in self.worlds)
        return max(0.0, self._lost_at + _SETTLING - now) if lost and in_job else 0.0

    def retire(self, world: World) -> None:
        """Give a world nothing new to do; it leaves once it is idle."""
        self.size -= self._standing(world).removed
        world.retired = True
        world.retire()

    def clear(self) -> list[World]:
        """Forget the worlds of which nothing is left, but never the last; return them."""
        over = [w for w in self.worlds[:-1] if w.closed and w.ended() and not self._has_workers(w)]
        for world in over:
            if not world.retired:
                self.size -= self._standing(world).removed
            self.worlds.remove(world)
            self._roster.forget(world.registered)
        return over

    def _standing(self, world: World) -> renewal.Standing:
        records = [self._roster.book[pid] for pid in world.registered]
        died = sum(self._has_died(record.pid) for record in records)
        left, renews = world.time_left, self._launch.settings.renew
        living = sum(record.state is State.REGISTERED for record in records)
        return renewal.Standing(
            whole=world.mpi and renews,
            living=living,
            coming=0 if world.settled else (world.expected or 0) - len(records),
            ready=world.ready and not world.settled,
            died=died,
            removed=len(records) - living - died,
            retired=world.retired,
            ending=renews and left is not None and left <= self.lead(),
            over=left is not None and left <= FAREWELL,
        )

    def _has_died(self, pid: int) -> bool:
        return self._roster.book[pid].state is State.GONE and not self._roster.removed(pid)

    def _is_taken(self, world: World, rank: int) -> bool:
        pid = world.by_rank.get(rank)
        if pid is None:
            return not world.settled
        return self._roster.book[pid].state is not State.GONE

    def _has_workers(self, world: World) -> bool:
        return any(self._roster.book[pid].state is not State.GONE for pid in world.registered)
