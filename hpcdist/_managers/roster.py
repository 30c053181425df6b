"""Pid 1's book of workers: who registered, who is leaving, who died and why."""

from __future__ import annotations

import enum
import pickle
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hpcdist import _log
from hpcdist._errors import ProcessExitedException
from hpcdist._managers.arrivals import reap
from hpcdist._managers.base import ClusterManager, WorkerConfig
from hpcdist._monitor import output
from hpcdist._parallel.everywhere import replay
from hpcdist._runtime.controls import DIED, INTERRUPT, JOINED, LEAVE, LEFT, PARK, TRUST, WELCOME
from hpcdist._runtime.members import Member
from hpcdist._runtime.node import node
from hpcdist._transport.contracts import Slot
from hpcdist._transport.link import Link
from hpcdist._transport.router import Peer
from hpcdist._wire.frames import CONTROL, pack

if TYPE_CHECKING:
    from hpcdist._managers.world import World

_ONE_CAUSE = 10.0  # a worker and its job that end within so many seconds end for one reason
_FAREWELL = 5.0  # how long the end of a worker waits for its manager to take note
_INTERRUPT_AFTER, _TERM_AFTER, _KILL_AFTER = 5.0, 9.0, 12.0


class State(enum.Enum):
    """Where a worker is in its life. It only ever moves forward."""

    REGISTERED = "registered"
    LEAVING = "leaving"
    GONE = "gone"


class Record:
    """What pid 1 knows of one worker."""

    def __init__(
        self,
        pid: int,
        member: Member,
        manager: ClusterManager,
        config: WorkerConfig,
        world: World | None,
    ) -> None:
        self.pid = pid
        self.member = member
        self.manager = manager
        self.config = config
        self.world = world
        self.state = State.REGISTERED
        self.since = time.time()
        self.ended_at = 0.0
        self.why: str | None = None  # the keeper's or the scheduler's word on how it ended
        self.on_network = world is not None and world.on_network
        self.trusts = self.on_network  # whether it knows the certificate of links between hosts
        self.dying = False
        self.ended: list[Slot] = []

    @property
    def parks(self) -> bool:
        """Whether the worker has to stay, unseen, until its whole world ends."""
        return self.world is None or not self.world.ranks_may_leave


lock = threading.RLock()  # guards the book
book: dict[int, Record] = {}
_next = 2


def reserve(count: int) -> int:
    """Set pids aside; return the first. They are never given twice."""
    global _next
    with lock:
        first = _next
        _next += count
    return first


def register(
    pid: int,
    member: Member,
    manager: ClusterManager,
    config: WorkerConfig,
    world: World | None,
    link: Link | None,
    welcome: dict[str, Any],
) -> Record:
    """Take a worker in: tell it who it is, and the others that it is there."""
    with lock:
        record = book[pid] = Record(pid, member, manager, config, world)
        others = list(node.members.living.items())
        peer = node.peers.get(pid)
        if peer is None:
            peer = Peer(pid, node.progress)
        if link is not None:
            peer.link = link
            link.peer = peer
            told = {**welcome, "me": pid, "members": [*others, (pid, member)]}
            peer.control(WELCOME, 0, pickle.dumps(told, 5))
        node.peers[pid] = peer
        node.members.add(pid, member)
        node.settle()
        replay(pid)
        if any(book[p].on_network for p in (pid, *node.members.living)):
            _spread_trust()
        tell_all(JOINED, [(pid, member)], [p for p, _ in others])
        node.progress.nudge()
        if link is not None:
            link.begin()
    for fn in node.on_join:
        fn(pid)
    return record


def _spread_trust() -> None:
    """Let all workers know workers of other hosts when they meet them."""
    from hpcdist._transport import tls

    for record in book.values():
        if record.state is State.REGISTERED and not record.trusts:
            record.trusts = True
            node.peers[record.pid].control(TRUST, 0, tls.certificate().encode())


def reserve_up_to(count: int) -> None:
    """Never give pids up to `count` to anyone: the ranks of an MPI launch have them."""
    global _next
    with lock:
        _next = max(_next, count + 1)


def note(pid: int, member: Member, manager: ClusterManager, config: WorkerConfig) -> None:
    """Take in a rank of an MPI launch, which knows everything already."""
    with lock:
        book[pid] = Record(pid, member, manager, config, None)
        node.members.add(pid, member)
    for fn in node.on_join:
        fn(pid)


def tell_all(op: int, what: Any, pids: Iterable[int]) -> None:
    """Send a control to some workers."""
    body = pickle.dumps(what, 5)
    for pid in pids:
        peer = node.peers.get(pid)
        if peer is not None and peer.alive:
            peer.control(op, 0, body)


def tell_manager(record: Record, op: str) -> None:
    """Let a manager take note. Never on the driver's thread: it is the user's code."""
    try:
        record.manager.manage(record.pid, record.config, op)
    except Exception as exc:  # the user's code; a worker's fate does not hang on it
        _log.log("warning", f"{type(record.manager).__name__}.manage({op!r}) failed: {exc!r}")


def _tell_interrupt(pid: int) -> None:
    record = book.get(pid)
    if record is not None and record.state is State.REGISTERED:
        tell_manager(record, "interrupt")


node.on_interrupt.append(_tell_interrupt)


# Ends


def lost_link(link: Link) -> None:
    """A worker's link ended: it is dead, or as good as dead."""
    if link.peer is not None:
        fade(link.peer.pid)


