"""How batches leave: calls made of arguments that are pickled already, and calls to oneself."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from threading import get_ident
from typing import Any

from hpcdist import _errors
from hpcdist._parallel import batches, copies, segments
from hpcdist._parallel.batches import Token, Work
from hpcdist._parallel.copies import is_here
from hpcdist._parallel.lanes import Batch
from hpcdist._remote import calls
from hpcdist._runtime import references
from hpcdist._runtime.node import node
from hpcdist._runtime.turns import MAIN, Call
from hpcdist._wire import codec, functions
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import (
    ASYNC,
    CALL,
    DEFINES,
    DO,
    FAILED,
    FETCH,
    OURS,
    REFS,
    Buffer,
    pack,
)

_the_board: batches.Board | None = None


def board() -> batches.Board:
    global _the_board
    if _the_board is None:
        _the_board = batches.Board()
        batches.attach(node.me, _the_board.address)
    return _the_board


class Packed:
    """What a map does to each item, pickled once for the batches that follow.

    What is large goes to the workers of this host by shared memory, where it is written once.
    """

    def __init__(self, work: Work, own: bool) -> None:
        """Pickle it.

        Args:
            work: What to do.
            own: Whether its arrays may be changed by their owner meanwhile.
        """
        self._pieces, self._payload = codec.in_pieces(work)
        if own:
            self._payload.own()
        self._assigns = any(b"main_globals" in piece for piece in self._pieces)
        self._sizes = [
            sum(len(piece) for piece in self._pieces),
            *(memoryview(b).nbytes for b in self._payload.buffers),
        ]
        self._is_large = sum(self._sizes) >= segments.SHARED_MIN
        self._segment: segments.Segment | None = None
        self._offsets: list[int] = []

    def tell(self, peer: Any, token: Token, shares: bool) -> None:
        """Send it to a worker, which can open our memory or not."""
        if not (shares and is_here(peer.pid) and self._show(peer, token)):
            self._send(peer, token)
        if self._assigns:
            peer.bound.clear()  # its globals were assigned there: calls must tell theirs anew

    def _show(self, peer: Any, token: Token) -> bool:
        """Say where it lies in shared memory; tell whether it does."""
        segment = self._segment
        if segment is None and self._is_large:
            self._offsets, size = segments.lay_out(self._sizes)
            starts = [*accumulate(map(len, self._pieces), initial=0)][:-1]
            parts = [*self._pieces, *self._payload.buffers]
            try:
                segment = copies.written(size, parts, [*starts, *self._offsets[1:]])
            except OSError:  # too many open files, say
                self._is_large = False
            self._segment = segment
        if segment is None:
            return False
        segments.enter(segment, [peer.pid])
        layout = (self._offsets, self._sizes)
        head = pickle.dumps((token, segment.place(node.me), layout, board().address), 5)
        post(peer, DO, token[1], batches.keep_shared, Payload(head, (), self._payload.refs))
        if not peer.alive:
            copies.forget_views(peer.pid)
        return True

    def _send(self, peer: Any, token: Token) -> None:
        work = self._payload
        if not work.body:
            work.body = b"".join(self._pieces)
        parts = [pickle.PickleBuffer(b) for b in work.buffers]
        large = len(work.body) >= codec.APART_MIN
        body = pickle.PickleBuffer(work.body) if large else work.body
        buffers: list[Buffer] = []
        apart = lambda buffer: buffers.append(buffer.raw())
        packed = pickle.dumps((token, body, parts, board().address), 5, buffer_callback=apart)
        post(peer, DO, token[1], batches.keep, Payload(packed, buffers, work.refs))

    def end(self) -> None:
        """No worker is told any more. A finaliser may call it."""
        segment, self._segment = self._segment, None
        if segment is not None:
            copies.let_go(segment)


def post(peer: Any, wants: int, ident: int, f: Callable[..., Any], payload: Payload) -> None:
    """Post a call of one of our own functions with arguments that are pickled already."""
    known = functions.describe(f)
    assert known is not None
    flags, body = wants | (known.flags & ASYNC), payload.body
    if payload.refs:
        body = references.announce(payload.refs, peer.pid) + body
        flags |= REFS
    if known.ident not in peer.known:
        body = len(known.definition).to_bytes(4, "little") + known.definition + body
        flags |= DEFINES
    peer.post(*pack(CALL, flags, ident, known.ident, body, payload.buffers))
    peer.known.add(known.ident)


def run_here(batch: Batch, work: Work, token: Token, unit: int) -> None:
    """Run a batch in this process: nothing is pickled."""
    args = (work, token, batch.ident, unit, batch.part.columns)
    if work.is_async:
        calls._event_loop().start(
            lambda: batches.perform_async(*args),
            lambda out, error: _end_here(batch, out, error),
        )
    else:
        node.turns.submit(Call(_perform_here, None, FETCH, batch.ident, 0, (batch, args), ()))


def _perform_here(call: Call) -> None:
    batch, args = call.body
    out, error = None, None
    inside = call.thread == MAIN
    try:
        if inside:
            node.turns.main_in_call = True
        out = batches.perform(*args)
    except BaseException as exc:  # the edge of a call: it belongs to the caller
        error = exc
    finally:
        if inside:
            node.turns.main_in_call = False
    if out is not None and batches.hides_coroutines(out):
        settled = batches.settle(args[0], out)
        calls._event_loop().start(lambda: settled, lambda _, exc: _end_here(batch, out, exc))
        return
    _end_here(batch, out, error)


def _end_here(batch: Batch, out: batches.Outcome | None, error: BaseException | None) -> None:
    if out is None or error is not None:
        assert error is not None
        batch.value = (FAILED, _errors.encode_error(error, node.me), ())
    else:
        raised = None if out.error is None else _errors.encode_error(out.error, node.me)
        batch.value = (OURS, (out.results, raised, out.seconds, False), ())
    node.complete(batch)


@contextmanager
def without_turn() -> Iterator[None]:
    """Give the turn of the call this thread is in away, as our waits do."""
    call = node.turns.calls.get(get_ident())
    if call is None or call.waits:
        yield
        return
    node.turns.suspend(call, None)
    try:
        yield
    finally:
        node.turns.resume(call)
