"""Pid 1's side of `spmd`: who may enter, when all are there, and what happens when one fails.

Nothing here blocks: the queue is worked on as messages arrive, on the progress side.
"""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from hpcdist import _log
from hpcdist._managers import roster
from hpcdist._parallel.spmd import tell
from hpcdist._runtime.controls import (
    SECTION_DIE,
    SECTION_ENTER,
    SECTION_FREE,
    SECTION_GO,
    SECTION_HERE,
    SECTION_OVER,
    SECTION_STUCK,
    SECTION_VERDICT,
)
from hpcdist._runtime.node import node
from hpcdist._transport.progress import TICK
from hpcdist._transport.router import Peer
from hpcdist._wire.frames import FAILED, OK, Buffer

_SILENCE = 5.0  # how long a member may take to answer before it counts as stuck
_VERDICTS_MOST = 1000
_BURIAL = 2.0  # how long a death that the launcher has not told of may hold up a section
COMING, HERE, INSIDE, OVER = "coming", "here", "inside", "over"


class Section:
    """A set of workers that wants to enter, or has."""

    def __init__(self, number: int, pids: Sequence[int], grace: float, caller: int) -> None:
        self.number = number
        self.pids = tuple(pids)
        self.grace = grace
        self.caller = caller
        self.states = dict.fromkeys(pids, COMING)
        self.comms: set[int] = set()  # the communicators that members have kept
        self.started = False
        self.culprit = 0
        self.reason = ""  # how it failed
        self.killed: set[int] = set()
        self.answered: set[int] = set()  # members that have heard that they are to leave
        self.admitted: Any = None  # called once it may enter

    def verdict(self) -> tuple[int, list[int], float]:
        """Tell who failed first, and who was killed for it."""
        return self.culprit, sorted(self.killed), self.grace


_lock = threading.RLock()  # guards all below; re-entrant, as what we tell ourselves answers at once
_queue: list[Section] = []
_active: dict[int, Section] = {}
_verdicts: dict[int, tuple[int, list[int], float]] = {}
_numbers = itertools.count(1)


