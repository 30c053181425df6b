"""This process: who it is, whom it talks to, and what to do with a message that arrives.

There is one node per process, and it exists from the start: alone, a process is pid 1 of a cluster
of one. `here.node` is the node of the process that this thread belongs to: always the same one,
but for simulations, where one interpreter has many processes. What a process keeps and does about
a subject is in its services.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeVar

from hpcdist._errors import ProcessExitedException
from hpcdist._runtime.alone import Alone
from hpcdist._runtime.members import Members
from hpcdist._runtime.turns import Turns
from hpcdist._transport.contracts import Slot, Waitable
from hpcdist._transport.interrupts import Section
from hpcdist._transport.machine import Machine
from hpcdist._transport.progress import Progress
from hpcdist._transport.router import Peer
from hpcdist._transport.wait_loop import WaitLoop
from hpcdist._wire import blocks, messages
from hpcdist._wire.blocks import NoRoom
from hpcdist._wire.frames import CALL, CONTROL, RESULT, Body, Buffer, pack
from hpcdist._wire.messages import M

RawHandler = Callable[[Peer, int, Body, Sequence[Buffer]], None]
_MARK = "_handles"  # the attribute that names what a service's method handles
_REMEMBERED = 5.0  # seconds for those that are just about to send something to the dead
_LOOK_EVERY, _LOOK_EVERY_MOST = 0.02, 0.2  # seconds
_ident = threading.get_ident


class Mail(NamedTuple):
    """What comes with a message."""

    peer: Peer  # who sent it
    ident: int  # what a reply has to name; 0: none is expected
    body: Any  # what lies behind the message's fields
    buffers: Sequence[Buffer]


Handler = Callable[[M, Mail], None]
S = TypeVar("S", bound="Service")
_Method = Callable[[S, M, Mail], None]
_RawMethod = Callable[[S, Peer, int, Body, Sequence[Buffer]], None]


class Node:
    """The state of this process and its dispatch of messages.

    Args:
        machine: The computer it runs on, if that is a simulated one.
        progress: Its wait loop, likewise.
    """

    def __init__(self, machine: Machine | None = None, progress: WaitLoop | None = None) -> None:
        self.me = 1
        self.machine = machine or Machine()
        self._now = self.machine.now
        self.progress = progress or Progress(self.machine)
        self.progress.before_sleep.append(blocks.trim)
        self.peers: dict[int, Peer] = {}
        self.members = Members(self.machine.hostname())
        self.turns = Turns(self.progress)
        self.ids = itertools.count(1)
        self.pending: dict[int, Waitable] = {}  # what waits for an answer, by its id
        self.handlers: dict[int, RawHandler] = {}  # by number
        self.on_call: Callable[[Peer, int, int, int, Body, Sequence[Buffer]], None] = _unready
        self.on_no_room: Callable[[Peer, int, int, int, int, Body, int], None] = _unready
        self.on_death: list[Callable[[int], None]] = []
        self.on_join: list[Callable[[int], None]] = []
        self.on_forsaken: list[Callable[[], None]] = []
        self.on_unclaimed: list[Callable[[Peer, int, int, Body, Sequence[Buffer]], None]] = []
        self.on_interrupt: list[Callable[[int], None]] = []
        self.topology = "all_to_all"
        self.forbidden: Callable[[int], str | None] | None = None
        self.refusal: str | None = None  # why our API may not be used yet (an MPI launch)
        self._alone = Alone()
        self._started = False
        self.has_begun = False  # it is a driver, a worker or a simulated process by now
        self._lock = self.machine.lock()  # guards starting
        self.services: dict[type[Service], Any] = {}  # by kind; those asked for so far
        self._making = self.machine.rlock()  # guards the making of services

    def admit(self) -> None:
        """Raise RuntimeError where our API may not be used yet: every public name asks here.

        In an MPI launch that is so before `init()` or `cluster()`: else each rank would go on as
        a process 1 of its own.
        """
        if self.refusal:
            raise RuntimeError(self.refusal)

    def workers(self) -> list[int]:
        """List the workers for something to be done by all; process 1, if it is alone."""
        members = self.members
        if not members.living and not members.gone and self.me == 1:
            self._alone.warn()
        return members.workers()

    def await_workers(self, tag: str = "") -> None:
        """Wait while no worker (with a tag) lives, and one comes in the place of another."""
        members, pause = self.members, _LOOK_EVERY
        while members.awaits(tag) and not (members.tagged(tag) if tag else members.living):
            try:
                self.wait(Slot(), pause)
            except TimeoutError:
                pause = min(2 * pause, _LOOK_EVERY_MOST)

    def forsaken(self) -> None:
        """No worker will come any more in the place of others: let those that wait know."""
        for fn in self.on_forsaken:
            fn()

    def start(self) -> None:
        """Start the progress side; done at first use."""
        if self._started:
            return
        with self._lock:
            if self._started:
                return
            self.progress.start()
            self.machine.catch_sigint(self.progress.interrupts.on_sigint)
            self._started = True

    # Services

    def service(self, kind: type[S]) -> S:
        """Return this process's service of a kind; made when it is first asked for."""
        found: S | None = self.services.get(kind)
        return found if found is not None else self._make(kind)

    def serve(self, kinds: Iterable[type[Service]]) -> None:
        """Begin as a process of some kind, with its services: what they handle may arrive."""
        self.has_begun = True
        for kind in kinds:
            self.service(kind)

    def _make(self, kind: type[S]) -> S:
        with self._making:
            found: S | None = self.services.get(kind)
            if found is None:
                found = kind(self)
                for control, handler in found.handlers():
                    if isinstance(control, int):
                        self.on_raw(control)(handler)
                    else:
                        self.on(control)(handler)
                self.services[kind] = found
            return found

    def on(self, kind: type[M]) -> Callable[[Handler[M]], Handler[M]]:
        """Register the handler of a control."""

        def register(handler: Handler[M]) -> Handler[M]:
            def read(peer: Peer, ident: int, body: Body, buffers: Sequence[Buffer]) -> None:
                said, rest = messages.decode(kind, body)
                handler(said, Mail(peer, ident, rest, buffers))

            self.handlers[messages.NUMBERS[kind]] = read
            return handler

        return register

    def on_raw(self, number: int) -> Callable[[RawHandler], RawHandler]:
        """Register the handler of a control that lays out its own bytes."""

        def register(handler: RawHandler) -> RawHandler:
            self.handlers[number] = handler
            return handler

        return register

    def tune(self) -> None:
        """Adapt waiting and gathering to the number of processes on this host."""
        self.progress.tune(self.members.here + 1)

    # Peers

    def peer(self, pid: int) -> Peer:
        """Find a living process by its pid.

        Raises:
            ValueError: There is no such process.
            ProcessExitedException: It is dead.
        """
        found = self.peers.get(pid)
        if found is not None and found.alive and self.forbidden is None:
            return found
        return self._peer_slowly(pid)

    def _peer_slowly(self, pid: int) -> Peer:
        self.admit()
        if isinstance(pid, bool) or not isinstance(pid, int):
            raise TypeError(f"a process id is an int, not {pid!r}")
        gone = self.members.gone.get(pid)
        if gone is not None:
            raise gone.copy()
        found = self.peers.get(pid)
        if found is None or not found.alive:
            raise ValueError(f"no process with id {pid} exists")
        if self.forbidden is not None:
            reason = self.forbidden(pid)
            if reason:
                raise RuntimeError(reason)
        return found

    # Messages

    def deliver(
        self,
        peer: Peer,
        kind: int,
        flags: int,
        ident: int,
        aux: int,
        body: Body,
        buffers: Sequence[Buffer] | NoRoom,
    ) -> None:
        """Act on a message. Called by the driver."""
        if isinstance(buffers, NoRoom):
            self.on_no_room(peer, kind, flags, ident, aux, body, buffers.nbytes)
        elif kind == RESULT:
            slot = self.pending.pop(ident, None)
            if slot is None:
                self.unclaimed(peer, flags, ident, body, buffers)
                return
            if self.pending and slot.called:  # with others, it tells when the next call began
                peer.answered, peer.answered_at = ident, self._now()
            slot.value = (flags, body, buffers)
            self.progress.complete(slot)
            if type(slot) is not Slot:
                slot.arrived()
        elif kind == CALL:
            self.on_call(peer, flags, ident, aux, body, buffers)
        elif kind == CONTROL:
            handler = self.handlers.get(aux)
            if handler is not None:
                try:
                    handler(peer, ident, body, buffers)
                except Exception:  # its fault must not hit the thread that happens to drive
                    sys.excepthook(*sys.exc_info())

    def complete(self, slot: Waitable) -> None:
        """End a wait: a thread's, or that of something that goes on by itself."""
        self.progress.complete(slot)
        slot.arrived()

    def unclaimed(
        self, peer: Peer, flags: int, ident: int, body: Body, buffers: Sequence[Buffer]
    ) -> None:
        """Act on an answer that came after its wait."""
        for fn in self.on_unclaimed:
            fn(peer, flags, ident, body, buffers)

    # Waiting

    def wait(self, slot: Waitable, timeout: float | None = None) -> None:
        """Wait for a slot; a call that waits here gives its turn away meanwhile.

        Raises:
            TimeoutError: The timeout has passed.
            KeyboardInterrupt: Ctrl-C, or `interrupt()`.
        """
        if slot.ready:
            return
        if not self._started:
            self.start()
        deadline = None if timeout is None else self.machine.now() + timeout
        turns = self.turns
        call = turns.calls.get(_ident()) if turns.calls else None
        if call is None:
            self.progress.wait(slot, deadline)
            return
        me, interrupts = _ident(), self.progress.interrupts
        outer = me not in interrupts.held and interrupts.hold(me)
        try:
            turns.suspend(call, slot)
            try:
                self.progress.wait(slot, deadline)
            finally:
                turns.resume(call)
        finally:
            if outer:
                interrupts.leave(me)

    def wait_out(self, slot: Waitable, section: Section, error: BaseException) -> None:
        """Wait to the end although that has been broken off: what is waited for is done already.

        Args:
            slot: What is waited for.
            section: It gets the interrupt again that broke the wait off.
            error: What broke the wait off.
        """
        interrupted = isinstance(error, KeyboardInterrupt)
        while not slot.ready:
            try:
                self.progress.wait(slot)
            except KeyboardInterrupt:
                interrupted = True
        if interrupted:
            section.again()

    def send(
        self,
        pid: int,
        message: NamedTuple,
        ident: int = 0,
        body: bytes = b"",
        buffers: Sequence[Buffer] = (),
    ) -> bool:
        """Send a control to any process, this one included; tell whether it is alive."""
        if pid == self.me:
            handler = self.handlers[messages.NUMBERS[type(message)]]
            handler(Peer(pid, self.progress), ident, messages.encode(message, body), buffers)
            return True
        peer = self.peers.get(pid)
        if peer is None or not peer.alive:
            return False
        peer.send(message, ident, body, buffers)
        return True

    def request(
        self, pid: int, message: NamedTuple, body: bytes = b"", buffers: Sequence[Buffer] = ()
    ) -> Slot:
        """Send a control that will be answered; the answer ends the slot's wait."""
        peer = self.peer(pid)
        slot = Slot(pid)
        ident = next(self.ids)
        slot.error = None
        self.pending[ident] = slot
        slot.value = ident
        peer.send(message, ident, body, buffers)
        if not peer.alive:
            self.fail(ident, slot)
        return slot

    def fail(self, ident: int, slot: Waitable) -> None:
        """End a wait for a process that has died."""
        if self.pending.pop(ident, None) is not None:
            slot.error = self.members.death(slot.where)
            self.complete(slot)

    def calls_at(self, pid: int) -> dict[int, Waitable]:
        """Return the calls of this process that another has not answered, in their order."""
        waiting = list(self.pending.items())
        return {ident: slot for ident, slot in waiting if slot.where == pid and slot.called}

    def began_at(self, pid: int, ident: int, slot: Waitable) -> float:
        """Tell since when the first of these calls has run: it is sent, and its turn has come."""
        peer = self.peers.get(pid)
        if peer is None or peer.answered > ident:
            return slot.since
        return max(slot.since, peer.answered_at)

    def reply(
        self,
        peer: Peer,
        ident: int,
        outcome: int,
        body: bytes = b"",
        buffers: Sequence[Buffer] = (),
    ) -> None:
        """Answer a request."""
        if peer.pid == self.me:
            slot = self.pending.pop(ident, None)
            if slot is not None:
                slot.value = (outcome, body, buffers)
                self.complete(slot)
            return
        peer.post(*pack(RESULT, outcome, ident, 0, body, buffers))

    # Deaths

    def died(self, pid: int, death: ProcessExitedException, parked: bool = False) -> None:
        """Take note that a process is dead: everything that waits for it ends.

        Args:
            pid: The process.
            death: The error that its waiters get.
            parked: It still runs, unseen, and will be told to leave with its world.
        """
        if pid in self.members.gone:
            return
        peer = self.peers.get(pid)
        if peer is not None and peer.plane is not None:
            for _ in range(4):  # what it had sent before it died has arrived: take it first
                peer.plane.poll()
        for ident, slot in self.calls_at(pid).items():
            death.note_call(slot.called, self._now() - self.began_at(pid, ident, slot))
            break  # calls start in the order they were made
        self.members.remove(pid, death)
        self.tune()
        if peer is not None:
            peer.alive = False
            if not parked:
                if peer.plane is not None:
                    peer.plane.lose(peer.rank)
                if peer.link is not None:
                    peer.link.close()
            peer.drop()
        for ident, slot in list(self.pending.items()):
            if slot.where == pid:
                self.fail(ident, slot)
        for fn in self.on_death:
            fn(pid)
        if peer is not None and peer.plane is None:
            self.progress.call_later(_REMEMBERED, lambda: self._forget(peer))

    def _forget(self, peer: Peer) -> None:
        """Drop what was known of a dead process; why it ended stays known."""
        if self.peers.get(peer.pid) is peer:
            del self.peers[peer.pid]


