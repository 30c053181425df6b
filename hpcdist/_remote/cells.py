"""Cells: where a future's value lies, with its owner.

A cell is set once, by the call it belongs to or by the first `put`; that answers all earlier
requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcdist import _errors
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.references import Entry, References
from hpcdist._transport.router import Peer
from hpcdist._wire import object_paths
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
    pack,
)
from hpcdist._wire.messages import AskReady, AskRunning, CancelCall, Fetch, RefId, SetFuture

_head = HEAD.pack
_PLAIN_MOST = 1024
ONCE = "Future can be set only once"


class Cell:
    """The owner's side of a future."""

    __slots__ = ("_cells", "asked", "body", "outcome", "pickled")

    def __init__(self, cells: Cells, outcome: int = -1, body: Any = None) -> None:
        self._cells = cells
        self.outcome = outcome
        self.body = body  # OURS: the value itself; FAILED: the encoded error
        self.pickled: Payload | None = body if outcome == OK else None
        self.asked: list[Callable[[], None]] | None = [] if outcome < 0 else None

    def set(self, outcome: int, body: Any) -> bool:
        """Set the value, once; tell whether this was the first time."""
        with self._cells.lock:
            if self.outcome >= 0:
                return False
            self.body = body
            if outcome == OK:
                self.pickled = body
            self.outcome = outcome
            asked, self.asked = self.asked, None
        for fn in asked or ():
            fn()
        return True

    def when_set(self, fn: Callable[[], None]) -> None:
        """Call `fn` as soon as the value is there."""
        with self._cells.lock:
            if self.asked is not None:
                self.asked.append(fn)
                return
        fn()

    def payload(self) -> tuple[int, Payload]:
        """Give the outcome as something to send."""
        if self.pickled is None:
            if self.outcome == OURS:
                try:
                    self.pickled = object_paths.dumps(self.body, "the result")
                except Exception as exc:
                    return FAILED, Payload(_errors.encode_error(exc, self._cells.node.me))
            else:
                self.pickled = Payload(self.body or b"")
        return OK if self.outcome == OURS else self.outcome, self.pickled


class Cells(Service):
    """The values of the futures that this process owns."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._references = node.service(References)
        self.lock = node.machine.lock()  # guards the setting of cells

    def cell_of(self, ref: RefId) -> Cell:
        """Find or make the cell of a future owned here."""
        references = self._references
        with references.lock:
            entry = references.owned.get(ref)
            if entry is None:
                entry = references.owned[ref] = Entry()
            if entry.value is None:
                entry.value = Cell(self)
            found: Cell = entry.value
            return found

    def settle(self, pid: int, ident: int, outcome: int, body: object) -> Cell:
        """Set the cell of a call that `pid` made and that ended here; `pid` holds it."""
        ref = (pid, ident)
        references = self._references
        if ref not in references.owned:  # as a rule nobody has asked for it yet
            cell = Cell(self, outcome, body)
            entry = Entry(cell, {pid: 1})
            with references.lock:
                if pid in self.node.members.gone:  # nobody will ask
                    return cell
                if references.owned.setdefault(ref, entry) is entry:
                    return cell
        cell = self.cell_of(ref)
        references.count(ref, pid, 1)
        cell.set(outcome, body)
        return cell

    def send_outcome(
        self, peer: Peer, ident: int, outcome: int, payload: Payload, whole: bool
    ) -> None:
        """Answer with an outcome, and with the value unless it is large and was not asked for."""
        small = payload.body
        is_plain = len(small) <= _PLAIN_MOST and not payload.buffers and not payload.refs
        if is_plain and peer.pid != self.node.me:
            peer.post(_head(RESULT, outcome, 0, len(small), ident, 0) + small)
            return
        if not whole and outcome == OK and payload.nbytes > BODY_MAX:
            self.node.reply(peer, ident, KEPT)
            return
        body, buffers, with_refs = self._references.outgoing(payload, peer.pid)
        self.node.reply(peer, ident, outcome | (REFS if with_refs else 0), body, buffers)

    # What others ask and tell

    @on(Fetch)
    def _on_fetch(self, said: Fetch, mail: Mail) -> None:
        cell = self.cell_of(said.ref)

        def answer() -> None:
            outcome, payload = cell.payload()
            self.send_outcome(mail.peer, mail.ident, outcome, payload, said.whole)
            self.node.progress.soon()

        if cell.outcome == OURS and cell.pickled is None:
            self.node.turns.background(answer)  # pickling somebody's object may take its time
        else:
            cell.when_set(answer)

    @on(AskReady)
    def _on_ask_ready(self, said: AskReady, mail: Mail) -> None:
        entry = self._references.owned.get(said.ref)
        is_set = entry is not None and isinstance(entry.value, Cell) and entry.value.outcome >= 0
        self.node.reply(mail.peer, mail.ident, OK, b"1" if is_set else b"")

    @on(SetFuture)
    def _on_set_future(self, said: SetFuture, mail: Mail) -> None:
        value = self._references.arrived(mail.body, mail.buffers, said.with_refs)
        if self.cell_of(said.ref).set(OK, value):
            self.node.reply(mail.peer, mail.ident, OK)
        else:
            error = _errors.encode_error(RuntimeError(ONCE), self.node.me)
            self.node.reply(mail.peer, mail.ident, FAILED, error)

    @on(CancelCall)
    def _on_cancel_call(self, said: CancelCall, mail: Mail) -> None:
        node = self.node
        whence, number = said.ref
        caller = node.peers.get(whence)
        if caller is None or not node.turns.withdraw(caller, number):
            node.reply(mail.peer, mail.ident, OK, b"")
            return
        self.settle(whence, number, CANCELLED, b"")
        caller.post(*pack(RESULT, CANCELLED, number, 0))
        node.reply(mail.peer, mail.ident, OK, b"1")

    @on(AskRunning)
    def _on_ask_running(self, said: AskRunning, mail: Mail) -> None:
        whence, number = said.ref
        caller = self.node.peers.get(whence)
        queued = caller is not None and self.node.turns.is_queued(caller, number)
        self.node.reply(mail.peer, mail.ident, OK, b"" if queued else b"1")
