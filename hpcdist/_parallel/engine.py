"""The engine of `pmap` and its kin: which worker gets which items when.

The thread that called the map drives it. Each worker has a lane with at most two batches in
flight, so that it finds the next one when it has finished the first. Everything that happens
(a batch ends, a worker dies or joins) is noted by the thread that drives the traffic; the engine
wakes, files the results, and fills the lanes again.

A batch begins as a single item, unless an earlier map has shown what to expect; how long the
items take then sets the size of the next. Only what is left when the collections are used up is
shared out more finely, and an idle worker gets half of what waits behind a busy one.
"""

from __future__ import annotations

import heapq
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._errors import ProcessExitedException
from hpcdist._parallel import batches, habits, posting
from hpcdist._parallel.batches import BUDGET, Token, Work
from hpcdist._parallel.lanes import IN_FLIGHT, LEAST, Batch, Delays, Lane, Question
from hpcdist._parallel.sources import Part, Source
from hpcdist._runtime import references
from hpcdist._runtime.controls import FORGET, TAKE_BACK
from hpcdist._runtime.node import node, pack_head
from hpcdist._transport.contracts import Slot
from hpcdist._wire import codec
from hpcdist._wire.frames import FAILED, FETCH, OURS, OUTCOME, REFS

_AHEAD = 512  # items of an iterator consumed ahead, for each worker
_AHEAD_KNOWN = 1 << 16  # the same for what is consumed by slicing: here it bounds the results kept
_PATIENCE = 4 * BUDGET  # an "auto" batch that takes this long has overrun
_RERUNS = 2  # how often an item runs again after the death of its worker
_LOOK_AGAIN = 0.002
_UNANSWERED = 1.0
_NEVER = float("inf")
_now = time.monotonic


