"""The engine of `pmap`, `imap` and `imap_unordered`: which worker gets which items when.

The thread that called the map drives it. Each worker has a lane with at most two batches in
flight, so that it finds the next one when it has finished the first. Everything that happens
(a batch ends, a worker dies or joins) is noted by the thread that drives the traffic; the engine
wakes, files the results, and fills the lanes again.

A batch begins as a single item, unless an earlier map has shown what to expect; how long the
items take then sets the size of the next. Only what is left when the collections are used up is
shared out more finely, and an idle worker gets half of what waits behind a busy one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hpcdist import _errors
from hpcdist._errors import ProcessExitedException
from hpcdist._maps.backlog import NEVER, Backlog, Retries
from hpcdist._maps.batch_calls import SentWork, without_turn
from hpcdist._maps.blame import Charges, name_part, name_unpicklable, suspects_of
from hpcdist._maps.demand import Want
from hpcdist._maps.failure import Failure
from hpcdist._maps.fitting import Fitting
from hpcdist._maps.kept_functions import Token
from hpcdist._maps.lanes import (
    IN_FLIGHT,
    LEAST,
    LOOK_AGAIN,
    ORDER,
    PATIENCE,
    Batch,
    Early,
    Lane,
    Question,
    is_alive,
)
from hpcdist._maps.map_worker import NOT_THERE, NOT_WANTED, Order, Report, Work
from hpcdist._maps.sources import Part, Source
from hpcdist._maps.terms import Terms
from hpcdist._maps.under_way import Maps
from hpcdist._transport.contracts import Slot
from hpcdist._wire import codec, messages
from hpcdist._wire.frames import FAILED, OUTCOME
from hpcdist._wire.generators import Repeats
from hpcdist._wire.messages import Forget, TakeBack, TakenBack

_LOOK_AT_ENDS = 1.0  # how often to see whether a job got more time, and whether workers will come


class Engine:
    """One map under way.

    Args:
        maps: The maps of this process.
        work: What to do with each item.
        source: The items.
        terms: How it is to be run.
        retries: When a failed item is tried again.
        members: Gives the workers to use, each time it is asked.
        sink: Takes results: the index of the first, and the list.
        known: The name under which workers keep the work, and those that have it; None: a new one.
    """

    def __init__(
        self,
        maps: Maps,
        work: Work,
        source: Source,
        terms: Terms,
        retries: Retries,
        members: Callable[[], Sequence[int]],
        sink: Callable[[int, list[Any]], None],
        known: tuple[Token, set[int]] | None = None,
    ) -> None:
        self.work = work
        self.function: str = getattr(work.f, "__qualname__", type(work.f).__name__)
        self.backlog = Backlog(source, terms.unit or 1)
        self.drew = False  # an item has asked for random numbers
        self.failures = 0
        self._maps = maps
        self._node = maps.node
        self._now = maps.node.machine.now
        self._source = source
        self._terms = terms
        self._retries = retries
        self._members = members
        self._sink = sink
        self._auto = terms.unit is None
        self._unit = terms.unit or 1
        self._repeats = Repeats(work.f)
        self._sent = SentWork(maps.calls, work, terms.copy, known)
        self._lanes: dict[int, Lane] = {}
        self._gone: list[Lane] = []
        members_of_all, date = maps.node.members, maps.node.machine.time
        self._fitting = Fitting(members_of_all, date, terms.duration)
        self._charges = Charges(self._fitting.excuses)
        self._seconds = maps.timings.learned(work.f) if self._auto and source.is_small else None
        self._arrived: deque[Any] = deque()
        self._waiter: Slot | None = None
        self._stale = True
        self._error: BaseException | None = None
        self._failed_at = 0  # the index of the item that failed
        self._last_death: BaseException | None = None
        self._look_at = NEVER  # when to look at the lanes though nothing has happened

    # What other threads call

    def note(self, what: object) -> None:
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
            self._node.complete(waiter)

    # The life of a map

    def begin(self) -> bool:
        """Find the workers, wait for some that are on their way; tell whether there are any."""
        node, terms = self._node, self._terms
        node.start()
        if terms.patient and not self.backlog.is_empty:
            self._maps.demand.add(self)
            node.await_workers(terms.tag)
        self._maps.add(self)
        self._refresh()
        return any(pid != self._node.me for pid in self._lanes)

    def want(self) -> Want:
        """Tell what of the map waits for workers. Any thread may ask."""
        lanes = list(self._lanes.values())
        waiting, flying = self.backlog.waiting(len(lanes)), sum(lane.items for lane in lanes)
        return Want(waiting, flying, self._fitting.mean or self._seconds, self._terms.tag)

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Go on until all is done, or until there is something to hand out.

        Raises:
            Failure: An item failed, or no worker is left; what was in flight has ended.
        """
        with without_turn(self._node.turns):
            while True:
                while self._arrived:
                    self._file(self._arrived.popleft())
                if self._error is not None:
                    self._end_failed()
                if until is not None and until():
                    self._fill()
                    self._node.progress.nudge()
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
        return self.backlog.is_empty and not self._arrived and not self._is_flying()

    def _is_flying(self) -> bool:
        return any(lane.batches for lane in self._all_lanes())

    def _all_lanes(self) -> Iterator[Lane]:
        yield from self._lanes.values()
        yield from self._gone

    def _wait(self) -> None:
        slot = Slot()
        self._waiter = slot
        if self._arrived or self._stale:
            self._waiter = None
            return
        deadline = min(self._look_at, self.backlog.next_due)
        try:
            lasting = self._seconds is not None and self._seconds > LEAST
            self._node.progress.wait(slot, None if deadline == NEVER else deadline, lasting)
        except TimeoutError:
            pass
        finally:
            self._waiter = None

    def end(self) -> None:
        """Give up what is in flight, and let the workers drop the function."""
        node = self._node
        self._maps.remove(self)
        self._maps.demand.remove(self)
        if self._auto and self._seconds is not None:
            large = any(lane.nbytes for lane in self._all_lanes())
            self._maps.timings.learn(self.work.f, None if large else self._seconds)
        self._sent.end()
        for lane in self._all_lanes():
            idents = [b.ident for b in reversed(lane.batches)]
            for ident in (*idents, *lane.questions):
                node.pending.pop(ident, None)
            lane.batches = []
            lane.questions = []
            peer = node.peers.get(lane.pid)
            if lane.pid == node.me:
                self._maps.batches.take_back(None, node.me, True, idents)
            elif peer is not None and peer.alive:
                tokens = self._sent.to_drop(lane.pid)
                if tokens or idents:
                    peer.send(Forget(tokens, idents))
                    node.progress.soon()
        self._lanes, self._gone = {}, []  # they lead back here, and so to the collections

    def _end_failed(self) -> None:
        """Start nothing new but what is still wanted, and wait for those that run."""
        self._drop_unwanted()
        for lane in self._all_lanes():
            if lane.items > 1:
                self._ask_back(lane, everything=True)
        while self.backlog.has_returned or self._is_flying():
            if self._stale:
                self._refresh()
            self._fill()
            self._wait()
            while self._arrived:
                self._file(self._arrived.popleft())
            self._drop_unwanted()
        raise self._failure()

    def _failure(self) -> Failure:
        """Hand out the error that ends the map; its frames will lead back to this engine."""
        error, self._error, self._last_death = self._error, None, None
        assert error is not None
        return Failure(error)

    def _drop_unwanted(self) -> None:
        self.backlog.drop_from(self._failed_at if self._terms.in_order else 0)

    def _fail(self, error: BaseException, at: int) -> None:
        if self._error is None or (self._terms.in_order and at < self._failed_at):
            self._error = error
            self._failed_at = at

    # Workers

    def _refresh(self) -> None:
        self._stale = False
        node = self._node
        wanted = [p for p in self._members() if is_alive(p, node)]
        for pid in wanted:
            if pid not in self._lanes:
                lane = self._lanes[pid] = Lane(pid, node, self.note)
                lane.told = pid in self._sent.told
                lane.trust(self._seconds)
        for pid, lane in list(self._lanes.items()):
            lane.open = pid in wanted
            if not lane.open and not lane.batches and not is_alive(pid, node):
                del self._lanes[pid]
                self._gone.append(lane)

    # Filling the lanes

    def _fill(self) -> None:
        now = self._now()
        self._look_at = NEVER
        self.backlog.wake(now)
        lanes = [lane for lane in self._lanes.values() if lane.open]
        if not lanes or self._none_for_killers(lanes):
            self._nobody_left()
            return
        hungry, idle = False, self.backlog.is_handed_out and not self._fitting.matters
        rested = [lane for lane in lanes if lane.rests_until <= now]
        for lane in lanes if len(rested) < len(lanes) else ():
            self._look_at = min(self._look_at, max(lane.rests_until, now + LOOK_AGAIN))
        for depth in range(IN_FLIGHT):
            for lane in rested or lanes:
                if len(lane.batches) > depth or (lane.stuck and lane.batches):
                    continue
                part = None if idle else self._next_part(lane, len(lanes))
                if part is None:
                    hungry = hungry or not lane.batches
                    continue
                if not self._send(lane, part):
                    return
        if hungry and not self._is_flying():
            why = self._fitting.fits_nowhere(lane.pid for lane in lanes)
            if why is not None and not self.backlog.is_empty:
                self._fail(ValueError(why), 0)
        self._mind_the_slow(lanes, hungry, now)

    def _none_for_killers(self, lanes: Sequence[Lane]) -> bool:
        """Tell whether items wait that may have ended a worker, and only process 1 is left."""
        return self.backlog.has_killers and all(lane.is_driver for lane in lanes)

    def _nobody_left(self) -> None:
        node = self._node
        if self._is_flying() or self._arrived:
            return
        if self._terms.patient and node.members.awaits(self._terms.tag):
            self._look_at = self._now() + _LOOK_AT_ENDS
        elif not self.backlog.is_empty:
            if self._last_death is None:
                gone = [lane.pid for lane in self._all_lanes()]
                self._last_death = node.members.death(gone[-1] if gone else node.me)
            culprit = self._charges.worst(self.backlog.parts)
            if culprit is None:
                self._fail(self._last_death, 0)
            else:
                self._fail(self._charges.death(self._last_death, culprit), culprit.start)
            self.backlog.drop_from(0)

    def _next_part(self, lane: Lane, lanes: int) -> Part | None:
        size = lane.size(self._unit, self._source.left, lanes, self._seconds)
        if lane.is_driver and self._terms.early:  # it hands nothing over to itself
            size = self._unit
        if self._fitting.matters:
            most = self._fitting.most(lane, self._unit)
            if most is not None:
                if self._fitting.drains(lane, most):
                    self._look_at = min(self._look_at, self._now() + _LOOK_AT_ENDS)
                size = min(size, most)
                if not size:
                    return None
        try:
            return self.backlog.take(size, lanes, lambda part: self._may_run(part, lane))
        except BaseException as exc:  # the user's iterator: its error is this map's
            self._fail(exc, self._source.position)
            return None

    def _may_run(self, part: Part, lane: Lane) -> bool:
        """Tell whether items that came back may go to a worker."""
        return self._is_fit(part, lane) and not (
            self._retries.have_failed_on(part, lane.pid) and self._another_can(part, lane)
        )

    def _is_fit(self, part: Part, lane: Lane) -> bool:
        allowed = not (part.alone and lane.is_driver)  # which gets nothing that may end a worker
        return allowed and self._fitting.may_run(part.start, part.size, lane.pid)

    def _another_can(self, part: Part, lane: Lane) -> bool:
        """Tell whether a worker that is no busier than this one takes an item in its place."""
        now = self._now()
        return any(
            other.pid != lane.pid
            and other.takes_more(now)
            and len(other.batches) <= len(lane.batches)
            and self._is_fit(part, other)
            and self._fitting.most(other, self._unit) != 0
            for other in self._lanes.values()
        )

    def _send(self, lane: Lane, part: Part) -> bool:
        """Put a batch on its way; tell whether the map can go on."""
        node = self._node
        ident = next(node.ids)
        batch = Batch(lane, ident, part, self._now(), self.function)
        lane.last = part.size
        if not lane.batches:
            lane.since = batch.sent
        lane.batches.append(batch)
        unit = 1 if part.alone else self._unit
        seed, early = self._terms.seed, self._terms.early
        order = Order(self._sent.token, ident, unit, part.columns, seed, part.start, early)
        if lane.pid == node.me:
            self._maps.calls.run_here(batch, self.work, order)
            return True
        peer = node.peers[lane.pid]
        try:
            if not lane.told:
                self._sent.deliver(lane, peer)
            payload = codec.dumps(tuple(order))
            self._repeats.look(part.start, part.columns, payload.body)
        except BaseException as exc:  # cannot be pickled: raised here, the others are unharmed
            lane.batches.remove(batch)
            name_unpicklable(exc, part, self.work.f)
            self._fail(exc, part.start)
            return False
        lane.take_size((payload.nbytes - ORDER) / part.size)
        node.pending[ident] = batch
        if payload.buffers and self._terms.copy:
            payload.own()
        self._maps.calls.send(peer, batch, self.work.is_async, payload)
        if not peer.alive:
            node.fail(ident, batch)
        elif self._source.is_lazy:  # the user's iterator comes next, and may take its time
            peer.hurry()
        return True

    # Slow items

    def _mind_the_slow(self, lanes: Sequence[Lane], hungry: bool, now: float) -> None:
        """Take items back from lanes that hold them up, for lanes that could do with them."""
        if len(lanes) < 2:
            return
        for lane in self._lanes.values():
            if not lane.batches:
                continue
            age, single = now - lane.since, lane.items < 2
            overrun = self._auto and age > PATIENCE and not single
            lane.stuck = lane.stuck or overrun
            if not (hungry or overrun):
                if self._auto and not single:  # a single item cannot be taken back
                    self._look_at = min(self._look_at, lane.since + PATIENCE + 0.001)
                continue
            ready_at = lane.may_be_asked_at()
            if now >= ready_at:
                lane.asked = now
                self._ask_back(lane, everything=overrun)
                ready_at = now + PATIENCE
            self._look_at = min(self._look_at, ready_at)

    def _ask_back(self, lane: Lane, everything: bool) -> None:
        node = self._node
        idents = [b.ident for b in reversed(lane.batches)]
        if lane.pid == node.me:
            self._handed_back(lane, self._maps.batches.take_back(None, node.me, everything, idents))
            return
        peer = node.peers.get(lane.pid)
        if peer is None or not peer.alive:
            return
        ident = next(node.ids)
        lane.questions.append(ident)
        node.pending[ident] = Question(lane, ident)
        peer.send(TakeBack(everything, idents), ident)

    def _handed_back(self, lane: Lane, taken: Sequence[tuple[int, int]]) -> None:
        for ident, count in taken:
            batch = next((b for b in lane.batches if b.ident == ident), None)
            if batch is None:
                continue  # it has ended meanwhile, and said itself what it did not run
            part = batch.part
            kept = 0 if count < 0 else part.size - count
            self.backlog.put(part, kept)
            batch.part = part.cut(0, kept, alone=part.alone)
            if count < 0:
                self._node.pending.pop(ident, None)
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
                self._handed_back(lane, messages.decode(TakenBack, what.value[1])[0].items)
            return
        if type(what) is Early:
            self._file_early(what)
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
        if flags & OUTCOME == FAILED:
            raised = _errors.decode_error(bytes(body))
            self._file_error(what.part.cut(0, 1), raised, lane.pid, among=what.part)
            self.backlog.put(what.part, 1)
            return
        nbytes = len(body) + sum(memoryview(b).nbytes for b in buffers)
        try:
            answer = self._maps.calls.read(flags, body, buffers)
        except Exception as exc:  # a result that cannot be unpickled here
            name_part(exc, what.part)
            self._fail(exc, what.part.start)
            return
        if answer is NOT_WANTED:  # the map had ended: this cannot be, unless it has
            return
        if answer is NOT_THERE:
            if lane.shares:
                lane.shares = lane.told = False
            lane.rest()  # until it has been sent the function
            self.backlog.put(what.part, 0)
            return
        self._file_report(lane, what, Report(*answer), nbytes)

    def _file_early(self, early: Early) -> None:
        """File results of a batch that goes on."""
        batch = early.batch
        if batch not in early.lane.batches or early.first != batch.filed:
            return  # some before these were lost on the way: all of them run again
        try:
            results = codec.loads(early.body, early.buffers)
        except Exception as exc:  # a result that cannot be unpickled here
            name_part(exc, batch.part)
            self._fail(exc, batch.part.start)
            return
        part, count = batch.part, len(results)
        batch.part = part.cut(count, part.size, alone=part.alone)
        batch.filed += count
        self.backlog.done += count
        self._sink(part.start, results)

    def _file_report(self, lane: Lane, batch: Batch, report: Report, nbytes: int) -> None:
        part, lacking = batch.part, report.first - batch.filed
        if lacking:  # handed over, but not here
            self.backlog.put(part.cut(0, lacking))
            part = part.cut(lacking, part.size, alone=part.alone)
        lane.on_board = report.on_board
        self.drew = self.drew or report.drew
        ran, error = len(report.results), report.error
        if ran:
            seconds = report.seconds / (report.first + ran + (error is not None))
            lane.take_note(seconds, nbytes / ran)
            self._fitting.note(seconds)
            self._seconds = lane.seconds
            self.backlog.done += ran
            self._sink(part.start, report.results)
        if error is not None:
            self._file_error(part.cut(ran, ran + 1), _errors.decode_error(error), lane.pid)
            ran += 1
        self.backlog.put(part, ran)

    def _file_error(
        self, item: Part, error: BaseException, pid: int, among: Part | None = None
    ) -> None:
        self.failures += 1
        name_part(error, among or item)
        if self._error is not None and not self._terms.in_order:
            return
        try:
            delay = self._retries.delay(item, error, pid)
        except Exception as exc:  # the user's check, or delays
            self._fail(exc, item.start)
            return
        if delay is None:
            self._fail(error, item.start)
        else:
            self.backlog.put_later(self._now() + delay, item)

    def _file_death(self, batch: Batch, first: bool) -> None:
        error, part, lane = batch.error, batch.part, batch.lane
        assert error is not None
        self._stale = True
        self._last_death = error
        if not isinstance(error, ProcessExitedException):
            self._fail(error, part.start)
            return
        lane.open = False
        self._fitting.note_death(lane.pid)
        begin, end = suspects_of(batch, first, self._maps.calls.line_of(batch))
        if error.why == "removed":
            begin = end = 0
        if begin < end:
            suspects = part.cut(begin, end)
            seconds = (self._now() - lane.since) / (batch.filed + begin + 1)
            if not self._may_rerun(suspects, seconds, error):
                return
        self.backlog.put_apart(part, begin, end)

    def _may_rerun(self, suspects: Part, seconds: float, error: ProcessExitedException) -> bool:
        """Charge items with a death, if it is their fault; tell whether they may run again."""
        if self._fitting.excuses(error.pid):
            death: BaseException | None = self._fitting.given_up(suspects, error, seconds)
            if death is None:
                return True
            name_part(death, suspects)
        else:
            hopeless = not self._terms.rerun or "OUT_OF_MEMORY" in error.why
            self.failures += not hopeless
            if self._charges.charge(suspects, error.pid) and not hopeless:
                return True
            death = self._charges.death(error, suspects)
        self._fail(death, suspects.start)
        return False
