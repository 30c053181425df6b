"""Pid 1's book of workers: who registered, who is leaving, who died and why."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from hpcdist import _log
from hpcdist._cluster.gathering import Gathering
from hpcdist._cluster.moving import Moving
from hpcdist._cluster.pending_workers import reap
from hpcdist._collective.everywhere import CodeForAll
from hpcdist._contract.managers import ClusterManager, WorkerConfig
from hpcdist._errors import ProcessExitedException
from hpcdist._monitor.output import WorkersOutput
from hpcdist._monitor.status import is_stopped
from hpcdist._runtime.node import Node, Service
from hpcdist._transport.contracts import Slot, Way
from hpcdist._transport.machine import Machine
from hpcdist._transport.router import Peer
from hpcdist._wire import messages
from hpcdist._wire.member import JobEnd, Member
from hpcdist._wire.messages import (
    DeathNotice,
    Died,
    Interrupt,
    JobEnds,
    Joined,
    Leave,
    Left,
    Park,
    Trust,
    Welcome,
)

_ONE_CAUSE = 10.0  # a worker and its job that end within so many seconds end for one reason
_FAREWELL = 5.0  # how long the end of a worker waits for its manager to take note
_INTERRUPT_AFTER, _TERM_AFTER, _KILL_AFTER = 5.0, 9.0, 12.0


class State(enum.Enum):
    """Where a worker is in its life. It only ever moves forward."""

    ARRIVED = "arrived"  # it has its pid; nobody else knows of it yet
    REGISTERED = "registered"
    LEAVING = "leaving"
    GONE = "gone"


_NEXT: dict[State, tuple[State, ...]] = {
    State.ARRIVED: (State.REGISTERED,),
    State.REGISTERED: (State.LEAVING, State.GONE),
    State.LEAVING: (State.GONE,),
    State.GONE: (),
}


class Home(Protocol):
    """The world of a worker, as far as its life and death go."""

    number: int
    mpi: bool
    has_keeper: bool
    ranks_may_leave: bool

    @property
    def is_job(self) -> bool: ...
    @property
    def on_network(self) -> bool: ...
    @property
    def is_renewed(self) -> bool: ...
    @property
    def patience(self) -> float: ...
    @property
    def end(self) -> JobEnd | None: ...
    def joined(self, pids: Sequence[int]) -> None: ...
    def lost(self, pid: int) -> None: ...
    def signal(self, pid: int, number: int) -> bool: ...
    def knows_end(self, pid: int) -> bool: ...


class Record:
    """What pid 1 knows of one worker."""

    def __init__(
        self,
        pid: int,
        member: Member,
        manager: ClusterManager,
        config: WorkerConfig,
        world: Home | None,
        since: float,
    ) -> None:
        self.pid = pid
        self.member = member
        self.manager = manager
        self.config = config
        self.world = world
        self._life = Moving(_NEXT, State.ARRIVED)
        self.since = since
        self.ended_at = 0.0
        self.why: str | None = None  # the keeper's or the scheduler's word on how it ended
        self.peak_rss: int | None = None  # bytes: the keeper's word
        self.on_network = world is not None and world.on_network
        self.trusts = self.on_network  # whether it knows the certificate of links between hosts
        self.dying = False
        self.ended: list[Slot] = []
        self.parting = "removed"  # why it leaves, once it is asked to

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._life.now

    @property
    def parks(self) -> bool:
        """Whether the worker has to stay, unseen, until its whole world ends."""
        return self.world is None or not self.world.ranks_may_leave

    @property
    def has_keeper(self) -> bool:
        """Whether a keeper is to say how the worker ended."""
        return self.world is not None and self.world.has_keeper

    def move_to(self, state: State) -> bool:
        """Go on to a state; tell whether that is forward: nothing else is done."""
        return self._life.to(state)


class Pids:
    """Gives pids out, each once."""

    def __init__(self, machine: Machine) -> None:
        self._lock = machine.lock()
        self._next = 2

    def reserve(self, count: int) -> int:
        """Set pids aside; return the first."""
        with self._lock:
            first = self._next
            self._next += count
        return first

    def reserve_up_to(self, count: int) -> None:
        """Keep pids up to `count` for the ranks of an MPI launch, and give them to nobody else."""
        with self._lock:
            self._next = max(self._next, count + 1)


class Roster(Service):
    """Process 1's book of workers: who registered, who is leaving, who died and why."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.lock = node.machine.rlock()  # guards the book
        self.book: dict[int, Record] = {}
        pids = Pids(node.machine)
        self.reserve, self.reserve_up_to = pids.reserve, pids.reserve_up_to
        self.world_numbers = itertools.count(1)
        # Workers come and go in crowds: what all others are told of it is gathered.
        self._arrived: list[Record] = []
        self._dead: list[Record] = []
        self._arrivals = Gathering(node, self._take_in, self._crowd, beside=True)
        self._burials = Gathering(node, self._bury_all, self._crowd)
        self._output = node.service(WorkersOutput)
        self._code = node.service(CodeForAll)
        node.on_interrupt.append(self._on_interrupt)

    def register(
        self,
        pid: int,
        member: Member,
        manager: ClusterManager,
        config: WorkerConfig,
        world: Home,
        link: Way | None,
        welcome: Welcome,
    ) -> None:
        """Take note of a worker that has greeted, and send it its pid.

        It counts, and all others are told of it, with the next `admit`.
        """
        since = self.node.machine.time()
        with self.lock:
            record = self.book[pid] = Record(pid, member, manager, config, world, since)
            peer = self.node.peers.get(pid)
            if peer is None:
                peer = Peer(pid, self.node.progress)
            if link is not None:
                peer.link = link
                link.peer = peer
                peer.send(welcome)
            self.node.peers[pid] = peer
            self._arrived.append(record)
            self.node.progress.nudge()
            if link is not None:
                link.begin()

    def admit(self, *, at_once: bool) -> None:
        """Count those in that have arrived; gather them, unless it is to be done at once."""
        if at_once:
            self._arrivals.now()
        else:
            self._arrivals.soon()

    def _take_in(self) -> None:
        """Count in all that have arrived, and let all workers know of each other."""
        with self.lock:
            come, self._arrived = self._arrived, []
            come = [record for record in come if record.move_to(State.REGISTERED)]
            if not come:
                return
            self._announce(come)
        for record in come:
            for fn in self.node.on_join:
                fn(record.pid)
        worlds: dict[int, list[Record]] = {}
        for record in come:
            if type(record.manager).manage is ClusterManager.manage:
                worlds.setdefault(record.member.world, []).append(record)
            else:  # the user's code: if it hangs, it holds its own worker up alone
                self.node.turns.background(lambda record=record: self._introduce(record))  # type: ignore[misc]
        for records in worlds.values():
            assert records[0].world is not None
            records[0].world.joined([record.pid for record in records])

    def _announce(self, come: Sequence[Record]) -> None:
        """Tell the others of those that come, and these of all: as one message for each."""
        members = self.node.members
        new = [(record.pid, record.member) for record in come]
        pids = dict(new)
        others = [pid for pid in self._hearers(0) if pid not in pids]
        for pid, member in new:
            members.add(pid, member)
        ends: dict[int, JobEnd | None] = {
            r.pid: r.world.end for r in come if r.world is not None and r.world.end is not None
        }
        members.note_ends(ends)
        self.node.tune()
        self.send_all(Joined(new), others)
        if ends:
            self.send_all(JobEnds(ends), others)
        self.send_all(Joined(list(members.living.items())), pids)
        if members.ends:
            self.send_all(JobEnds(dict(members.ends)), pids)
        if any(self.book[p].on_network for p in (*pids, *members.living)):
            self._spread_trust()
        for pid in pids:
            self._code.replay(pid)
        self.node.progress.nudge()

    def _introduce(self, record: Record) -> None:
        self.call_manager(record, "register")
        assert record.world is not None
        record.world.joined([record.pid])

    def _crowd(self) -> int:
        return len(self.node.members.living)

    def set_end(self, pids: Iterable[int], end: JobEnd | None) -> None:
        """Note, and let all know, when the job of workers ends."""
        ends = {pid: end for pid in pids if self.is_registered(pid)}
        if ends:
            self.node.members.note_ends(ends)
            self.send_all(JobEnds(ends), self._hearers(0))
            self.node.progress.soon()

    def _spread_trust(self) -> None:
        """Send all workers the certificate by which workers of several hosts trust each other."""
        from hpcdist._transport import tls

        for record in self.book.values():
            if record.state is State.REGISTERED and not record.trusts:
                record.trusts = True
                self.node.peers[record.pid].send(Trust(tls.certificate()))

    def note(
        self, pid: int, member: Member, manager: ClusterManager, config: WorkerConfig
    ) -> Record:
        """Take in a rank of an MPI launch, which knows everything already."""
        since = self.node.machine.time()
        with self.lock:
            record = self.book[pid] = Record(pid, member, manager, config, None, since)
            record.move_to(State.REGISTERED)
            self.node.members.add(pid, member)
        for fn in self.node.on_join:
            fn(pid)
        return record

    def send_all(self, message: NamedTuple, pids: Iterable[int]) -> None:
        """Send a control to some workers."""
        data, buffers = messages.packed(message)
        for pid in pids:
            peer = self.node.peers.get(pid)
            if peer is not None and peer.alive:
                peer.post(data, buffers)

    def _hearers(self, pid: int) -> list[int]:
        """List the workers that are to hear of this one: all others, retired ones too."""
        with self.lock:
            return [p for p, r in self.book.items() if r.state is State.REGISTERED and p != pid]

    def call_manager(self, record: Record, op: str) -> None:
        """Let a manager take note. Never on the driver's thread: it is the user's code."""
        try:
            record.manager.manage(record.pid, record.config, op)
        except Exception as exc:  # the user's code; a worker's fate does not hang on it
            _log.log("warning", f"{type(record.manager).__name__}.manage({op!r}) failed: {exc!r}")

    def _on_interrupt(self, pid: int) -> None:
        record = self.book.get(pid)
        if record is not None and record.state is State.REGISTERED:
            self.call_manager(record, "interrupt")

    def forget(self, pids: Iterable[int]) -> None:
        """Drop the records of workers whose world has ended; why each did stays known elsewhere."""
        with self.lock:
            for pid in pids:
                if pid in self.book and self.book[pid].state is State.GONE:
                    del self.book[pid]

    # Ends

    def lost_link(self, link: Way) -> None:
        """Note that a worker's link ended: it is dead, or as good as dead."""
        if link.peer is not None:
            self.fade(link.peer.pid)

    def fade(self, pid: int, why: str | None = None) -> None:
        """Note that a worker is dying.

        Two witnesses tell: its keeper, who knows the reason, and the end of its link, before which
        its last words came. Wait a moment for the second of them.
        """
        record = self.book.get(pid)
        if record is None or record.state is State.GONE:
            return
        if why is not None and record.why is None:
            record.why = why
        peer = self.node.peers.get(pid)
        silent = peer is None or peer.link is None or not peer.link.open
        expected = (
            record.state is State.LEAVING and record.world is not None and record.world.is_job
        )
        explained = expected or record.why is not None or not record.has_keeper
        if silent and explained:
            self.bury(record)
        elif not record.dying:
            record.dying = True
            patience = 0.0 if record.world is None else record.world.patience
            self.node.progress.call_later(patience, lambda: self.bury(record))

    def bury(self, record: Record) -> None:
        """End everything that waits for a dead worker, here and everywhere."""
        if record.state is State.ARRIVED:  # it comes before it goes
            self._arrivals.now()
        with self.lock:
            if record.state is not State.GONE and record not in self._dead:
                self._dead.append(record)
        self._burials.soon()

    def _bury_all(self) -> None:
        with self.lock:
            dead, self._dead = self._dead, []
            leaving = {record.pid for record in dead if record.state is State.LEAVING}
            dead = [record for record in dead if record.move_to(State.GONE)]
        deaths = [self._bury(record, leaving=record.pid in leaving) for record in dead]
        if not deaths:
            return
        self.send_all(Died(deaths), self._hearers(0))
        self.node.progress.soon()
        for record in dead:
            self._part_with(record)

    def _bury(self, record: Record, *, leaving: bool) -> DeathNotice:
        """End what waits for a dead worker here; return what others are to be told."""
        record.ended_at = self.node.machine.time()
        if leaving:
            record.why = record.parting
        why = record.why or "its connection ended"
        own, older = self._output.last_words(record.pid)
        if leaving:
            own, older = [], []
        host = record.member.host
        death = ProcessExitedException(record.pid, why, host, own, older, record.peak_rss)
        self.node.died(record.pid, death, parked=leaving and record.parks)
        return DeathNotice(*death.facts)

    def _part_with(self, record: Record) -> None:
        if record.world is not None:
            record.world.lost(record.pid)
        if record.config.process is None and type(record.manager).manage is ClusterManager.manage:
            self._wake_waiters(record)
        else:  # the manager first, then the waiters, which a manager that hangs delays little
            self.node.turns.background(lambda: self._say_farewell(record))
            self.node.progress.call_later(_FAREWELL, lambda: self._wake_waiters(record))

    def is_registered(self, pid: int) -> bool:
        """Tell whether a worker lives and was not asked to leave."""
        record = self.book.get(pid)
        return record is not None and record.state is State.REGISTERED

    def has_left(self, pid: int) -> bool:
        """Tell whether a worker that is gone has left in good order, whyever it was asked to."""
        record = self.book.get(pid)
        return record is not None and record.why == record.parting

    def removed(self, pid: int) -> bool:
        """Tell whether a worker has left because it was asked to."""
        return self.book[pid].why == "removed"

    def hear_end(self, pid: int, why: str) -> None:
        """Take a keeper's word on how a worker has ended, also if it comes after its burial."""
        record = self.book.get(pid)
        if record is not None and record.state is State.GONE and record.why is None:
            self._amend(record, why)
        else:
            self.fade(pid, why)

    def note_peak(self, pid: int, peak_rss: int | None) -> None:
        """Note the most memory that a worker has had."""
        record = self.book.get(pid)
        if record is not None and peak_rss is not None:
            record.peak_rss = peak_rss

    def explain(self, pid: int, why: str, since: float) -> None:
        """Note why a worker's job has ended: the reason that the scheduler gives.

        It may come late: then all that know of the death get the better reason, too.

        Args:
            since: When the end of the job was noticed; earlier deaths have other causes.
        """
        record = self.book.get(pid)
        if record is None or record.why == "removed":
            return
        if record.state is not State.GONE:
            self.fade(pid, why)
        elif record.ended_at > since - _ONE_CAUSE:
            self._amend(record, why if record.why is None else f"{record.why}; {why}")

    def correct(self, pid: int, why: str) -> None:
        """Note the cause of a death, of which less may have been known before."""
        record = self.book.get(pid)
        if record is None or record.why == "removed":
            return
        if record.state is not State.GONE:
            record.why = why
            self.fade(pid)
        elif record.why != why:
            self._amend(record, why)

    def _amend(self, record: Record, why: str) -> None:
        record.why = why
        death = self.node.members.gone.get(record.pid)
        if death is not None:
            death.amend(why)
            self.send_all(Died([DeathNotice(*death.facts)]), self.node.members.living)
            self.node.progress.soon()

    def _say_farewell(self, record: Record) -> None:
        self.call_manager(record, "deregister")
        reap(record.config)
        self.call_manager(record, "finalize")
        self._wake_waiters(record)

    def _wake_waiters(self, record: Record) -> None:
        for slot in record.ended:
            self.node.complete(slot)

    def retire(self, records: Iterable[Record]) -> None:
        """Count workers out, which go on with what they have to do."""
        with self.lock:
            retired = [record.pid for record in records if record.state is State.REGISTERED]
            for pid in retired:
                self.node.members.living.pop(pid, None)
        if retired:
            self.send_all(Left(retired), self._hearers(0))
            self.node.progress.soon()

    def dismiss(self, records: Iterable[Record]) -> None:
        """Ask workers to leave; they are made to if they do not."""
        records = list(records)
        if any(record.state is State.ARRIVED for record in records):
            self._arrivals.now()  # they come before they go
        with self.lock:
            leaving = [record for record in records if record.move_to(State.LEAVING)]
            for record in leaving:
                self.node.members.living.pop(record.pid, None)
        if leaving:
            self.send_all(Left([r.pid for r in leaving]), self.node.members.living)
        for record in leaving:
            self._dismiss(record)

    def _dismiss(self, record: Record) -> None:
        if record.parks:
            # A launcher that ends with any of its ranks: the rank sleeps and leaves with the world.
            self.send_all(Park(), [record.pid])
            self.interrupt_now(record)
            self.bury(record)
            return
        peer = self.node.peers.get(record.pid)
        if peer is not None and peer.alive:
            peer.send(Leave(others_stay=bool(self.node.members.living)))
            self.node.progress.nudge()
        if is_stopped(self.node, record.member):
            self._force(record, 9)  # it can neither hear of it nor be interrupted
            return
        later = self.node.progress.call_later
        later(_INTERRUPT_AFTER, lambda: self._interrupt(record))
        later(_TERM_AFTER, lambda: self._force(record, 15))
        later(_KILL_AFTER, lambda: self._force(record, 9))

    def _interrupt(self, record: Record) -> None:
        peer = self.node.peers.get(record.pid)
        if is_stopped(self.node, record.member):
            self._force(record, 9)
        elif record.state is State.LEAVING and peer is not None and peer.alive:
            peer.send(Interrupt())

    def _force(self, record: Record, signal: int) -> None:
        if record.state is not State.LEAVING:
            return
        world = record.world
        if world is not None and world.signal(record.pid, signal):
            return
        self.node.turns.background(lambda: self._kill(record))

    def _kill(self, record: Record) -> None:
        try:
            record.manager.kill(record.pid, record.config)
        except Exception as exc:  # the user's code
            _log.log("warning", f"{type(record.manager).__name__}.kill failed: {exc!r}")

    def release(self, pids: Iterable[int]) -> None:
        """Let the ranks of a world leave, also the parked ones: it ends as a whole."""
        message, _ = messages.packed(Leave())
        for pid in pids:
            peer = self.node.peers.get(pid)
            if peer is not None and peer.link is not None and peer.link.open:
                self.node.progress.call_later(0, lambda link=peer.link: link.send([message]))  # type: ignore[misc]

    def force(self, record: Record) -> None:
        """Kill a worker now."""
        self._force(record, 9)

    def interrupt(self, record: Record) -> None:
        """Interrupt a worker that is leaving and still busy."""
        self._interrupt(record)

    def interrupt_now(self, record: Record) -> None:
        """Interrupt a worker that is busy."""
        peer = self.node.peers.get(record.pid)
        if peer is not None and peer.alive:
            peer.send(Interrupt())
            self.node.progress.nudge()

    def slot_of_end(self, record: Record) -> Slot | None:
        """Return a slot that is ready when the worker is gone; None if it is already."""
        slot = Slot()
        record.ended.append(slot)
        if record.state is State.GONE:
            return None
        return slot
