"""The policy of `adapt=(lo, hi)`: how many jobs there are to be, and which are given back.

Nothing here starts, ends or waits for anything: see `adapting`. Jobs come at once when more work
waits. They go late: when for a while no work has called for them, those in the queue first, the
last one submitted before the others, and of those that run only the ones that had nothing to do.
So what comes and goes within that while starts and ends nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hpcdist._contract.adapting import Adapt
from hpcdist._numbers import clock


def called_for(workers: int, each: int, adapt: Adapt) -> int:
    """Return how many jobs of `each` workers are to be there where so many workers are wanted.

    >>> [called_for(workers, 4, Adapt(1, 3)) for workers in (0, 4, 5, 100)]
    [1, 1, 2, 3]
    """
    return min(adapt.hi, max(adapt.lo, -(-workers // each)))


class Peak:
    """The most jobs that were called for at a time of late.

    Args:
        seconds: How long ago that may be.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._noted: deque[tuple[float, int]] = deque()  # each less than the one before

    def note(self, now: float, jobs: int) -> int:
        """Take note of how many are called for now; return the most of late."""
        noted = self._noted
        while noted and noted[-1][1] <= jobs:
            noted.pop()
        noted.append((now, jobs))
        while noted[0][0] < now - self._seconds:
            noted.popleft()
        return noted[0][1]


@dataclass(frozen=True)
class Standing:
    """One place for a job, as it is now.

    Attributes:
        sound: It has workers, or some are coming, and no other job is due in its place.
        working: It has workers.
        queued: Its job waits in the queue.
        submitted: When that was submitted; 0: it is being submitted.
        idle: For how many seconds its workers have had nothing to do.
    """

    sound: bool = False
    working: bool = False
    queued: bool = False
    submitted: float = 0.0
    idle: float = 0.0


@dataclass(frozen=True)
class Arrangement:
    """What to do with the places, which are named by their numbers.

    Attributes:
        keep: May get another job in place of one that is lost or about to end.
        drop: Are no more: their jobs have ended, and no other is called for.
        give_back: Their jobs are to end.
        start: How many are to be made.
    """

    keep: tuple[int, ...] = ()
    drop: tuple[int, ...] = ()
    give_back: tuple[int, ...] = ()
    start: int = 0


def arrange(
    places: Sequence[Standing], needed: int, peak: int, adapt: Adapt, *, renew: bool = False
) -> Arrangement:
    """Say what to do.

    Args:
        places: Where there are jobs, or were.
        needed: How many jobs are called for.
        peak: The most that were called for of late.
        adapt: What the user has asked for.
        renew: Whether a job that ends soon gets a successor before its end.

    >>> arrange([], 3, 3, Adapt(0, 5))
    Arrangement(keep=(), drop=(), give_back=(), start=3)
    >>> arrange([], 3, 3, Adapt(0, 5, max_queued=2))
    Arrangement(keep=(), drop=(), give_back=(), start=2)
    >>> job = Standing(sound=True, working=True)
    >>> arrange([job, job], 2, 2, Adapt(0, 5))
    Arrangement(keep=(0, 1), drop=(), give_back=(), start=0)
    >>> idle = Standing(sound=True, working=True, idle=61)
    >>> arrange([job, idle], 0, 0, Adapt(1, 5)).give_back
    (1,)
    """
    sound = [k for k, place in enumerate(places) if place.sound]
    others = [k for k, place in enumerate(places) if not place.sound]
    renewed = others[: max(0, needed - len(sound))] if renew else []
    drop = [k for k in others if not places[k].working and k not in renewed]
    queued = sum(place.queued for place in places)
    room = min(needed - len(sound) - len(renewed), adapt.max_queued - queued - len(renewed))
    return Arrangement(
        keep=(*sound[:needed], *renewed),
        drop=tuple(drop),
        give_back=tuple(_spare(places, max(peak, adapt.lo), adapt.idle)),
        start=max(0, room),
    )


def _spare(places: Sequence[Standing], stay: int, idle: float) -> list[int]:
    """Choose the places whose jobs are given back, where so many sound ones are to stay."""
    queued = [k for k, place in enumerate(places) if place.queued and place.submitted]
    queued.sort(key=lambda k: -places[k].submitted)
    unused = [k for k, p in enumerate(places) if p.working and p.idle >= idle and not p.queued]
    unused.sort(key=lambda k: -places[k].idle)
    surplus = sum(place.sound for place in places) - stay
    found = [k for k in (*queued, *unused) if places[k].sound][: max(0, surplus)]
    # What another job was due for anyhow, and has nothing to do: nobody misses it.
    return found + [k for k in unused if not places[k].sound and surplus >= 0]


def line(
    waiting: int, jobs: int, workers: int, queued: int, ending: tuple[str, float] | None = None
) -> str:
    """Say in one line how a launch stands.

    Args:
        waiting: How many items, tasks or calls wait for a worker.
        jobs: How many jobs run.
        workers: How many workers they have.
        queued: How many jobs wait.
        ending: The job that ends next, and in how many seconds.

    >>> line(3000, 6, 192, 14, ("41", 120))
    '3,000 items waiting: 6 jobs run (192 workers), 14 queued · job 41 ends in 2:00'
    >>> line(1, 1, 1, 0)
    '1 item waiting: 1 job runs (1 worker)'
    >>> line(0, 0, 0, 2)
    '0 items waiting: no job runs, 2 queued'
    """
    run = f"{jobs:,} job{'s run' if jobs > 1 else ' runs'} ({workers:,} worker{_s(workers)})"
    text = f"{waiting:,} item{_s(waiting)} waiting: {run if jobs else 'no job runs'}"
    text += f", {queued:,} queued" if queued else ""
    return text if ending is None else f"{text} · job {ending[0]} ends in {clock(ending[1])}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
