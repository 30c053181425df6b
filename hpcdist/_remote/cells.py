"""Cells: where a future's value lies, with its owner.

A cell is set once, by the call it belongs to or by whoever puts first; whoever asked before is
answered then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._runtime import references
from hpcdist._runtime.controls import CANCEL, FETCH, PUT, READY, RUNNING
from hpcdist._runtime.node import node, unpack_head
from hpcdist._runtime.references import Parcel, outgoing
from hpcdist._transport.router import Peer
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import (
    BODY_MAX,
    CANCELLED,
    FAILED,
    HEAD,
    KEPT,
    OK,
    OURS,
    REFS,
    RESULT,
    Buffer,
    pack,
)

_head = HEAD.pack
_PLAIN_MOST = 1024
ONCE = "Future can be set only once"
_lock = threading.Lock()  # guards the setting of cells


class Cell:
    """The owner's side of a future."""

    __slots__ = ("_payload", "asked", "body", "outcome")

    def __init__(self, outcome: int = -1, body: Any = None) -> None:
        self.outcome = outcome
        self.body = body  # OURS: the value itself; FAILED: the encoded error
        self._payload: Payload | None = body if outcome == OK else None
        self.asked: list[Callable[[], None]] | None = [] if outcome < 0 else None

    def set(self, outcome: int, body: Any) -> bool:
        """Set the value, once; tell whether this was the first time."""
        with _lock:
            if self.outcome >= 0:
                return False
            self.body = body
            if outcome == OK:
                self._payload = body
            self.outcome = outcome
            asked, self.asked = self.asked, None
        for fn in asked or ():
            fn()
        return True

    def when_set(self, fn: Callable[[], None]) -> None:
        """Call `fn` as soon as the value is there."""
        with _lock:
            if self.asked is not None:
                self.asked.append(fn)
                return
        fn()

    def payload(self) -> tuple[int, Payload]:
        """Give the outcome as something to send."""
        if self._payload is None:
            if self.outcome == OURS:
                try:
                    self._payload = codec.dumps(self.body)
                except Exception as exc:
                    return FAILED, Payload(_errors.encode_error(exc, node.me))
            else:
                self._payload = Payload(self.body or b"")
        return OK if self.outcome == OURS else self.outcome, self._payload


def cell_of(ref: tuple[int, int]) -> Cell:
    """Find or make the cell of a future owned here."""
    with references._lock:
        entry = references.owned.get(ref)
        if entry is None:
            entry = references.owned[ref] = references.Entry()
        if entry.value is None:
            entry.value = Cell()
        found: Cell = entry.value
        return found


def settle(pid: int, ident: int, outcome: int, body: Any) -> Cell:
    """Set the cell of a call that `pid` made and that ended here; `pid` holds it."""
    ref = (pid, ident)
    if ref not in references.owned:  # as a rule nobody has asked for it yet
        cell = Cell(outcome, body)
        entry = references.Entry(cell, {pid: 1})
        with references._lock:
            if references.owned.setdefault(ref, entry) is entry:
                return cell
    cell = cell_of(ref)
    references.count(ref, pid, 1)
    cell.set(outcome, body)
    return cell


def send_outcome(peer: Peer, ident: int, outcome: int, payload: Payload, whole: bool) -> None:
    """Answer with an outcome, and with the value unless it is large and was not asked for."""
    small = payload.body
    is_plain = len(small) <= _PLAIN_MOST and not payload.buffers and not payload.refs
    if is_plain and peer.pid != node.me:
        peer.post(_head(RESULT, outcome, 0, len(small), ident, 0) + small)
        return
    if not whole and outcome == OK and payload.nbytes > BODY_MAX:
        node.reply(peer, ident, KEPT)
        return
    body, buffers, with_refs = outgoing(payload, peer.pid)
    node.reply(peer, ident, outcome | (REFS if with_refs else 0), body, buffers)


# The owner's side of the controls.


@node.control(FETCH)
def _on_fetch(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (ref, whole), _ = unpack_head(body)
    cell = cell_of(ref)

    def answer() -> None:
        outcome, payload = cell.payload()
        send_outcome(peer, ident, outcome, payload, whole)
        node.progress.soon()

    if cell.outcome == OURS and cell._payload is None:
        node.turns.background(answer)  # pickling somebody's object may take its time
    else:
        cell.when_set(answer)


@node.control(READY)
def _on_ready(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    ref, _ = unpack_head(body)
    entry = references.owned.get(ref)
    is_set = entry is not None and isinstance(entry.value, Cell) and entry.value.outcome >= 0
    node.reply(peer, ident, OK, b"1" if is_set else b"")


@node.control(PUT)
def _on_put(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (ref, with_refs), rest = unpack_head(body)
    if cell_of(ref).set(OK, Parcel.of(rest, buffers, with_refs)):
        node.reply(peer, ident, OK)
    else:
        node.reply(peer, ident, FAILED, _errors.encode_error(RuntimeError(ONCE), node.me))


@node.control(CANCEL)
def _on_cancel(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (whence, number), _ = unpack_head(body)
    caller = node.peers.get(whence)
    if caller is None or not node.turns.withdraw(caller, number):
        node.reply(peer, ident, OK, b"")
        return
    settle(whence, number, CANCELLED, b"")
    caller.post(*pack(RESULT, CANCELLED, number, 0))
    node.reply(peer, ident, OK, b"1")


@node.control(RUNNING)
def _on_running(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    (whence, number), _ = unpack_head(body)
    caller = node.peers.get(whence)
    queued = caller is not None and node.turns.is_queued(caller, number)
    node.reply(peer, ident, OK, b"" if queued else b"1")
