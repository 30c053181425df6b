"""Snapshots: what all processes of the cluster are doing, gathered while somebody looks."""

from __future__ import annotations

import heapq
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from hpcdist._cluster.begin import Launches
from hpcdist._cluster.roster import Record, Roster
from hpcdist._errors import ProcessExitedException
from hpcdist._events.samples import Sampler
from hpcdist._events.windows import PROTOCOL
from hpcdist._maps.under_way import under_way
from hpcdist._monitor.status import without_answer
from hpcdist._runtime.node import Node, Service
from hpcdist._transport.contracts import Waitable
from hpcdist._version import VERSION
from hpcdist._wire import messages
from hpcdist._wire.messages import AskSample, RunningCall, Sample

Facts = dict[str, Any]  # as it becomes JSON

_ANSWER = 0.5  # seconds that workers have to answer; those that are late show what was last known
_PAIRS_MOST = 1000  # 256 workers that all talk to each other are 65,000
_SILENT = 3.0  # seconds without an answer after which one counts as unresponsive


class Seen(NamedTuple):
    """The last two samples of a process: what it does, and how quickly."""

    sample: Sample
    before: Sample | None


class _Answer(Waitable):
    """A sample that is on its way."""

    def __init__(self, snapshots: Snapshots, pid: int) -> None:
        self.where = pid
        self._snapshots = snapshots

    def arrived(self) -> None:
        self._snapshots.take_in(self.where, self)