def _unready(*_: object) -> None:
    raise RuntimeError("this process does not take calls yet")


class Service:
    """What one process keeps and does about one subject.

    It owns its state, and lists the messages that it handles: its methods marked with `on`. A
    process has at most one service of a kind. Which it has from the start stands in one place for
    each kind of process. What a service needs of others it gets when it is made, with
    `node.service`.
    """

    def __init__(self, node: Node) -> None:
        self.node = node

    @classmethod
    def here(cls) -> Self:
        """Return the one of this process."""
        # Not by `service` alone: each call of a user's comes by here.
        try:
            found: Self = here.node.services[cls]
        except KeyError:
            return here.node.service(cls)
        return found

    def handlers(self) -> Iterator[tuple[type[NamedTuple] | int, Any]]:
        """Yield what it handles: each control, or its number, and the method."""
        for kind in reversed(type(self).__mro__):
            for name, member in vars(kind).items():
                control = getattr(member, _MARK, None)
                if control is not None:
                    yield control, getattr(self, name)


def on(kind: type[M]) -> Callable[[_Method[S, M]], _Method[S, M]]:
    """Mark a service's method as the handler of a control."""

    def mark(method: _Method[S, M]) -> _Method[S, M]:
        setattr(method, _MARK, kind)
        return method

    return mark


def on_raw(number: int) -> Callable[[_RawMethod[S]], _RawMethod[S]]:
    """Mark a service's method as the handler of a control that lays out its own bytes."""

    def mark(method: _RawMethod[S]) -> _RawMethod[S]:
        setattr(method, _MARK, number)
        return method

    return mark


class _Here(threading.local):
    """Where a thread is: in which process."""

    node = Node()


here = _Here()


def _after_fork() -> None:
    """Start anew in a forked child: it is not the process the others know."""
    node = here.node
    node.progress.forget_after_fork()
    for peer in node.peers.values():
        if peer.link is not None:
            peer.link.forget_after_fork()
        peer.alive = False
    node.refusal = "this process was forked from one of a cluster and is not part of it"
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


os.register_at_fork(after_in_child=_after_fork)
