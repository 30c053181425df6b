"""Which items fit into what is left of a worker's job, and what a job's end has cut off.

A worker whose job is about to end gets no item that would still run then. What an item takes is
measured: 19 of 20 items of this map have taken no longer; or the user says it. An item that was cut
off nevertheless takes longer than it has run by then, so it goes to a worker with more time. One
that was cut off twice though it had a whole job's time is given up: no map goes round for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from hpcdist._errors import ProcessExitedException
from hpcdist._maps.lanes import Lane
from hpcdist._maps.sources import Part
from hpcdist._numbers import clock
from hpcdist._runtime.members import Members

_MARGIN = 1.0  # seconds between an item's result and the job's end
_SHARE = 0.95  # of the items are to have taken no longer than what is reckoned with
_SAMPLE = 400  # batches that are remembered
_WHOLE = 0.8  # the part of a walltime that counts as a whole job's time
_LONGEST = 1e12  # seconds
_CUTS = 2  # whole jobs' times that an item gets
# How a worker may end that its items are not charged with: in Slurm's words, by which hpcdist calls
# the same of other schedulers, and in our own.
_NOBODY_S_FAULT = ("TIMEOUT", "PREEMPTED", "NODE_FAIL", "its time was up")


class Fitting:
    """What the items of one map take, beside what is left of its workers' jobs.

    Args:
        members: The workers, with the ends of their jobs.
        date: Tells the time, as `JobEnd` does.
        duration: What an item takes, in seconds, if the user says so.
    """

    def __init__(self, members: Members, date: Callable[[], float], duration: float | None) -> None:
        self._members = members
        self._date = date
        self._duration = duration
        self._measured: deque[float] = deque(maxlen=_SAMPLE)
        self._usual: float | None = None
        self._is_stale = False
        self._at_end: set[int] = set()  # workers that have ended when their jobs' time was up
        self._ran: dict[int, float] = {}  # by index: how long an item ran until it was cut off
        self._whole: dict[int, int] = {}  # and how often it had a whole job's time

    def note(self, seconds: float) -> None:
        """Take note of what an item has taken."""
        self._measured.append(seconds)
        self._is_stale = True

    @property
    def mean(self) -> float | None:
        """What an item takes, as the user says, or on average; None: that is not known yet."""
        if self._duration is not None:
            return self._duration
        measured = list(self._measured)  # any thread may ask
        return sum(measured) / len(measured) if measured else None

    @property
    def matters(self) -> bool:
        """Whether the end of any worker's job is known."""
        return bool(self._members.ends)

    def room(self, pid: int) -> float | None:
        """Return how many seconds a worker may be busy; None: no end is known."""
        end = self._members.ends.get(pid)
        return None if end is None else end.at - self._date() - _MARGIN

    def most(self, lane: Lane, unit: int) -> int | None:
        """Return how many items more a worker may get; None: any number."""
        room, need = self.room(lane.pid), self._need()
        if room is None:
            return None
        if need is None or need <= 0.0:  # nothing is known yet: one finds out
            return None if room > 0 and not lane.items else 0
        return max(0, int(room / need) - lane.items) // unit * unit

    def drains(self, lane: Lane, most: int) -> bool:
        """Note and tell whether a worker gets nothing more, as no item would end before its job."""
        if most or lane.batches:
            self._members.draining.discard(lane.pid)
            return False
        self._members.draining.add(lane.pid)
        return True

    def fits_nowhere(self, pids: Iterable[int]) -> str | None:
        """Say why no item will ever run on these workers, or on others like them; None: they may.

        Only what the user says of the items counts: what was measured has fitted.
        """
        if self._duration is None:
            return None
        ends = [self._members.ends.get(pid) for pid in pids]
        times = [end.walltime for end in ends if end is not None and end.walltime is not None]
        if not times or len(times) < len(ends) or self._duration + _MARGIN <= max(times):
            return None
        return (
            f"duration={self._duration:g}: no item fits into a job, not even into a whole one: "
            f"they may run for {clock(max(times))}"
        )

    def has_time(self, pid: int, ahead: int) -> bool:
        """Tell whether a worker may get one item more, behind so many others."""
        room, need = self.room(pid), self._need()
        if room is None:
            return True
        if need is None or need <= 0.0:
            return room > 0 and not ahead
        return room >= need * (ahead + 1)

    def may_run(self, start: int, size: int, pid: int) -> bool:
        """Tell whether a worker has more time than an item of these was cut off after."""
        if not self._ran:
            return True
        room = self.room(pid)
        ran = max(self._ran.get(k, 0.0) for k in range(start, start + size))
        return room is None or not ran or room > ran

    def note_death(self, pid: int) -> None:
        """Take note that a worker has ended: with its job, if the time fits."""
        end = self._members.end_of(pid)
        if end is not None and self._date() >= end.at - _MARGIN:
            self._at_end.add(pid)

    def excuses(self, pid: int) -> bool:
        """Tell whether a worker has ended through no fault of its items.

        The scheduler's word on it may come a while later.
        """
        why = self._members.death(pid).why
        return pid in self._at_end or any(word in why for word in _NOBODY_S_FAULT)

    def given_up(
        self, suspects: Part, error: ProcessExitedException, seconds: float
    ) -> ProcessExitedException | None:
        """Return the error of an item that the end of a job has cut off, if it runs no more.

        Args:
            suspects: The items that its worker may have been running.
            error: The worker's death.
            seconds: For how long one of them has run.
        """
        if suspects.size != 1:
            return None
        what = f"item {suspects.start}"
        why = self.cut_off(suspects.start, what, error.pid, seconds)
        if why is None:
            return None
        return error.copy(f"{error.why}; {why}")

    def cut_off(self, index: int, what: str, pid: int, seconds: float) -> str | None:
        """Take note that an item was cut off by its job's end.

        Args:
            index: Of the item.
            what: Names it.
            pid: The worker.
            seconds: How long it had run.

        Returns:
            Why it is not run again, if it is not.
        """
        end = self._members.end_of(pid)
        walltime = end.walltime if end is not None else None
        self._ran[index] = max(seconds, self._ran.get(index, 0.0))
        if walltime is None or seconds < _WHOLE * walltime:
            return None
        self._whole[index] = self._whole.get(index, 0) + 1
        if self._whole[index] < _CUTS:
            return None
        return (
            f"{what} was cut off {_CUTS} times, the last time after {clock(seconds)}: "
            f"it does not fit into a job of {clock(walltime)}"
        )

    def _need(self) -> float | None:
        if self._duration is not None:
            return self._duration
        if self._is_stale:
            self._is_stale = False
            measured = sorted(self._measured)
            self._usual = measured[min(len(measured) - 1, int(_SHARE * len(measured)))]
        return self._usual


def checked(duration: object) -> float | None:
    """Read what `duration=` says: seconds, or nothing."""
    if duration is None:
        return None
    number = isinstance(duration, int | float) and not isinstance(duration, bool)
    if not number or not 0 < duration < _LONGEST:  # type: ignore[operator]
        raise ValueError(f"duration is a number of seconds above 0, not {duration!r}")
    return float(duration)  # type: ignore[arg-type]