class Snapshots(Service):
    """Gathers samples of all processes on process 1. All of it is done by the driver."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._roster = node.service(Roster)
        self._launches = node.service(Launches)
        self._sampler = node.service(Sampler)
        self._seen: dict[int, Seen] = {}
        self._awaited: dict[int, float] = {}  # at most one question to each, and since when
        self._then: Callable[[], None] | None = None
        node.on_death.append(self._on_death)

    def forget(self) -> None:
        """Drop what was known: nobody looks any more."""
        self._seen.clear()

    def gather(self, then: Callable[[], None]) -> None:
        """Ask all processes, and call `then` once they have answered, or are late."""
        node = self.node
        self._then = then
        self._note(node.me, self._sampler.take())
        for pid in sorted(node.members.living):
            if pid not in self._awaited:
                self._ask(pid)
        node.progress.soon()
        if self._awaited:
            node.progress.call_later(_ANSWER, lambda: self._go_on(then))
        else:
            self._go_on(then)

    def _ask(self, pid: int) -> None:
        node, ident = self.node, next(self.node.ids)
        answer = _Answer(self, pid)
        self._awaited[pid] = node.machine.now()
        node.pending[ident] = answer
        try:
            node.peer(pid).send(AskSample(), ident)
        except (ProcessExitedException, ValueError):  # it died this moment
            node.pending.pop(ident, None)
            self._awaited.pop(pid, None)

    def take_in(self, pid: int, answer: Waitable) -> None:
        """Take in a sample; the last one ends the gathering."""
        self._awaited.pop(pid, None)
        if answer.error is None:
            said, _ = messages.decode(Sample, answer.value[1])
            self._note(pid, said)
        if not self._awaited and self._then is not None:
            self._go_on(self._then)

    def _note(self, pid: int, sample: Sample) -> None:
        known = self._seen.get(pid)
        before = None if known is None else known.sample
        self._seen[pid] = Seen(sample, before)

    def _go_on(self, then: Callable[[], None]) -> None:
        if self._then is then:
            self._then = None
            then()

    def _on_death(self, pid: int) -> None:
        self._seen.pop(pid, None)

    # What is shown

    def facts(self) -> Facts:
        """Return what is known, as it becomes JSON."""
        node = self.node
        received, rates = self._received()
        own = self._row(node.me, received, rates)
        workers = [self._row(pid, received, rates) for pid in sorted(node.members.living)]
        return {
            "protocol": PROTOCOL,
            "version": VERSION,
            "at": node.machine.time(),
            "driver": {**own, "command": " ".join(_command())},
            "workers": workers,
            "jobs": self._jobs(),
            "maps": [
                {**state._asdict(), "rate": state.rate, "to_go": state.to_go}
                for state in under_way(node)
            ],
            **self._pairs(),
        }

    def _pairs(self) -> Facts:
        """List who has sent how much to whom; of very many pairs, those that have sent most."""
        found = [
            (count, pid, to)
            for pid, seen in self._seen.items()
            for to, count in seen.sample.sent.items()
        ]
        shown = heapq.nlargest(_PAIRS_MOST, found)
        return {
            "pairs": [
                {"from": pid, "to": to, "bytes": count}
                for count, pid, to in sorted(shown, key=lambda pair: pair[1:])
            ],
            "pairs_left_out": len(found) - len(shown),
        }

    def _received(self) -> tuple[Counter[int], Counter[int]]:
        """Count what each process has got, and gets each second: what others have sent to it."""
        received: Counter[int] = Counter()
        rates: Counter[int] = Counter()
        for seen in self._seen.values():
            for pid, count in seen.sample.sent.items():
                received[pid] += count
                rates[pid] += round(_rate(seen, count, lambda s, pid=pid: s.sent.get(pid, 0)))  # type: ignore[misc]
        return received, rates

    def _row(self, pid: int, received: Counter[int], rates: Counter[int]) -> Facts:
        node = self.node
        seen, record = self._seen.get(pid), self._roster.book.get(pid)
        end = node.members.ends.get(pid)
        left = None if end is None else max(0.0, end.at - node.machine.time())
        row: Facts = {
            "pid": pid,
            **self._whereabouts(pid, record),
            "time_left": left,
            "state": self._state(pid, seen),
            "since": None if record is None else record.since,
        }
        return {**row, **_doing(seen), "bytes_in": received[pid], "bytes_in_rate": rates[pid]}

    def _whereabouts(self, pid: int, record: Record | None) -> Facts:
        member = self.node.members.living.get(pid)
        if member is None:
            machine = self.node.machine
            return {
                "host": machine.hostname(),
                "os_pid": machine.pid(),
                "manager": "",
                "job_id": os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID"),
                "world": None,
                "rank": None,
                "tags": [],
            }
        job = None if record is None else record.config.job_id
        return {
            "host": member.host,
            "os_pid": member.os_pid,
            "manager": member.manager,
            "job_id": None if job is None else str(job),
            "world": member.world,
            "rank": member.rank,
            "tags": list(member.tags),
        }

    def _state(self, pid: int, seen: Seen | None) -> str:
        if seen is None:
            return without_answer(self.node, pid) if pid in self._awaited else "starting"
        asked = self._awaited.get(pid)  # not when it was last heard: perhaps nobody has asked
        if asked is not None and self.node.machine.now() - asked > _SILENT:
            return without_answer(self.node, pid)
        if pid in self.node.members.draining:
            return "DRAINING"
        sample = seen.sample
        if not sample.running:
            return "idle"
        calls = [RunningCall(*call) for call in sample.calls]
        all_wait = len(calls) == sample.running and all(call.waits for call in calls)
        return "waiting" if all_wait else "busy"

    def _jobs(self) -> list[Facts]:
        """List the jobs of the launches that go on."""
        return [
            {
                "job_id": None if world.job is None else str(world.job),
                "state": world.word,
                "reason": launch.reason if not world.up else None,
                "workers": len(world.registered),
                "wanted": world.expected,
                "time_left": world.time_left,
            }
            for launch in list(self._launches.launches)
            if launch.jobs_of is not None
            for world in list(launch.worlds)
            if not world.closed
        ]


def _doing(seen: Seen | None) -> Facts:
    """Tell what a process is doing, and how quickly, from its last two samples."""
    if seen is None:
        return dict.fromkeys(
            ("call", "age", "calls", "running", "queued", "cpu", "rss", "bytes_out")
        ) | {"bytes_out_rate": 0}
    sample = seen.sample
    calls = [RunningCall(*call) for call in sample.calls]
    # The one that has the turn; else the one that has waited longest.
    shown = next((call for call in calls if not call.waits), calls[0] if calls else None)
    out = sum(sample.sent.values())
    return {
        "call": None if shown is None else shown.name,
        "age": None if shown is None else shown.seconds,
        "calls": [call._asdict() for call in calls],
        "running": sample.running,
        "queued": sample.queued,
        "cpu": round(100 * _rate(seen, sample.cpu, lambda s: s.cpu), 1),
        "rss": sample.rss,
        "bytes_out": out,
        "bytes_out_rate": round(_rate(seen, out, lambda s: sum(s.sent.values()))),
    }


def _rate(seen: Seen, value: float, was: Callable[[Sample], float]) -> float:
    before = seen.before
    if before is None or seen.sample.at <= before.at:
        return 0.0
    return max(0.0, value - was(before)) / (seen.sample.at - before.at)


def _command() -> list[str]:
    with suppress(AttributeError):  # an embedded interpreter
        return sys.orig_argv
    return []
