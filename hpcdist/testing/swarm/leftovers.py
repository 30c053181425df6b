"""What a program must not leave behind in a process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from typing import Any

from hpcdist._runtime.node import Node
from hpcdist.testing.simulation import Simulation
from hpcdist.testing.swarm.acts import Ledger, Wrong

_CONTAINERS = (dict, list, set, deque)
# What grows by design, up to a limit: what is known of processes, and of how long things take;
# services, made at their first use, with what they have.
_KEPT = {
    "Batches._steps",
    "KeptFunctions._forgotten",
    "Links._extra",
    "Pools.watchers",
    "Timings._light",
    "Timings._seconds",
    "Trees.starters",
    "Ledger.tokens",
    "Ledger.tries",
    "Roster.book",
    "Runners.all",
    "Launches.launches",
    "WorkersOutput.logs",
    "WorkersOutput.tails",
}


class Leftovers:
    """What processes hold before a program, and what more they hold after it."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        for pid in sim.pids:
            sim.node(pid).node.service(Ledger)
        self._before = {pid: dict(_sizes(sim.node(pid).node)) for pid in sim.pids}

    def check(self) -> None:
        """Raise what is left."""
        found = [
            f"process {pid}: {name} has {size} entries"
            for pid in self._sim.pids
            if not self._sim.has_ended(pid)
            for name, size in _sizes(self._sim.node(pid).node)
            if size > self._before.get(pid, {}).get(name, 0)
        ]
        found += [
            f"process {pid}: {line}"
            for pid in self._sim.pids
            if not self._sim.has_ended(pid)
            for line in _turns(self._sim.node(pid).node)
        ]
        found += [
            f"{thread.name} holds a lock"
            for thread in self._sim.baton.threads
            if thread.locks and not thread.owner.is_dead
        ]
        if found:
            raise Wrong("it leaves behind:\n" + "\n".join(found))


def _sizes(node: Node) -> Iterator[tuple[str, int]]:
    """Yield the size of each container that a process's services, and its node, hold."""
    yield "Node.pending", len(node.pending)
    interrupts = node.progress.interrupts
    yield "Interrupts.noted", sum(thread == interrupts.main for thread in interrupts.noted)
    yield "WaitLoop.dirty", len(node.progress.dirty)
    for pid, peer in list(node.peers.items()):
        for box in ("outbox", "released", "taken"):
            yield f"Peer.{box} of {pid}", len(getattr(peer, box))
    for kind, service in node.services.items():
        for name, value in list(_attributes(service)):
            full = f"{kind.__name__}.{name}"
            if full == "Trees.jobs":  # the last one of each root stays
                yield full, sum(not job.ended for job in value.values())
            elif full == "References.owned":
                yield from _owned(value)
            elif full not in _KEPT and isinstance(value, Sized):
                yield full, len(value)


def _owned(table: dict[Any, Any]) -> Iterator[tuple[str, int]]:
    for key, entry in table.items():
        kind = type(entry.value).__name__
        yield f"{kind} {key}, held by {entry.counts}", 1


def _attributes(service: object) -> Iterator[tuple[str, Any]]:
    for name, value in vars(service).items():
        if isinstance(value, _CONTAINERS) or name == "handles":
            yield name, value


def _turns(node: Node) -> Iterator[str]:
    """Yield what is wrong with the turns of a process where nothing runs."""
    turns = node.turns
    for name, usual in (("_running", 0), ("_suspended", 0)):
        value = getattr(turns, name)
        if value != usual:
            yield f"Turns.{name} is {value}"
    for name in ("calls", "_queue", "_waiting_to_resume"):
        if getattr(turns, name):
            yield f"Turns.{name} is not empty"