@node.control(SECTION_ENTER)
def _on_enter(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    pids, grace = pickle.loads(body)
    section = Section(next(_numbers), pids, grace, peer.pid)
    error = _refusal(pids)
    if error is not None:
        node.reply(peer, ident, FAILED, pickle.dumps(error, 5))
        node.progress.nudge()
        return
    section.admitted = lambda flags, what: _answer(peer, ident, flags, what)
    with _lock:
        _queue.append(section)
        _admit()


def _answer(peer: Peer, ident: int, flags: int, what: Any) -> None:
    node.reply(peer, ident, flags, pickle.dumps(what, 5))
    node.progress.nudge()


def _refusal(pids: Sequence[int]) -> Exception | None:
    """Say why these cannot have a communicator."""
    worlds: dict[Any, list[int]] = {}
    for pid in pids:
        if pid in node.members.gone:
            return node.members.death(pid)
        if pid != 1 and pid not in node.members.living:
            return ValueError(f"no process with id {pid} exists")
        world = _world_of(pid)
        if world is None and list(pids) != [1]:
            why = "" if pid == 1 else ": its isolation is 'process', or its manager starts no MPI"
            return ValueError(
                f"spmd needs workers of an MPI world, and process {pid} is in none{why}"
            )
        worlds.setdefault(world, []).append(pid)
    if len(worlds) > 1:
        sets = " and ".join(map(str, worlds.values()))
        return ValueError(
            f"spmd needs workers of one MPI world, and these are of different ones: {sets}. "
            "Workers share a world when one addprocs() has started them"
        )
    return None


def _world_of(pid: int) -> Any:
    if pid == 1:
        plane = node.progress.plane
        return 0 if plane is not None else None
    record = roster.book[pid]
    if record.world is None:  # a rank of the launch that started this process too
        return record.member.world
    return record.world.number if record.world.mpi else None


def _admit() -> None:
    """Let enter whoever has no worker in common with one who is inside, or came earlier."""
    taken = {pid for section in _active.values() for pid in section.pids}
    for section in list(_queue):
        if not taken & set(section.pids):
            _queue.remove(section)
            _active[section.number] = section
            section.admitted(OK, section.number)
        taken.update(section.pids)


@node.control(SECTION_HERE)
def _on_here(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    number, comm = pickle.loads(body)
    with _lock:
        section = _active.get(number)
        if section is None or section.culprit:
            culprit = section.culprit if section is not None else _verdicts.get(number, (1,))[0]
            tell(peer.pid, SECTION_GO, (number, 0, False, culprit or 1, False))
            return
        section.states[peer.pid] = HERE
        section.comms.add(comm)
        if all(state == HERE for state in section.states.values()):
            _start(section)


def _start(section: Section, patience: float = _BURIAL) -> None:
    """Open the gate. A communicator is kept only if every member still has the same one."""
    if section.culprit:
        return
    (comm, *others) = section.comms
    fresh = bool(others) or not comm
    lost = _lost_beside(section.pids[0])
    if fresh and patience > 0 and not all(map(_is_buried, lost)):
        node.progress.call_later(TICK, lambda: _start_under_lock(section, patience - TICK))
        return
    if fresh:
        comm = next(_numbers)
    worn = bool(lost)
    section.started = True
    section.states = dict.fromkeys(section.pids, INSIDE)
    for pid in section.pids:
        tell(pid, SECTION_GO, (section.number, comm, fresh, 0, worn))


def _start_under_lock(section: Section, patience: float) -> None:
    with _lock:
        _start(section, patience)


def _lost_beside(pid: int) -> list[int]:
    """Return the workers that the world of this one has lost."""
    world = roster.book[pid].member.world if pid in roster.book else 0
    return [
        p for p in node.members.gone if p in roster.book and roster.book[p].member.world == world
    ]


def _is_buried(pid: int) -> bool:
    """Tell whether the launcher knows of a death, too: Open MPI makes communicators through it."""
    world = roster.book[pid].world
    return world is None or world.knows_end(pid)


@node.control(SECTION_OVER)
def _on_over(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    number, pid, failed = pickle.loads(body)
    with _lock:
        section = _active.get(number)
        if section is not None and section.states[pid] != OVER:
            _end_of(section, pid, failed)


def _end_of(section: Section, pid: int, failed: str) -> None:
    section.states[pid] = OVER
    if failed and pid not in section.killed:
        _break(section, pid, failed)
    if all(state == OVER for state in section.states.values()):
        del _active[section.number]
        if section.culprit:
            _verdicts[section.number] = section.verdict()
            if len(_verdicts) > _VERDICTS_MOST:
                del _verdicts[next(iter(_verdicts))]
        _admit()


def _break(section: Section, culprit: int, reason: str) -> None:
    """A member has failed: who waits at the gate goes home, who is inside gets some time."""
    if section.culprit:
        return
    section.culprit, section.reason = culprit, reason
    if section.started:
        node.progress.call_later(section.grace, lambda: _free(section))
        return
    for pid, state in section.states.items():
        if state == HERE:
            tell(pid, SECTION_GO, (section.number, 0, False, culprit, False))


@node.control(SECTION_VERDICT)
def _on_verdict(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    number = pickle.loads(body)
    with _lock:
        section = _active.get(number)
        verdict = section.verdict() if section is not None else _verdicts.get(number, (0, [], 0.0))
    _answer(peer, ident, OK, verdict)


# Freeing


def _free(section: Section) -> None:
    with _lock:
        inside = [pid for pid, state in section.states.items() if state == INSIDE]
        for pid in inside:
            tell(pid, SECTION_FREE, section.number)
    if inside:
        node.progress.call_later(max(_SILENCE, section.grace), lambda: _kill_silent(section))


@node.control(SECTION_STUCK)
def _on_stuck(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    number, stuck = pickle.loads(body)
    with _lock:
        section = _active.get(number)
        if section is None:
            return
        section.answered.add(peer.pid)
        if stuck and section.states[peer.pid] == INSIDE:
            _kill(section, peer.pid)


def _kill_silent(section: Section) -> None:
    """Kill members that did not even answer: whoever holds the interpreter is in C."""
    with _lock:
        for pid, state in list(section.states.items()):
            if state == INSIDE and pid not in section.answered:
                _kill(section, pid)


def _kill(section: Section, pid: int) -> None:
    if pid in section.killed:
        return
    section.killed.add(pid)
    text = (
        f"spmd: process {pid} is still inside MPI {section.grace:g} s after process "
        f"{section.culprit} failed ({section.reason}), and is killed"
    )
    _log.log("info", text)
    record = roster.book.get(pid)
    if record is not None and record.world is not None and record.world.signal(pid, 9):
        return
    # No keeper: a launch by mpirun, which may well end as a whole, this process included.
    print(f"hpcdist: {text}", file=sys.stderr, flush=True)
    if pid == 1:
        os.kill(os.getpid(), 9)
    elif record is not None and record.member.host == socket.gethostname():
        try:
            os.kill(record.member.os_pid, 9)
        except OSError:  # it has just ended by itself
            pass
    else:
        tell(pid, SECTION_DIE, section.number)


def _on_death(dead: int) -> None:
    with _lock:
        for section in [s for s in _queue if dead in s.pids or s.caller == dead]:
            _queue.remove(section)
            if section.caller != dead:
                section.admitted(FAILED, node.members.death(dead))
        for section in list(_active.values()):
            if dead in section.states and section.states[dead] != OVER:
                _end_of(section, dead, "it died")
            if section.caller == dead and section.number in _active:
                _abandon(section)
        _admit()


def _abandon(section: Section) -> None:
    """The caller is dead: members it has not called will not come."""
    if section.started:
        return
    _break(section, section.caller, "the caller died")
    for pid, state in list(section.states.items()):
        if state == COMING and section.number in _active:
            _end_of(section, pid, "")


node.on_death.append(_on_death)