def fade(pid: int, why: str | None = None) -> None:
    """A worker is dying.

    Two witnesses tell: its keeper, who knows the reason, and the end of its link, before which
    its last words came. Wait a moment for the second of them.
    """
    record = book.get(pid)
    if record is None or record.state is State.GONE:
        return
    if why is not None and record.why is None:
        record.why = why
    peer = node.peers.get(pid)
    silent = peer is None or peer.link is None or not peer.link.open
    expected = record.state is State.LEAVING and record.world is not None and record.world.is_job
    explained = expected or record.why is not None or not _has_keeper(record)
    if silent and explained:
        bury(record)
    elif not record.dying:
        record.dying = True
        patience = 0.0 if record.world is None else record.world.patience
        node.progress.call_later(patience, lambda: bury(record))


def _has_keeper(record: Record) -> bool:
    return record.world is not None and record.world.has_keeper


def bury(record: Record) -> None:
    """A worker is dead: end everything that waits for it, here and everywhere."""
    with lock:
        if record.state is State.GONE:
            return
        leaving = record.state is State.LEAVING
        record.ended_at = time.time()
        record.state = State.GONE
    if leaving:
        record.why = "removed"
    why = record.why or "its connection ended"
    tail = list(output.tails.pop(record.pid, ()))
    death = ProcessExitedException(record.pid, why, record.member.host, () if leaving else tail)
    node.died(record.pid, death, parked=leaving and record.parks)
    news = (record.pid, why, record.member.host, list(death.stderr))
    tell_all(DIED, news, node.members.living)
    node.progress.soon()
    if record.world is not None:
        record.world.lost(record.pid)
    if record.config.process is None and type(record.manager).manage is ClusterManager.manage:
        _tell_ended(record)
    else:  # who waits for the end finds the manager told; a manager that hangs holds nobody up
        node.turns.background(lambda: _say_farewell(record))
        node.progress.call_later(_FAREWELL, lambda: _tell_ended(record))


def removed(pid: int) -> bool:
    """Tell whether a worker has left because it was asked to."""
    return book[pid].why == "removed"


def explain(pid: int, why: str, since: float) -> None:
    """The job of a worker has ended, for a reason that the scheduler gives.

    It may come late: then those who know of the death by something less are told once more.

    Args:
        since: When the end of the job was noticed; who died long before died of something else.
    """
    record = book.get(pid)
    if record is None or record.why == "removed":
        return
    if record.state is not State.GONE:
        fade(pid, why)
    elif record.ended_at > since - _ONE_CAUSE:
        _amend(record, why if record.why is None else f"{record.why}; {why}")


def _amend(record: Record, why: str) -> None:
    record.why = why
    death = node.members.gone.get(record.pid)
    if death is not None:
        death.amend(why)
        news = (record.pid, why, record.member.host, list(death.stderr))
        tell_all(DIED, news, node.members.living)
        node.progress.soon()


def _say_farewell(record: Record) -> None:
    tell_manager(record, "deregister")
    reap(record.config)
    tell_manager(record, "finalize")
    _tell_ended(record)


def _tell_ended(record: Record) -> None:
    for slot in record.ended:
        node.complete(slot)


def dismiss(record: Record) -> None:
    """Ask a worker to leave; it is made to if it does not."""
    with lock:
        if record.state is not State.REGISTERED:
            return
        record.state = State.LEAVING
        node.members.living.pop(record.pid, None)
    tell_all(LEFT, record.pid, node.members.living)
    if record.parks:
        # A launcher that ends with any of its ranks: the rank sleeps and leaves with the world.
        tell_all(PARK, None, [record.pid])
        interrupt_now(record)
        bury(record)
        return
    peer = node.peers.get(record.pid)
    if peer is not None and peer.alive:
        peer.control(LEAVE)
        node.progress.nudge()
    later = node.progress.call_later
    later(_INTERRUPT_AFTER, lambda: _interrupt(record))
    later(_TERM_AFTER, lambda: _force(record, 15))
    later(_KILL_AFTER, lambda: _force(record, 9))


def _interrupt(record: Record) -> None:
    peer = node.peers.get(record.pid)
    if record.state is State.LEAVING and peer is not None and peer.alive:
        peer.control(INTERRUPT)


def _force(record: Record, signal: int) -> None:
    if record.state is not State.LEAVING:
        return
    world = record.world
    if world is not None and world.signal(record.pid, signal):
        return
    node.turns.background(lambda: _kill(record))


def _kill(record: Record) -> None:
    try:
        record.manager.kill(record.pid, record.config)
    except Exception as exc:  # the user's code
        _log.log("warning", f"{type(record.manager).__name__}.kill failed: {exc!r}")


def release(pids: Iterable[int]) -> None:
    """Let the ranks of a world leave, also the parked ones: it ends as a whole."""
    message, _ = pack(CONTROL, 0, 0, LEAVE)
    for pid in pids:
        peer = node.peers.get(pid)
        if peer is not None and peer.link is not None and peer.link.open:
            node.progress.call_later(0, lambda link=peer.link: link.send([message]))  # type: ignore[misc]


def force(record: Record) -> None:
    """Kill a worker now."""
    _force(record, 9)


def interrupt(record: Record) -> None:
    """Interrupt a worker that is leaving and still busy."""
    _interrupt(record)


def interrupt_now(record: Record) -> None:
    """Interrupt a worker that is busy."""
    peer = node.peers.get(record.pid)
    if peer is not None and peer.alive:
        peer.control(INTERRUPT)
        node.progress.nudge()


def slot_of_end(record: Record) -> Slot | None:
    """Return a slot that is ready when the worker is gone; None if it is already."""
    slot = Slot()
    record.ended.append(slot)
    if record.state is State.GONE:
        return None
    return slot
