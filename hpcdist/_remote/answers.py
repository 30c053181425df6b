"""Answers: calls arrive, are run, and what came of them goes back.

A call of this very process to itself is one of them, but nothing is pickled.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from hpcdist import _errors
from hpcdist._frames import drop_frames
from hpcdist._remote.cells import Cells
from hpcdist._runtime.node import Node, Service
from hpcdist._runtime.references import Reference, References
from hpcdist._runtime.running import Runners, Unpacked
from hpcdist._runtime.turns import Call
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer
from hpcdist._wire import codec, object_paths
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import (
    ASYNC,
    DEFINES,
    DO,
    EXTRAS,
    FAILED,
    FETCH,
    FUTURE,
    HEAD,
    KEYWORDS,
    OK,
    OURS,
    REFS,
    RESULT,
    WANTS,
    Body,
    Buffer,
    pack,
)
from hpcdist._wire.functions import Functions

NOTHING = Payload(b"")
_NO_KEYWORDS: dict[str, Any] = {}
_head = HEAD.pack


class PackedResult(NamedTuple):
    """A result that its function has pickled itself."""

    payload: Payload
    value: Any = None  # itself, for a caller in the same process


class Answers(Service):
    """The calls that this process runs, and what it answers."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._references = node.service(References)
        self._cells = node.service(Cells)
        self._turns = node.turns
        self._progress = node.progress
        self.functions = Functions()
        self._function = self.functions.function
        runners = node.service(Runners)
        self.own = runners.of(_as_given, self.answer_here)  # runs calls to oneself
        self._others = runners.of(self._unpack, self.answer)
        self._run = self._others.run
        node.on_call = self._on_call

    def _on_call(
        self,
        peer: Peer,
        flags: int,
        ident: int,
        aux: int,
        body: Body,
        buffers: Sequence[Buffer],
    ) -> None:
        if flags & DEFINES:
            view = memoryview(body)
            size = int.from_bytes(view[:4], "little")
            self.functions.define(aux, bytes(view[4 : 4 + size]))
            body = view[4 + size :]
        refs: Sequence[Reference] = ()
        if flags & REFS:
            refs, body = self._references.arrive(body)
        call = Call(self._run, peer, flags, ident, aux, body, buffers)
        call.refs = refs
        if flags & ASYNC:
            self._others.start(call)
        else:
            self._turns.submit(call)

    def _unpack(self, call: Call) -> Unpacked:
        """Unpickle a call of another process."""
        body, flags = call.body, call.flags
        function = self._function
        if not len(body):
            return function(call.aux), (), _NO_KEYWORDS
        if not call.aux:
            f, args, kw = codec.loads(body, call.buffers)
            return f, args, kw
        value = codec.loads(body, call.buffers)
        if flags & EXTRAS:
            (fresh, variable), args, kw = value
            if fresh:
                codec.main_globals().update(fresh)
            return function(call.aux, variable), args, kw
        f = function(call.aux)
        if flags & KEYWORDS:
            return f, value[0], value[1]
        return f, value, _NO_KEYWORDS

    def refuse(self, peer: Peer, flags: int, ident: int, error: BaseException) -> None:
        """Answer a call that cannot be run with an error."""
        self.answer(Call(self._run, peer, flags, ident, 0, b"", ()), None, error)

    def answer(self, call: Call, value: object, error: BaseException | None) -> None:
        """Send what came of a call to the process that made it."""
        if error is not None:
            self._answer_error(call, error)
            return
        wants = call.flags & WANTS
        peer = call.peer
        if wants == DO:
            return
        if value is None and wants == FETCH:
            data = _head(RESULT, OK, 0, 0, call.ident, 0)
            if self._turns.about_to_wait(call):
                peer.dispatch(data)
            else:
                peer.post(data)
                peer.hurry()
            return
        try:
            if type(value) is PackedResult:
                payload = value.payload
            else:
                payload = object_paths.dumps(value, "the result") if value is not None else NOTHING
        except Exception as exc:
            self._answer_error(call, exc)
            return
        if wants == FETCH:
            body, plain, with_refs = self._references.outgoing(payload, peer.pid)
            flags = OK | (REFS if with_refs else 0)
            data, parts = pack(RESULT, flags, call.ident, 0, body, plain)
            if parts:
                self._post_and_wait(peer, data, parts)
                return
            peer.post(data)
        else:
            self._cells.settle(peer.pid, call.ident, OK, payload)
            self._cells.send_outcome(peer, call.ident, OK, payload, whole=False)
        if self._turns.about_to_wait(call):
            self._progress.flush()
        else:
            peer.hurry()

    def _post_and_wait(self, peer: Peer, data: bytes, buffers: Sequence[Buffer]) -> None:
        """Send a large result, and hold this thread until it is through.

        The buffers may be an array that the worker keeps; its next call may write to it.
        """
        progress = self._progress
        through = Slot()
        peer.post(data, buffers, lambda: progress.complete(through))
        while peer.alive and not through.ready:
            try:
                progress.wait(through)
            except KeyboardInterrupt:  # too late for the function, whose answer this is
                continue

    def _answer_error(self, call: Call, error: BaseException) -> None:
        wants, peer = call.flags & WANTS, call.peer
        if wants == DO:
            _print_error(error)
            return
        data = _errors.encode_error(error, self.node.me)
        if wants == FUTURE:
            self._cells.settle(peer.pid, call.ident, FAILED, data)
        peer.post(*pack(RESULT, FAILED, call.ident, 0, data))
        peer.hurry()

    def answer_here(self, call: Call, value: object, error: BaseException | None) -> None:
        """Give what came of a call to who made it, in this very process."""
        waiter = call.body[3]
        if call.flags == DO:
            if error is not None:
                _print_error(error)
            return
        me = self.node.me
        if type(value) is PackedResult:
            value = value.value
        outcome = (OURS, value) if error is None else (FAILED, _errors.encode_error(error, me))
        if call.flags == FUTURE:
            self._cells.settle(me, call.ident, *outcome)
        waiter.value = (*outcome, ())
        self.node.complete(waiter)


def _as_given(call: Call) -> Unpacked:
    f, args, kw, _ = call.body
    return f, args, kw


def _print_error(error: BaseException) -> None:
    print(_errors.traceback_text(error), end="", file=sys.stderr, flush=True)
    drop_frames(error)
