"""Pid 1's side of `spmd`: who may enter, when all are there, and what happens when one fails.

Nothing here blocks: the queue is worked on as messages arrive, on the progress side.
"""

from __future__ import annotations

import enum
import itertools
import os
import pickle
import socket
import sys
from concurrent.futures import CancelledError
from typing import Any

from hpcdist import _log
from hpcdist._cluster.moving import Moving
from hpcdist._cluster.placement import KeptComms, Pids, Placement
from hpcdist._cluster.replacements import named
from hpcdist._cluster.roster import Roster
from hpcdist._collective.section_members import SectionMembers, send_now
from hpcdist._monitor import output
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._transport.progress import TICK
from hpcdist._wire import messages
from hpcdist._wire.frames import FAILED, OK
from hpcdist._wire.messages import (
    AskVerdict,
    Entered,
    SectionDie,
    SectionEnter,
    SectionFree,
    SectionGo,
    SectionHere,
    SectionOver,
    SectionStuck,
    SectionWithdraw,
    Verdict,
)

_SILENCE = 5.0  # how long a member may take to answer before it counts as stuck
_VERDICTS_MOST = 1000
_BURIAL = 2.0  # how long a death that the launcher has not told of may hold up a section


class Share(enum.Enum):
    """Where a member of a section is. It only ever moves on."""

    COMING = "coming"
    HERE = "at the gate"
    INSIDE = "inside"
    OVER = "over"


_SHARES = {
    Share.COMING: (Share.HERE, Share.OVER),
    Share.HERE: (Share.INSIDE, Share.OVER),
    Share.INSIDE: (Share.OVER,),
    Share.OVER: (),
}


class Stage(enum.Enum):
    """Where a section is. It only ever moves on."""

    GATHERING = "gathering"  # in the queue, or at the gate
    STARTED = "started"
    SENT_HOME = "sent home"  # somebody failed before it had started
    BROKEN = "broken"  # somebody failed inside


_STAGES = {
    Stage.GATHERING: (Stage.STARTED, Stage.SENT_HOME),
    Stage.STARTED: (Stage.BROKEN,),
    Stage.SENT_HOME: (),
    Stage.BROKEN: (),
}


class Section:
    """A set of workers that wants to enter, or has."""

    def __init__(self, number: int, asked: SectionEnter, mail: Mail) -> None:
        self.number = number
        self.asked = asked
        self.mail = mail  # the request, until it is answered
        self.caller = mail.peer.pid
        self.grace = asked.grace
        self.pids: Pids = ()  # as long as they are to be chosen: none
        self.shares: dict[int, Moving[Share]] = {}
        if not asked.ranks:
            self.consist_of(tuple(asked.pids))
        self.comms: set[int] = set()  # the communicators that members have kept
        self.stage = Moving(_STAGES, Stage.GATHERING)
        self.culprit = 0  # the member that failed first
        self.reason = ""  # how it failed
        self.killed: set[int] = set()
        self.answered: set[int] = set()  # members that have heard that they are to leave

    def consist_of(self, pids: Pids) -> None:
        """Have its members from now on."""
        self.pids = pids
        self.shares = {pid: Moving(_SHARES, Share.COMING) for pid in pids}

    def those(self, share: Share) -> list[int]:
        """List the members that are so far."""
        return [pid for pid, moving in self.shares.items() if moving.now is share]

    @property
    def has_failed(self) -> bool:
        """Whether a member has failed, or its caller has died."""
        return self.stage.now in (Stage.SENT_HOME, Stage.BROKEN)

    def verdict(self) -> Verdict:
        """Name the member that failed first, and those that were killed for it."""
        return Verdict(self.culprit, sorted(self.killed), self.grace)


