"""This process: who it is, whom it talks to, and what to do with a message that arrives.

There is one `node` per process, and it exists from the start: alone, a process is pid 1 of a
cluster of one.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._errors import ProcessExitedException
from hpcdist._runtime.members import Members
from hpcdist._runtime.turns import Turns
from hpcdist._transport.contracts import Slot
from hpcdist._transport.progress import Progress
from hpcdist._transport.router import Peer
from hpcdist._wire import blocks
from hpcdist._wire.frames import CALL, CONTROL, RESULT, Buffer, pack

Handler = Callable[[Peer, int, Any, Sequence[Buffer]], None]
_now = time.monotonic
_ident = threading.get_ident


class Node:
    """The state of this process and its dispatch of messages."""

    def __init__(self) -> None:
        self.me = 1
        self.progress = Progress()
        self.progress.before_sleep.append(blocks.trim)
        self.peers: dict[int, Peer] = {}
        self.members = Members()
        self.turns = Turns(self)
        self.ids = itertools.count(1)
        self.pending: dict[int, Any] = {}  # requests by id: a Slot, or a Future
        self.handlers: dict[int, Handler] = {}
        self.on_call: Callable[[Peer, int, int, int, Any, Sequence[Buffer]], None] = _unready
        self.on_death: list[Callable[[int], None]] = []
        self.on_join: list[Callable[[int], None]] = []
        self.on_unclaimed: list[Callable[[Peer, int, int, Any, Sequence[Buffer]], None]] = []
        self.on_interrupt: list[Callable[[int], None]] = []
        self.topology = "all_to_all"
        self.forbidden: Callable[[int], str | None] | None = None
        self.serving = False  # whether our main thread runs others' calls
        self.refusal: str | None = None  # why our API may not be used yet (an MPI launch)
        self._started = False
        self._lock = threading.Lock()  # guards starting

    def start(self) -> None:
        """Start the progress side; done at first use."""
        if self._started:
            return
        with self._lock:
            if self._started:
                return
            self.progress.start()
            self._catch_sigint()
            self._started = True

    def _catch_sigint(self) -> None:
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.progress.on_sigint)

    def control(self, op: int) -> Callable[[Handler], Handler]:
        """Register the handler of a control."""

        def register(handler: Handler) -> Handler:
            self.handlers[op] = handler
            return handler

        return register

    def settle(self) -> None:
        """Wait and gather messages as befits so many processes on this host."""
        self.progress.settle(self.members.here + 1)

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
        if self.refusal:
            raise RuntimeError(self.refusal)
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
        body: Any,
        buffers: Sequence[Buffer],
    ) -> None:
        """Act on a message. Called by the driver."""
        if kind == RESULT:
            slot = self.pending.pop(ident, None)
            if slot is None:
                self.unclaimed(peer, flags, ident, body, buffers)
                return
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
                except Exception:  # its fault must not hit whoever happens to drive
                    sys.excepthook(*sys.exc_info())

    def complete(self, slot: Any) -> None:
        """End a wait: a Slot's, or a Future's, which also tells its callbacks."""
        self.progress.complete(slot)
        if type(slot) is not Slot:
            slot.arrived()

    def unclaimed(
        self, peer: Peer, flags: int, ident: int, body: Any, buffers: Sequence[Buffer]
    ) -> None:
        """Act on an answer nobody waits for any more."""
        for fn in self.on_unclaimed:
            fn(peer, flags, ident, body, buffers)

    # Waiting

    def wait(self, slot: Any, timeout: float | None = None) -> None:
        """Wait for a slot; a call that waits here gives its turn away meanwhile.

        Raises:
            TimeoutError: The timeout has passed.
            KeyboardInterrupt: Ctrl-C, or `interrupt()`.
        """
        if slot.ready:
            return
        if not self._started:
            self.start()
        deadline = None if timeout is None else _now() + timeout
        turns = self.turns
        call = turns.calls.get(_ident()) if turns.calls else None
        if call is None:
            self.progress.wait(slot, deadline)
            return
        self.turns.suspend(call, slot)
        try:
            self.progress.wait(slot, deadline)
        finally:
            self.turns.resume(call)

    def request(
        self, pid: int, op: int, head: Any, body: bytes = b"", buffers: Sequence[Buffer] = ()
    ) -> Slot:
        """Send a control that will be answered; the answer ends the slot's wait."""
        peer = self.peer(pid)
        slot = Slot(pid)
        ident = next(self.ids)
        slot.error = None
        self.pending[ident] = slot
        slot.value = ident
        peer.control(op, ident, pack_head(head, body), buffers)
        if not peer.alive:
            self.fail(ident, slot)
        return slot

    def fail(self, ident: int, slot: Any) -> None:
        """End a wait for a process that has died."""
        if self.pending.pop(ident, None) is not None:
            slot.error = self.members.death(slot.where)
            self.complete(slot)

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
            death: What its waiters are told.
            parked: It still runs, unseen, and will be told to leave with its world.
        """
        if pid in self.members.gone:
            return
        peer = self.peers.get(pid)
        if peer is not None and peer.plane is not None:
            for _ in range(4):  # what it had sent before it died has arrived: take it first
                peer.plane.poll()
        self.members.remove(pid, death)
        self.settle()
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


def pack_head(head: Any, body: bytes = b"") -> bytes:
    """Put a small pickled head before a body."""
    data = pickle.dumps(head, 5)
    return len(data).to_bytes(4, "little") + data + body


def unpack_head(data: Any) -> tuple[Any, Any]:
    """Take the head and the body apart."""
    size = int.from_bytes(data[:4], "little")
    return pickle.loads(data[4 : 4 + size]), data[4 + size :]


def _unready(*_: Any) -> None:
    raise RuntimeError("this process does not take calls yet")


node = Node()


def _after_fork() -> None:
    """In a forked child: it is not the process the others know."""
    node.progress.forget_after_fork()
    for peer in node.peers.values():
        if peer.link is not None and peer.link.open:
            try:
                os.close(peer.link.sock.detach())
            except OSError:
                pass
            peer.link.open = False
        peer.alive = False
    node.refusal = "this process was forked from one of a cluster and is not part of it"
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


os.register_at_fork(after_in_child=_after_fork)
