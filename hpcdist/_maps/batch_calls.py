"""How batches leave: calls made of arguments that are pickled already, and calls to oneself."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from threading import get_ident
from typing import Any

from hpcdist import _errors
from hpcdist._collective import shared_memory
from hpcdist._collective.value_copies import ValueCopies
from hpcdist._maps import kept_functions, map_worker
from hpcdist._maps.boards import Address, Boards
from hpcdist._maps.kept_functions import Token
from hpcdist._maps.lanes import Batch, Lane
from hpcdist._maps.map_worker import Batches, Order, Outcome, Report, Work
from hpcdist._remote.calls import Calls
from hpcdist._runtime.node import Node, Service
from hpcdist._runtime.references import Reference, References
from hpcdist._runtime.running import Runners, Unpacked
from hpcdist._runtime.turns import Call, Turns
from hpcdist._transport.router import Peer
from hpcdist._wire import codec, generators
from hpcdist._wire.codec import Payload
from hpcdist._wire.frames import (
    DO,
    FAILED,
    FETCH,
    OURS,
    OUTCOME,
    REFS,
    Buffer,
)


class BatchCalls(Service):
    """How this process has batches run: elsewhere, or by itself."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._calls = node.service(Calls)
        self.functions = self._calls.functions
        self._runner = node.service(Runners).of(self._unpack, self._end_here)
        self.copies = node.service(ValueCopies)
        self._boards = node.service(Boards)
        self._batches = node.service(Batches)
        self._references = node.service(References)

    def read(self, flags: int, body: Any, buffers: Sequence[Any]) -> Any:
        """Unpickle the answer to a batch: a report's fields, `NOT_WANTED` or `NOT_THERE`."""
        if flags & OUTCOME == OURS:
            return body
        refs: Sequence[Reference] = ()
        if flags & REFS:
            refs, body = self._references.arrive(body)
        try:
            return codec.loads(body, buffers) if len(body) else map_worker.NOT_WANTED
        finally:
            del refs  # held until what names them has been made

    @property
    def board(self) -> Address:
        """Where workers say what they run."""
        return self._boards.address

    def line_of(self, batch: Batch) -> tuple[int, int] | None:
        """Read which of the items of its part a batch runs, if it has said so on the board."""
        line = self._boards.read(batch.ident)
        if line is None or not batch.filed:
            return line
        return max(0, line[0] - batch.filed), max(0, line[1] - batch.filed)

    def send(self, peer: Peer, batch: Batch, is_async: bool, payload: Payload) -> None:
        """Send a batch's order, pickled."""
        run = map_worker.run_async if is_async else map_worker.run
        self.post(peer, FETCH, batch.ident, run, payload)

    def post(
        self, peer: Peer, wants: int, ident: int, f: Callable[..., object], payload: Payload
    ) -> None:
        """Post a call of one of our own functions with arguments that are pickled already."""
        known = self.functions.describe(f)
        assert known is not None
        self._calls.post(peer, wants, ident, known, payload)

    def run_here(self, batch: Batch, work: Work, order: Order) -> None:
        """Run a batch in this process: nothing is pickled."""
        call = Call(self._runner.run, None, FETCH, batch.ident, 0, (batch, work, order), ())
        if work.is_async:
            self._runner.start(call)
        else:
            self.node.turns.submit(call)

    def _unpack(self, call: Call) -> Unpacked:
        _, work, order = call.body
        perform = self._batches.perform_async if work.is_async else self._perform
        return perform, (work, order), {}

    def _perform(self, work: Work, order: Order) -> Any:
        """Perform a batch; return what came of it, or a coroutine that does."""
        out = self._batches.perform(work, order)
        return _awaited(out, work, order) if out.hides_coroutines else out

    def _end_here(self, call: Call, out: Outcome | None, error: BaseException | None) -> None:
        batch: Batch = call.body[0]
        if out is None or error is not None:
            assert error is not None
            batch.value = (FAILED, _errors.encode_error(error, self.node.me), ())
        else:
            batch.value = (OURS, Report._make(out.fields(self.node.me, on_board=False)), ())
        self.node.complete(batch)


async def _awaited(out: Outcome, work: Work, order: Order) -> Outcome:
    await out.await_results(work, order)
    return out