class Sections(Service):
    """The sections of this cluster, on process 1."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        # Guards all below; re-entrant, as what we send ourselves is answered at once.
        self._lock = node.machine.rlock()
        self._queue: list[Section] = []
        self._active: dict[int, Section] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._numbers = itertools.count(1)
        self._roster = node.service(Roster)
        self._kept = KeptComms()
        self._placement = Placement(node, self._roster, self._kept, self._look_again)
        node.service(SectionMembers)  # process 1 may be a member, too
        node.on_death.append(self._on_death)
        node.on_join.append(self._on_join)

    @on(SectionEnter)
    def _on_enter(self, said: SectionEnter, mail: Mail) -> None:
        error = self._placement.refusal(said) if said.ranks else self._refusal(said.pids)
        if error is not None:
            self._answer(mail, FAILED, pickle.dumps(error, 5))
            return
        with self._lock:
            self._queue.append(Section(next(self._numbers), said, mail))
            self._admit()

    @on(SectionWithdraw)
    def _on_withdraw(self, said: SectionWithdraw, mail: Mail) -> None:
        with self._lock:
            for section in self._queue:
                if section.mail.ident == said.ident and section.caller == mail.peer.pid:
                    self._queue.remove(section)
                    self._answer(section.mail, FAILED, pickle.dumps(CancelledError(), 5))
                    break
            self._admit()  # what was kept free for it is free

    def _answer(self, mail: Mail, flags: int, body: bytes) -> None:
        self.node.reply(mail.peer, mail.ident, flags, body)
        self.node.progress.nudge()

    def _refusal(self, pids: list[int]) -> Exception | None:
        """Say why these cannot have a communicator."""
        worlds: dict[Any, list[int]] = {}
        for pid in pids:
            if pid in self.node.members.gone:
                return self.node.members.death(pid)
            if pid != 1 and not self._roster.is_registered(pid):
                return ValueError(f"no process with id {pid} exists")
            world = self._placement.world_of(pid)
            if world is None and list(pids) != [1]:
                why = (
                    "" if pid == 1 else ": its isolation is 'process', or its manager starts no MPI"
                )
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

    def _admit(self) -> None:
        """Let sections enter that share no worker with one inside, or with an earlier one.

        So whatever overlaps runs in the order of the requests, on all members alike: no two
        sections ever wait for each other.
        """
        taken = {pid for section in self._active.values() for pid in section.pids}
        workers = self.node.members.living.keys()
        is_full = bool(workers) and workers <= taken
        busy: set[int] | None = None
        for section in list(self._queue):
            asked = section.asked
            if is_full and asked.ranks and not asked.pids:
                continue  # quickly: hundreds may wait
            enters, pids = taken.isdisjoint(section.pids), section.pids
            if asked.ranks:
                busy = self._placement.busy() if busy is None else busy
                pids, enters = self._placement.choose(asked, taken, busy)
                if enters:
                    section.consist_of(pids)
                elif not pids and self._is_hopeless(section):
                    continue
            if enters:
                self._queue.remove(section)
                self._active[section.number] = section
                self._placement.entered(pids, is_last=not self._queue)
                said = Entered(section.number, list(pids))
                self._answer(section.mail, OK, messages.encode(said))
            taken.update(pids)
            is_full = bool(workers) and workers <= taken

    def _is_hopeless(self, section: Section) -> bool:
        """Fail a section if no world has so many workers any more, and none come in their place."""
        error = self._placement.refusal(section.asked)
        if error is None:
            return False
        self._queue.remove(section)
        self._answer(section.mail, FAILED, pickle.dumps(error, 5))
        return True

    @on(SectionHere)
    def _on_here(self, said: SectionHere, mail: Mail) -> None:
        pid = mail.peer.pid
        with self._lock:
            section = self._active.get(said.number)
            if section is None or section.has_failed:
                ended = (
                    section.verdict() if section is not None else self._verdicts.get(said.number)
                )
                culprit = ended.culprit if ended is not None else 1
                send_now(self.node, pid, SectionGo(said.number, culprit=culprit or 1))
                return
            if not section.shares[pid].to(Share.HERE):
                return
            section.comms.add(said.comm)
            if len(section.those(Share.HERE)) == len(section.pids):
                self._start(section)

    def _verdict_of(self, number: int) -> Verdict | None:
        """Return how a section has failed, if it has and that is still known."""
        section = self._active.get(number)
        return section.verdict() if section is not None else self._verdicts.get(number)

    def _start(self, section: Section, patience: float = _BURIAL) -> None:
        """Open the gate. A communicator is kept only if every member still has the same one."""
        if section.has_failed:
            return
        (comm, *others) = section.comms
        fresh = bool(others) or not comm
        lost = self._lost_beside(section.pids[0]) if fresh and patience > 0 else []
        if not all(map(self._is_buried, lost)):
            self.node.progress.call_later(
                TICK, lambda: self._start_under_lock(section, patience - TICK)
            )
            return
        if fresh:
            comm = next(self._numbers)
        section.stage.to(Stage.STARTED)
        for share in section.shares.values():
            share.to(Share.INSIDE)
        self._kept.note(section.pids, comm, is_named=not section.asked.ranks)
        self._kept.limit([other.pids for other in self._active.values()])
        for pid in section.pids:
            unkept = self._kept.unkept(pid)
            go = SectionGo(section.number, comm, fresh, unkept=unkept)
            send_now(self.node, pid, go)

    def _start_under_lock(self, section: Section, patience: float) -> None:
        with self._lock:
            self._start(section, patience)

    def _lost_beside(self, pid: int) -> list[int]:
        """Return the workers that the world of this one has lost."""
        world = self._roster.book[pid].member.world if pid in self._roster.book else 0
        return [
            p
            for p in self.node.members.gone
            if p in self._roster.book and self._roster.book[p].member.world == world
        ]

    def _is_buried(self, pid: int) -> bool:
        """Tell whether the launcher knows of a death: Open MPI makes communicators through it."""
        world = self._roster.book[pid].world
        return world is None or world.knows_end(pid)

    @on(SectionOver)
    def _on_over(self, said: SectionOver, mail: Mail) -> None:
        with self._lock:
            section = self._active.get(said.number)
            if section is not None:
                self._end_of(section, said.pid, said.failed)

    def _end_of(self, section: Section, pid: int, failed: str) -> None:
        if not section.shares[pid].to(Share.OVER):
            return
        if failed and pid not in section.killed:
            self._break(section, pid, failed)
        if len(section.those(Share.OVER)) == len(section.pids):
            del self._active[section.number]
            if section.has_failed:
                self._verdicts[section.number] = section.verdict()
                if len(self._verdicts) > _VERDICTS_MOST:
                    del self._verdicts[next(iter(self._verdicts))]
                self._print_cost(section)
            self._admit()

    def _print_cost(self, section: Section) -> None:
        """Say on stderr which workers a failure has cost, and how to get a full world again."""
        killed = sorted(section.killed & self.node.members.gone.keys())
        record = self._roster.book.get(killed[0]) if killed else None
        world = record.world if record is not None else None
        if world is None:
            return
        mates = [pid for pid, record in self._roster.book.items() if record.world is world]
        left = [pid for pid in mates if pid in self.node.members.living]
        if world.is_renewed:
            advice = "it is being replaced as a whole (renew=True)"
        else:
            first = f"rmprocs({left}), then addprocs" if left else "addprocs"
            advice = f"{first} gives a full world again, as renew=True does by itself"
        text = (
            f"hpcdist: spmd: process {section.culprit} failed ({section.reason}). This has cost "
            f"{named(killed)}, still inside MPI {section.grace:g} s later. "
            f"Their world has {len(left)} of {len(mates)} workers left, and the next spmd runs on "
            f"these; {advice}."
        )
        self.node.progress.call_later(0.0, lambda: output.say(text))  # once our lock is free

    def _break(self, section: Section, culprit: int, reason: str) -> None:
        """Fail a section: send those at the gate home, and give those inside some time."""
        started = section.stage.now is Stage.STARTED
        if not section.stage.to(Stage.BROKEN if started else Stage.SENT_HOME):
            return
        section.culprit, section.reason = culprit, reason
        self._kept.forget(section.pids)
        if started:
            self.node.progress.call_later(section.grace, lambda: self._free(section))
            return
        for pid in section.those(Share.HERE):
            send_now(self.node, pid, SectionGo(section.number, culprit=culprit))

    @on(AskVerdict)
    def _on_ask_verdict(self, said: AskVerdict, mail: Mail) -> None:
        with self._lock:
            ended = self._verdict_of(said.number)
        self._answer(mail, OK, messages.encode(ended or Verdict(0, [], 0.0)))

    # Freeing

    def _free(self, section: Section) -> None:
        with self._lock:
            inside = section.those(Share.INSIDE)
            for pid in inside:
                send_now(self.node, pid, SectionFree(section.number))
        if inside:
            self.node.progress.call_later(
                max(_SILENCE, section.grace), lambda: self._kill_silent(section)
            )

    @on(SectionStuck)
    def _on_stuck(self, said: SectionStuck, mail: Mail) -> None:
        pid = mail.peer.pid
        with self._lock:
            section = self._active.get(said.number)
            if section is None:
                return
            section.answered.add(pid)
            if said.stuck and section.shares[pid].now is Share.INSIDE:
                self._kill(section, pid)

    def _kill_silent(self, section: Section) -> None:
        """Kill members that did not even answer: they hold the interpreter in C."""
        with self._lock:
            for pid in section.those(Share.INSIDE):
                if pid not in section.answered:
                    self._kill(section, pid)

    def _kill(self, section: Section, pid: int) -> None:
        if pid in section.killed:
            return
        section.killed.add(pid)
        text = (
            f"spmd: process {pid} is still inside MPI {section.grace:g} s after process "
            f"{section.culprit} failed ({section.reason}), and is killed"
        )
        _log.log("info", text)
        record = self._roster.book.get(pid)
        if record is not None and record.world is not None and record.world.signal(pid, 9):
            return
        # No keeper: a launch by mpirun, which may well end as a whole, this process included.
        print(f"hpcdist: {text}", file=sys.stderr, flush=True)
        if pid == 1:
            self.node.machine.die()
        elif record is not None and record.member.host == socket.gethostname():
            try:
                os.kill(record.member.os_pid, 9)
            except OSError:  # it has just ended by itself
                pass
        else:
            send_now(self.node, pid, SectionDie(section.number))

    def _on_join(self, pid: int) -> None:
        with self._lock:
            self._placement.joined(pid)
            self._admit()

    def _look_again(self) -> None:
        """See who may enter: workers have joined, or become idle."""
        with self._lock:
            self._admit()

    def _on_death(self, dead: int) -> None:
        with self._lock:
            self._kept.lost(dead)
            self._placement.lost(dead)
            for section in [s for s in self._queue if dead in s.pids or s.caller == dead]:
                self._queue.remove(section)
                if section.caller != dead:
                    death = self.node.members.death(dead)
                    self._answer(section.mail, FAILED, pickle.dumps(death, 5))
            for section in list(self._active.values()):
                if dead in section.shares:
                    self._end_of(section, dead, "it died")
                if section.caller == dead and section.number in self._active:
                    self._abandon(section)
            self._admit()

    def _abandon(self, section: Section) -> None:
        """Give up a section whose caller is dead: members it has not called will not come."""
        if section.stage.now in (Stage.STARTED, Stage.BROKEN):
            return
        self._break(section, section.caller, "the caller died")
        for pid in section.those(Share.COMING):
            if section.number in self._active:
                self._end_of(section, pid, "")
