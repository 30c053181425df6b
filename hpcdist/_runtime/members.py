"""The members of the cluster, as this process knows them: ids, whereabouts, deaths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from hpcdist._errors import ProcessExitedException
from hpcdist._wire.member import JobEnd, Member


class Death(ProcessExitedException):
    """A worker's death, kept to be raised anew for each who asks: see `copy`."""


class Members:
    """The processes of the cluster.

    Args:
        host: The name of this process's host.
    """

    def __init__(self, host: str) -> None:
        self.living: dict[int, Member] = {}  # workers that count, in the order they joined
        self.gone: dict[int, Death] = {}
        self._last: Death | None = None  # the worker that left last, if none is left
        self.ends: dict[int, JobEnd] = {}  # of the jobs of workers, where that is known
        self._ended_at: dict[int, JobEnd] = {}  # the same, of those that are gone
        self.draining: set[int] = set()  # workers that maps give nothing more: their end is near
        self.awaited = 0  # launches that replace their dead; on process 1
        self._awaited_by_tag: Counter[str] = Counter()
        self._had: dict[str, int] = {}  # the worker that joined last with a tag
        self._host = host
        self._turn = 0

    def add(self, pid: int, member: Member) -> None:
        """Count a worker in."""
        self.living[pid] = member
        self._last = None
        for tag in member.tags:
            self._had[tag] = pid

    def await_some(self, tags: tuple[str, ...], by: int) -> None:
        """Count launches that replace their dead, whose workers have these tags."""
        self.awaited += by
        for tag in tags:
            self._awaited_by_tag[tag] += by

    def awaits(self, tag: str = "") -> bool:
        """Tell whether workers (with a tag) come in the place of those that have died."""
        return bool(self._awaited_by_tag[tag] if tag else self.awaited)

    def end_of(self, pid: int) -> JobEnd | None:
        """Return when the job of a worker ends, or was to end."""
        return self.ends.get(pid) or self._ended_at.get(pid)

    def note_ends(self, ends: Mapping[int, JobEnd | None]) -> None:
        """Take note of when the jobs of workers end."""
        for pid, end in ends.items():
            if end is None or pid in self.gone:
                self.ends.pop(pid, None)
            else:
                self.ends[pid] = end

    @property
    def here(self) -> int:
        """How many workers are on this host."""
        return sum(member.host == self._host for member in list(self.living.values()))

    def remove(self, pid: int, death: ProcessExitedException) -> None:
        """Count a worker out for good."""
        self.living.pop(pid, None)
        end = self.ends.pop(pid, None)
        if end is not None:
            self._ended_at[pid] = end
        self.draining.discard(pid)
        self.gone[pid] = Death(*death.facts).like(death)
        if not self.living:
            self._last = self.gone[pid]

    def dismissed(self) -> None:
        """Note that the user wants no workers: being alone is intended from now on."""
        self._last = None

    def deserted(self, pid: int = 0) -> ProcessExitedException | None:
        """Make the error for one whose last worker has died, and was not removed.

        Args:
            pid: That worker; 0: the last of all, if this process is alone.
        """
        last = self.gone.get(pid) if pid else self._last
        return last.copy() if last is not None and last.why != "removed" else None

    def death(self, pid: int) -> ProcessExitedException:
        """Make the error for a waiter of a dead process."""
        gone = self.gone.get(pid)
        return gone.copy() if gone is not None else ProcessExitedException(pid)

    def workers(self) -> list[int]:
        """List the workers, or pid 1 if it is alone."""
        return sorted(self.living) or [1]

    def procs(self) -> list[int]:
        """List all processes."""
        return [1, *sorted(self.living)]

    def next_worker(self, tag: str = "") -> int:
        """Pick workers (with a tag) one after the other."""
        pids = self.tagged(tag) if tag else self.workers()
        if not pids and tag not in self._had:
            raise ValueError(f"no worker has the tag {tag!r} yet, and a call does not wait for one")
        if not pids:
            raise self.death(self.last_with(tag))
        self._turn += 1
        return pids[(self._turn - 1) % len(pids)]

    # Tags

    def last_with(self, tag: str) -> int:
        """Name the worker that joined last with a tag; 0: none has come yet."""
        return self._had.get(tag, 0)

    def tagged(self, tag: str) -> list[int]:
        """List the workers with a tag.

        Raises:
            ValueError: There never was one.
        """
        found = [pid for pid, member in sorted(self.living.items()) if tag in member.tags]
        if not found and tag not in self._had and not self._awaited_by_tag[tag]:
            there = sorted({tag for member in self.living.values() for tag in member.tags})
            tags = "the tags there are: " + ", ".join(map(repr, there)) if there else "none has one"
            raise ValueError(f"no worker has the tag {tag!r}; {tags}")
        return found