class Packed:
    """What a map does to each item, pickled once for the batches that follow.

    What is large goes to the workers of this host by shared memory, where it is written once.
    """

    def __init__(self, calls: BatchCalls, work: Work, own: bool) -> None:
        """Pickle it.

        Args:
            calls: The calls by which it is sent.
            work: What to do.
            own: Whether its arrays may be changed by their owner meanwhile.
        """
        self._calls = calls
        calls.functions.notice_reloads(work.f)
        self._pieces, self._payload = codec.in_pieces(work)
        generators.warn_of_copies(work.f, self._pieces)
        if own:
            self._payload.own()
        self._assigns = any(b"main_globals" in piece for piece in self._pieces)
        self._sizes = [
            sum(len(piece) for piece in self._pieces),
            *(memoryview(b).nbytes for b in self._payload.buffers),
        ]
        self._is_large = sum(self._sizes) >= shared_memory.SHARED_MIN
        self._copies = calls.copies
        self._segment: shared_memory.Segment | None = None
        self._offsets: list[int] = []

    def deliver(self, peer: Peer, token: Token, shares: bool) -> None:
        """Send it to a worker, which can open our memory or not."""
        if not (shares and self._copies.is_here(peer.pid) and self._show(peer, token)):
            self._send(peer, token)
        if self._assigns:
            peer.bound.clear()  # its globals were assigned there: calls must tell theirs anew

    def _show(self, peer: Peer, token: Token) -> bool:
        """Say where it lies in shared memory; tell whether it does."""
        segment = self._segment
        if segment is None and self._is_large:
            self._offsets, size = shared_memory.lay_out(self._sizes)
            starts = [*accumulate(map(len, self._pieces), initial=0)][:-1]
            parts = [*self._pieces, *self._payload.buffers]
            try:
                segment = self._copies.written(size, parts, [*starts, *self._offsets[1:]])
            except OSError:  # too many open files, say
                self._is_large = False
            self._segment = segment
        if segment is None:
            return False
        self._copies.segments.enter(segment, [peer.pid])
        layout = (self._offsets, self._sizes)
        place = segment.place(self._calls.node.me)
        head = pickle.dumps((token, place, layout, self._calls.board), 5)
        payload = Payload(head, (), self._payload.refs)
        self._calls.post(peer, DO, token[1], kept_functions.keep_shared, payload)
        if not peer.alive:
            self._copies.forget_views(peer.pid)
        return True

    def _send(self, peer: Peer, token: Token) -> None:
        work = self._payload
        if not work.body:
            work.body = b"".join(self._pieces)
        parts = [pickle.PickleBuffer(b) for b in work.buffers]
        large = len(work.body) >= codec.APART_MIN
        body = pickle.PickleBuffer(work.body) if large else work.body
        buffers: list[Buffer] = []
        apart = lambda buffer: buffers.append(buffer.raw())
        fields = (token, body, parts, self._calls.board)
        packed = pickle.dumps(fields, 5, buffer_callback=apart)
        payload = Payload(packed, buffers, work.refs)
        self._calls.post(peer, DO, token[1], kept_functions.keep, payload)

    def end(self) -> None:
        """Send no worker anything any more. A finaliser may call it."""
        segment, self._segment = self._segment, None
        if segment is not None:
            self._copies.let_go(segment)


class SentWork:
    """The work of one map, as its workers know it.

    Args:
        calls: The calls by which it is sent.
        work: What to do.
        own: Whether its arrays may be changed by their owner meanwhile.
        known: The name under which workers keep it, and those that have it; None: a new one.
    """

    def __init__(
        self, calls: BatchCalls, work: Work, own: bool, known: tuple[Token, set[int]] | None
    ) -> None:
        self.token, self.told = known or ((calls.node.me, next(calls.node.ids)), set())
        self._lasts = known is not None
        self._calls = calls
        self._work = work
        self._own = own
        self._packed: Packed | None = None

    def deliver(self, lane: Lane, peer: Peer) -> None:
        """Send it to a worker."""
        if self._packed is None:
            self._packed = Packed(self._calls, self._work, self._own)
        # Batches of coroutines take no turn: they would ask for it again before it has one.
        self._packed.deliver(peer, self.token, lane.shares and not self._work.is_async)
        lane.told = True
        self.told.add(lane.pid)

    def to_drop(self, pid: int) -> list[Token]:
        """Name what a worker is to drop at the end of the map."""
        return [self.token] if pid in self.told and not self._lasts else []

    def end(self) -> None:
        """Send it to nobody any more."""
        if self._packed is not None:
            self._packed.end()


@contextmanager
def without_turn(turns: Turns) -> Iterator[None]:
    """Give the turn of the call this thread is in away, as our waits do."""
    me, interrupts = get_ident(), turns.interrupts
    call = turns.calls.get(me)
    if call is None or call.waits:
        yield
        return
    outer = interrupts.hold(me)
    try:
        turns.suspend(call, None)
        try:
            yield
        finally:
            turns.resume(call)
    finally:
        if outer:
            interrupts.leave(me)