class Failure(Exception):
    """Carries the error that ends a map."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


_engines: set[Engine] = set()


def poke_all(pid: int = 0) -> None:
    """Let every map look at its workers anew."""
    for engine in list(_engines):
        engine.poke()


node.on_join.append(poke_all)
node.on_death.append(poke_all)


class Engine:
    """One map under way.

    Args:
        work: What to do with each item.
        source: The items.
        members: Gives the workers to use, each time it is asked.
        sink: Takes results: the index of the first, and the list.
        unit: How many items belong together; None: as many as fit.
        delays: When a failed item is tried again.
        check: Whether it is.
        rerun: Whether what a worker ran when it died is run again.
        copy: Whether arguments may be changed by their owner meanwhile.
        in_order: Whether items before one that failed are still run: their results are wanted.
        token: The name under which workers keep the function; None: one of our own.
        told: Workers that have it.
    """

    def __init__(
        self,
        work: Work,
        source: Source,
        members: Callable[[], Sequence[int]],
        sink: Callable[[int, list[Any]], None],
        *,
        unit: int | None = None,
        delays: Delays | None = None,
        check: Callable[[BaseException], Any] | None = None,
        rerun: bool = True,
        copy: bool = False,
        in_order: bool = False,
        token: Token | None = None,
        told: set[int] | None = None,
    ) -> None:
        self.work = work
        self.source = source
        self.done = 0  # items whose results are filed
        self.failures = 0
        self.look_ahead: Callable[[], int] | None = None  # how many items may be taken in all
        self._members = members
        self._sink = sink
        self._auto = unit is None
        self._unit = unit or 1
        self._delays = delays
        self._check = check
        self._rerun = rerun
        self._copy = copy
        self._own_token = token is None
        self._token = token or (node.me, next(node.ids))
        self._told = told if told is not None else set()
        self._packed: posting.Packed | None = None
        self._lanes: dict[int, Lane] = {}
        self._gone: list[Lane] = []
        self._parts: deque[Part] = deque()  # handed back, or to run again
        self._later: list[tuple[float, int, Part]] = []  # to be tried again, by time
        self._tries: dict[int, int] = {}
        self._deaths: dict[int, int] = {}
        self._seconds = habits.learned(work.f) if self._auto and source.is_small else None
        self._arrived: deque[Any] = deque()
        self._waiter: Slot | None = None
        self._stale = True
        self._in_order = in_order
        self._error: BaseException | None = None
        self._failed_at = 0  # the index of the item that failed
        self._last_death: BaseException | None = None
        self._look_at = _NEVER  # when to look at the lanes though nothing has happened

    # What other threads call

    def note(self, what: Any) -> None:
        """File something that has happened. Called by the driver."""
        self._arrived.append(what)
        self._wake()

    def poke(self) -> None:
        """Look at the workers anew."""
        self._stale = True
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            node.complete(waiter)

    # The life of a map

    def begin(self) -> bool:
        """Find the workers; tell whether there are any but this process."""
        node.start()
        _engines.add(self)
        self._refresh()
        return any(pid != node.me for pid in self._lanes)

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Go on until all is done, or until there is something to hand out.

        Raises:
            Failure: An item failed, or no worker is left; what was in flight has ended.
        """
        with posting.without_turn():
            while True:
                while self._arrived:
                    self._file(self._arrived.popleft())
                if self._error is not None:
                    self._end_failed()
                if until is not None and until():
                    self._fill()
                    node.progress.nudge()
                    return
                if self._stale:
                    self._refresh()
                self._fill()
                if self._error is not None:
                    continue
                if self._is_done():
                    return
                self._wait()

    @property
    def workers(self) -> int:
        """How many workers it has."""
        return sum(lane.open for lane in self._lanes.values())

    @property
    def over(self) -> bool:
        """Whether every item has been run and its result filed."""
        return self._error is None and self._is_done()

    def _is_done(self) -> bool:
        if self._parts or self._later or self._arrived or not self.source.ended:
            return False
        return not any(lane.batches for lane in self._all_lanes())

    def _all_lanes(self) -> Iterator[Lane]:
        yield from self._lanes.values()
        yield from self._gone

    def _wait(self) -> None:
        slot = Slot()
        self._waiter = slot
        if self._arrived or self._stale:
            self._waiter = None
            return
        deadline = self._look_at
        if self._later:
            deadline = min(deadline, self._later[0][0])
        try:
            lasting = self._seconds is not None and self._seconds > LEAST
            node.progress.wait(slot, None if deadline == _NEVER else deadline, lasting)
        except TimeoutError:
            pass
        finally:
            self._waiter = None

    def end(self) -> None:
        """Give up what is in flight, and let the workers drop the function."""
        _engines.discard(self)
        if self._auto and self._seconds is not None:
            large = any(lane.nbytes for lane in self._all_lanes())
            habits.learn(self.work.f, None if large else self._seconds)
        if self._packed is not None:
            self._packed.end()
        for lane in self._all_lanes():
            idents = [b.ident for b in reversed(lane.batches)]
            for ident in (*idents, *lane.questions):
                node.pending.pop(ident, None)
            lane.batches = []
            lane.questions = []
            peer = node.peers.get(lane.pid)
            if lane.pid == node.me:
                batches.take_back(None, node.me, True, idents)
            elif peer is not None and peer.alive and (idents or (self._own_token and lane.told)):
                tokens = [self._token] if self._own_token else []
                peer.control(FORGET, 0, pack_head((tokens, idents)))
                node.progress.soon()

    def _end_failed(self) -> None:
        """Start nothing new but what is still wanted, and wait for those that run."""
        self.source.ended = True
        self._drop_unwanted()
        for lane in self._all_lanes():
            if lane.items > 1:
                self._ask_back(lane, everything=True)
        while self._parts or self._later or any(lane.batches for lane in self._all_lanes()):
            if self._stale:
                self._refresh()
            self._fill()
            self._wait()
            while self._arrived:
                self._file(self._arrived.popleft())
            self._drop_unwanted()
        assert self._error is not None
        raise Failure(self._error)

    def _drop_unwanted(self) -> None:
        end = self._failed_at if self._in_order else 0
        parts = [p.cut(0, max(0, end - p.start), alone=p.alone) for p in self._parts]
        self._parts = deque(p for p in parts if p.size)
        self._later = [entry for entry in self._later if entry[2].start < end]
        heapq.heapify(self._later)

    def _fail(self, error: BaseException, at: int) -> None:
        if self._error is None or (self._in_order and at < self._failed_at):
            self._error = error
            self._failed_at = at

    # Workers

    def _refresh(self) -> None:
        self._stale = False
        wanted = [p for p in self._members() if p == node.me or _is_alive(p)]
        for pid in wanted:
            if pid not in self._lanes:
                self._lanes[pid] = Lane(pid, self.note)
                self._lanes[pid].told = pid in self._told
                self._lanes[pid].trust(self._seconds)
        for pid, lane in list(self._lanes.items()):
            lane.open = pid in wanted
            if not lane.open and not lane.batches and not _is_alive(pid):
                del self._lanes[pid]
                self._gone.append(lane)

    # Filling the lanes

    def _fill(self) -> None:
        now = _now()
        self._look_at = _NEVER
        while self._later and self._later[0][0] <= now:
            self._parts.append(heapq.heappop(self._later)[2])
        lanes = [lane for lane in self._lanes.values() if lane.open]
        if not lanes:
            self._nobody_left()
            return
        hungry = False
        rested = [lane for lane in lanes if lane.rests_until <= now]
        for lane in lanes if len(rested) < len(lanes) else ():
            self._look_at = min(self._look_at, max(lane.rests_until, now + _LOOK_AGAIN))
        for depth in range(IN_FLIGHT):
            for lane in rested or lanes:
                if len(lane.batches) > depth or (lane.stuck and lane.batches):
                    continue
                part = self._next_part(lane, len(lanes))
                if part is None:
                    hungry = hungry or not lane.batches
                    continue
                if not self._send(lane, part):
                    return
        self._mind_the_slow(lanes, hungry, now)

    def _nobody_left(self) -> None:
        if any(lane.batches for lane in self._all_lanes()) or self._arrived:
            return
        if self._parts or self._later or not self.source.ended:
            if self._last_death is None:
                gone = [lane.pid for lane in self._all_lanes()]
                self._last_death = node.members.death(gone[-1] if gone else node.me)
            self._fail(self._last_death, 0)
            self._parts.clear()
            self._later.clear()

    def _next_part(self, lane: Lane, lanes: int) -> Part | None:
        if self._parts:
            part = self._parts[0]
            size = self._size(lane, lanes)
            if part.alone or part.size <= size:
                return self._parts.popleft()
            self._parts[0] = part.cut(size, part.size)
            return part.cut(0, size)
        if self.source.ended:
            return None
        size = self._size(lane, lanes)
        if self.look_ahead is not None or self.source.is_lazy:
            room = self._room(lanes)
            if room <= 0:
                return None
            size = min(size, max(room // self._unit, 1) * self._unit)
        try:
            return self.source.take(size)
        except BaseException as exc:  # the user's iterator: its error is this map's
            self._fail(exc, self.source.taken)
            return None

    def _room(self, lanes: int) -> int:
        """How many more items may be taken from the collections.

        Never further ahead than the map has come, so that little is consumed in vain if it ends
        soon, and never further than a constant.
        """
        come = self.done if self.look_ahead is None else self.look_ahead()
        least = IN_FLIGHT * lanes * self._unit
        most = lanes * max(_AHEAD if self.source.is_lazy else _AHEAD_KNOWN, 2 * self._unit)
        return come + max(least, min(most, come)) - self.source.taken

    def _size(self, lane: Lane, lanes: int) -> int:
        return lane.size(self._unit, self.source.left, lanes, self._seconds)

    def _send(self, lane: Lane, part: Part) -> bool:
        """Put a batch on its way; tell whether the map can go on."""
        ident = next(node.ids)
        batch = Batch(lane, ident, part)
        lane.last = part.size
        if not lane.batches:
            lane.since = batch.sent
        lane.batches.append(batch)
        if lane.pid == node.me:
            posting.run_here(batch, self.work, self._token, 1 if part.alone else self._unit)
            return True
        peer = node.peers[lane.pid]
        try:
            if not lane.told:
                self._tell(lane, peer)
            unit = 1 if part.alone else self._unit
            payload = codec.dumps((self._token, ident, unit, part.columns))
        except BaseException as exc:  # cannot be pickled: raised here, the others are unharmed
            lane.batches.remove(batch)
            self._fail(exc, part.start)
            return False
        lane.take_size(payload.nbytes / part.size)
        node.pending[ident] = batch
        if payload.buffers and self._copy:
            payload.own()
        run = batches.run_async if self.work.is_async else batches.run
        posting.post(peer, FETCH, ident, run, payload)
        if not peer.alive:
            node.fail(ident, batch)
        elif self.source.is_lazy:  # the user's iterator comes next, and may take its time
            peer.hurry()
        return True

    def _tell(self, lane: Lane, peer: Any) -> None:
        """Send the function, once to each worker."""
        if self._packed is None:
            self._packed = posting.Packed(self.work, self._copy)
        # Batches of coroutines take no turn: they would ask for it again before it has one.
        self._packed.tell(peer, self._token, lane.shares and not self.work.is_async)
        lane.told = True
        self._told.add(lane.pid)

    # Slow items

    def _mind_the_slow(self, lanes: Sequence[Lane], hungry: bool, now: float) -> None:
        """Take items back from lanes that hold them up, for lanes that could do with them."""
        if len(lanes) < 2:
            return
        for lane in self._lanes.values():
            if not lane.batches:
                continue
            age, single = now - lane.since, lane.items < 2
            overrun = self._auto and age > _PATIENCE and not single
            lane.stuck = lane.stuck or overrun
            if not (hungry or overrun):
                if self._auto:
                    self._look_at = min(self._look_at, lane.since + _PATIENCE + 0.001)
                continue
            # What will be done in a moment is not worth asking for. A single item runs already,
            # unless its worker is busy with something else.
            expected = lane.seconds * lane.items if lane.seconds is not None else 0.0
            ready_at = 0.0
            if single:
                ready_at = lane.since + _PATIENCE
            elif expected < 2 * LEAST:
                ready_at = lane.since + _LOOK_AGAIN
            if lane.asked:
                # A worker that does not know of batches yet never answers.
                pause = _PATIENCE * 2 ** min(lane.vain, 5)
                ready_at = max(ready_at, lane.asked + (_UNANSWERED if lane.questions else pause))
            if now >= ready_at:
                lane.asked = now
                self._ask_back(lane, everything=overrun)
                ready_at = now + _PATIENCE
            self._look_at = min(self._look_at, ready_at)

    def _ask_back(self, lane: Lane, everything: bool) -> None:
        idents = [b.ident for b in reversed(lane.batches)]
        if lane.pid == node.me:
            self._handed_back(lane, batches.take_back(None, node.me, everything, idents))
            return
        peer = node.peers.get(lane.pid)
        if peer is None or not peer.alive:
            return
        ident = next(node.ids)
        lane.questions.append(ident)
        node.pending[ident] = Question(lane, ident)
        peer.control(TAKE_BACK, ident, pack_head((everything, idents)))

    def _handed_back(self, lane: Lane, taken: Sequence[tuple[int, int]]) -> None:
        for ident, count in taken:
            batch = next((b for b in lane.batches if b.ident == ident), None)
            if batch is None:
                continue  # it has ended meanwhile, and said itself what it did not run
            part = batch.part
            kept = 0 if count < 0 else part.size - count
            self._parts.append(part.cut(kept, part.size, alone=part.alone))
            batch.part = part.cut(0, kept, alone=part.alone)
            if count < 0:
                node.pending.pop(ident, None)
                lane.batches.remove(batch)
        if taken:
            lane.asked, lane.vain = 0.0, 0
            if not lane.batches:
                lane.rest()
        else:
            lane.vain += 1

    # Filing what has happened

    def _file(self, what: Any) -> None:
        lane = what.lane
        if type(what) is Question:
            if what.ident in lane.questions:
                lane.questions.remove(what.ident)
            if what.error is None:
                self._handed_back(lane, pickle.loads(what.value[1]))
            return
        if what not in lane.batches:
            return
        first = what is lane.batches[0]
        lane.batches.remove(what)
        if what.error is not None:
            self._file_death(what, first)
            return
        lane.answered()
        flags, body, buffers = what.value
        outcome = flags & OUTCOME
        if outcome == FAILED:
            self._file_error(what.part.cut(0, 1), _errors.decode_error(bytes(body)))
            self._hand_on(what.part, 1)
            return
        nbytes = len(body) + sum(memoryview(b).nbytes for b in buffers)
        if outcome == OURS:
            answer = body
        else:
            refs: Any = ()
            if flags & REFS:
                refs, body = references.arrive(body)
            try:
                answer = codec.loads(body, buffers) if len(body) else None
            except Exception as exc:  # a result that cannot be unpickled here
                self._fail(exc, what.part.start)
                return
            del refs
        if answer is None:  # the map had ended: this cannot be, unless it has
            return
        if answer is False:  # it cannot open the memory the function is in
            if lane.shares:
                lane.shares = lane.told = False
            lane.rest()  # until it has been sent the function
            self._hand_on(what.part, 0)
            return
        results, error, seconds, on_board = answer
        lane.on_board = on_board
        ran = len(results)
        if ran:
            lane.take_note(seconds / (ran + (error is not None)), nbytes / ran)
            self._seconds = lane.seconds
            self.done += ran
            self._sink(what.part.start, results)
        if error is not None:
            raised = _errors.decode_error(error) if type(error) is bytes else error
            self._file_error(what.part.cut(ran, ran + 1), raised)
            ran += 1
        self._hand_on(what.part, ran)

    def _hand_on(self, part: Part, ran: int) -> None:
        if ran < part.size:
            self._parts.append(part.cut(ran, part.size))

    def _file_error(self, item: Part, error: BaseException) -> None:
        self.failures += 1
        tries = self._tries[item.start] = self._tries.get(item.start, 0) + 1
        if self._delays is None or (self._error is not None and not self._in_order):
            self._fail(error, item.start)
            return
        try:
            delay = self._delays.get(tries)
            if delay is None or (self._check is not None and not self._check(error)):
                self._fail(error, item.start)
                return
        except Exception as exc:  # the user's check, or delays
            self._fail(exc, item.start)
            return
        heapq.heappush(self._later, (_now() + delay, item.start, item))

    def _file_death(self, batch: Batch, first: bool) -> None:
        error, part, lane = batch.error, batch.part, batch.lane
        assert error is not None
        self._stale = True
        self._last_death = error
        if not isinstance(error, ProcessExitedException):
            self._fail(error, part.start)
            return
        begin, end = self._suspects(batch, first)
        if error.why == "removed":
            begin = end = 0
        hopeless = not self._rerun or "OUT_OF_MEMORY" in error.why
        if hopeless and begin < end:
            self._fail(error, part.start + begin)
            return
        if begin < end:
            self.failures += 1
        for k in range(begin, end):
            deaths = self._deaths[part.start + k] = self._deaths.get(part.start + k, 0) + 1
            if deaths > _RERUNS and end - begin == 1:
                self._fail(error, part.start + k)
                return
        if begin > 0:
            self._parts.append(part.cut(0, begin))
        for k in range(begin, end):
            self._parts.append(part.cut(k, k + 1, alone=True))
        self._hand_on(part, end)
        lane.open = False

    def _suspects(self, batch: Batch, first: bool) -> tuple[int, int]:
        """Which items of a batch may have been running when its worker died."""
        size = batch.part.size
        line = posting.board().read(batch.ident)
        if line is not None:
            return min(line[0], size), min(line[1], size)
        if batch.lane.on_board or not first:
            return 0, 0
        return 0, size


def _is_alive(pid: int) -> bool:
    if pid == node.me:
        return True
    peer = node.peers.get(pid)
    return peer is not None and peer.alive and (pid == 1 or pid in node.members.living)
