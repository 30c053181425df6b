"""The policy of `renew=True`: what is to be started and who is to retire, given what is there.

Nothing here starts, removes or waits for anything: see `replacements`. A launch has a berth for
each of its worlds; in it lie that world and those that have taken its place. The successor of a
job is started before its time is over: as long before as the queue may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ATTEMPTS = 3  # starts in a row of which no worker comes: then the launch has failed
_PAUSE = 1.0  # seconds before a start that follows a vain one; twice as many after two
_PAUSE_OF_JOBS = 10.0  # the same, where a scheduler is asked
_LEAST_LEAD = 120.0  # seconds before the end of a job in which its successor is submitted


@dataclass(frozen=True)
class Standing:
    """One world, as it is now.

    Attributes:
        whole: Its workers share MPI, so it is replaced all together.
        living: Workers that have registered, and neither died nor were asked to leave.
        coming: Workers still to register.
        ready: All that are coming have proved to be there, and are about to register.
        died: Workers that were lost.
        removed: Workers that the user has removed.
        retired: Another world has taken its place; nothing else counts then.
        ending: Its job ends soon: a successor is due.
        over: Its job ends this moment.
    """

    whole: bool = True
    living: int = 0
    coming: int = 0
    ready: bool = False
    died: int = 0
    removed: int = 0
    retired: bool = False
    ending: bool = False
    over: bool = False

    @property
    def damaged(self) -> bool:
        """Whether it is to be replaced all together."""
        return self.whole and self.died > 0


@dataclass(frozen=True)
class Orders:
    """What to do in one berth.

    Attributes:
        start: How many workers a new world is to have; 0: none is to be started.
        retire: Which worlds, by their place in the berth, get nothing new to do from now on.
    """

    start: int = 0
    retire: tuple[int, ...] = ()


def wanted(size: int, worlds: Sequence[Standing]) -> int:
    """Return how many workers a berth of this size is to have: what the user removed stays away."""
    return max(0, size - sum(world.removed for world in worlds if not world.retired))


def orders(size: int, worlds: Sequence[Standing]) -> Orders:
    """Say what to do in a berth of this size.

    A world that has lost some of its ranks, or whose job ends soon, works on until all of another
    are there.

    >>> orders(3, [Standing(living=2, died=1)])
    Orders(start=3, retire=())
    >>> orders(3, [Standing(living=2, died=1), Standing(coming=3, ready=True)])
    Orders(start=0, retire=(0,))
    >>> orders(3, [Standing(living=3, ending=True), Standing(coming=3)])
    Orders(start=0, retire=())
    >>> orders(3, [Standing(living=3, ending=True), Standing(living=3)])
    Orders(start=0, retire=(0,))
    """
    staying = [w for w in worlds if not (w.retired or w.damaged or w.ending or w.over)]
    there = sum(world.living + world.coming for world in staying)
    wanted_now = wanted(size, worlds)
    begun = any(world.living or world.ready for world in staying)
    full = sum(world.living for world in staying) >= wanted_now
    retire = [
        k
        for k, world in enumerate(worlds)
        if not world.retired
        and (world.over or (world.damaged and begun) or (world.ending and full))
    ]
    return Orders(start=max(0, wanted_now - there), retire=tuple(retire))


def lead(wait: float, walltime: float | None) -> float:
    """Return how long before the end of a job its successor is submitted.

    Args:
        wait: How long the last job has waited in the queue.
        walltime: For how long a job may run.

    >>> [lead(10, 3600), lead(10, 86400), lead(1800, 86400), lead(0, 60)]
    [360.0, 8640.0, 8640.0, 20.0]
    """
    if walltime is None:
        return max(2 * wait, _LEAST_LEAD)
    least = min(_LEAST_LEAD, walltime / 3)  # of a short job most is to be used all the same
    return min(max(2 * wait, walltime / 10, least), walltime / 2)


def pause(failures: int, *, jobs: bool = False) -> float | None:
    """Return how long to wait after so many vain starts in a row; None: start nothing any more.

    >>> [pause(failures) for failures in range(4)]
    [0.0, 1.0, 2.0, None]
    """
    unit = _PAUSE_OF_JOBS if jobs else _PAUSE
    return None if failures >= ATTEMPTS else failures * unit
