"""Records: what happens in a process, noted for a trace while one goes on.

A record is a plain tuple, as there may be a hundred thousand a second; the first leaf says which
kind it is. Times are those of the process's own clock, in nanoseconds. There is room for some; what
comes while there is none is left out, and counted.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any

from hpcdist._events.taps import Taps
from hpcdist._maps.map_worker import Batches
from hpcdist._remote.answers import Answers
from hpcdist._remote.futures import Future
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.running import Runner, Runners
from hpcdist._transport.router import Peer
from hpcdist._wire import messages
from hpcdist._wire.frames import OK
from hpcdist._wire.messages import Chunk, Down, LastRecords, StartRecording, Taken, TakeRecords, Up

CALL = 0  # thread, queued at, started, ended, function, arguments or None, its caller, its id
# Thread, from, to, the process waited for (0: something here), the function called there; and of
# that call the caller and the id, as far as they are known, else 0.
WAIT = 1
TURN = 2  # thread, from, to: a call has waited, and now waits for its turn
SENT = 3  # at, to whom, bytes
STEP = 4  # at, which step of a tree, from whom, bytes
BATCH = 5  # thread, from, to, function, the index of the first item, how many items
COROUTINE = 6  # id, from, to, function, its caller

OURS = "(hpcdist) "  # what names of our own functions begin with
_ROOM = 50_000  # records, some 8 MB: process 1 takes them several times a second
_QUEUE_MOST = 100_000
_LONGEST = 200  # characters of arguments
_MIN_TURN = 20_000  # ns: a turn that is had at once is no wait
_LOOKED_AT = 16  # calls under way
_ident = threading.get_ident
Goal = tuple[int, str, int, int]  # the leaves of a wait behind its times
_NO_GOAL: Goal = (0, "", 0, 0)
Note = Callable[[tuple[Any, ...]], None]


class Recorder(Service):
    """Notes what happens in this process."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._functions = node.service(Answers).functions
        self._runners = node.service(Runners)
        self._batches = node.service(Batches)
        self._clock = node.machine.clock
        self._taps = Taps()
        # The same list all the time: whoever notes something has it at hand.
        self.records: list[tuple[Any, ...]] = []
        self._left_out = 0
        self._goes_on = False
        self._under_way: Callable[[], list[tuple[Any, ...]]] = list
        node.on_join.append(self._on_join)

    @on(StartRecording)
    def _on_start(self, said: StartRecording, mail: Mail) -> None:
        self.start(arguments=said.arguments)

    @on(TakeRecords)
    def _on_take(self, said: TakeRecords, mail: Mail) -> None:
        left_out, blob = self.take_last() if said.last else self.take()
        if said.last:
            self.stop()
        taken = Taken(self._clock(), boot(), left_out)
        self.node.reply(mail.peer, mail.ident, OK, messages.encode(taken), [blob])
        mail.peer.sent -= len(blob)  # what a trace sends is not of the program
        self.node.progress.soon()

    def start(self, *, arguments: bool) -> None:
        """Note what happens from now on."""
        if self._goes_on:
            return
        self._goes_on = True
        self._under_way = _tap_calls(self, arguments)
        _tap_waits(self)
        for name in ("stop", "drop_queue") if self.node.me != 1 else ():  # as it leaves, or parks
            self._taps.method(self.node.turns, name, self._leaving)
        for peer in list(self.node.peers.values()):
            _tap_peer(self._taps, peer, self._clock, self.note)
        for kind in (Down, Up, Chunk):
            if (number := messages.NUMBERS[kind]) in self.node.handlers:
                self._taps.entry(self.node.handlers, number, self._step(kind.__name__))

    def stop(self) -> None:
        """Note nothing more."""
        self._goes_on = False
        self._taps.remove()

    def note(self, record: tuple[Any, ...]) -> None:
        """Keep a record, if there is room."""
        if len(self.records) < _ROOM:
            self.records.append(record)
        else:
            self.leave_out()

    def leave_out(self) -> None:
        """Count a record for which there is no room."""
        self._left_out += 1

    def take(self) -> tuple[int, bytes]:
        """Hand out how many records were left out, and those that are kept, pickled."""
        records = self.records[:]
        del self.records[: len(records)]  # others may have come meanwhile
        left_out, self._left_out = self._left_out, 0
        return left_out, pickle.dumps(records, 5)

    def take_last(self) -> tuple[int, bytes]:
        """Hand out all that is kept, and what is known of calls that have not been noted yet.

        Such a call may have been answered just now, and its caller may know it.
        """
        for record in self._under_way():
            self.note(record)
        return self.take()

    def _leaving(self, inner: Any) -> Any:
        def leave() -> None:
            left_out, blob = self.take_last()
            master = self.node.peers.get(1)
            if master is not None and master.alive:
                master.send(LastRecords(self._clock(), left_out), 0, b"", [blob])
            inner()

        return leave

    def _on_join(self, pid: int) -> None:
        peer = self.node.peers.get(pid)
        if self._goes_on and peer is not None and "flush" not in vars(peer):
            _tap_peer(self._taps, peer, self._clock, self.note)

    def _step(self, name: str) -> Callable[[Any], Any]:
        def wrapper(inner: Any) -> Any:
            def handle(peer: Peer, ident: int, body: Any, buffers: Any) -> None:
                size = len(body) + sum(memoryview(buffer).nbytes for buffer in buffers)
                self.note((STEP, self._clock(), name, peer.pid, size))
                inner(peer, ident, body, buffers)

            return handle

        return wrapper


def boot() -> str:
    """Tell this boot of this host from all others; "": nothing does."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _tap_calls(recorder: Recorder, arguments: bool) -> Callable[[], list[tuple[Any, ...]]]:
    """Note calls as they end; return what makes records of those that are under way."""
    clock, note, node = recorder._clock, recorder.note, recorder.node
    functions, taps = recorder._functions, recorder._taps
    records, unheard = recorder.records, ("", None)
    queued: dict[int, int] = {}  # when calls were, by the identity of each
    heard: dict[int, tuple[str, str | None]] = {}  # by thread: the function of the call it runs
    # By thread: the call it runs, when that was queued, and when it began.
    running: dict[int, tuple[Any, int, int] | None] = {}
    coroutines: dict[int, tuple[int, int]] = {}  # those that run: by identity, number and start

    def submit(inner: Any) -> Any:
        def submitted(call: Any) -> None:
            if len(queued) < _QUEUE_MOST:
                queued[id(call)] = clock()
            inner(call)

        return submitted

    def run(inner: Any) -> Any:
        def ran(call: Any) -> None:
            me, began = _ident(), clock()
            since = queued.pop(id(call), began)
            running[me] = entry = call, since, began
            try:
                inner(call)
            finally:
                has_room = len(records) < _ROOM
                ended = record(me, *entry, *heard.get(me, unheard))
                # No calls, so one act: `under_way` has noted it, or finds it noted.
                if running[me] is entry:
                    running[me] = None
                    if has_room:
                        records[2 * _ROOM :] = (ended,)
                    else:
                        recorder.leave_out()
                heard.pop(me, None)

        return ran

    def record(
        thread: int, call: Any, since: int, began: int, name: str, shown: str | None
    ) -> tuple[Any, ...]:
        ended = clock()
        name = name or functions.name_of(call.aux) or "?"
        caller = node.me if call.peer is None else call.peer.pid
        return CALL, thread, since, began, ended, name, shown, caller, call.ident

    def under_way() -> list[tuple[Any, ...]]:
        found = []
        for me, entry in running.copy().items():  # others go on meanwhile
            if entry is not None:
                so_far = record(me, *entry, *heard.get(me, unheard))
                if running[me] is entry:  # and the next line: one act, as above
                    running[me] = None
                    found.append(so_far)
        return found

    def unpack(inner: Any) -> Any:
        def unpacked(call: Any) -> Any:
            found = inner(call)
            name = _name(found[0])
            shown = _shown(found) if arguments and not name.startswith(OURS) else None
            heard[_ident()] = name, shown
            return found

        return unpacked

    def start(inner: Any) -> Any:
        def started(call: Any) -> None:
            if len(coroutines) < _QUEUE_MOST:
                coroutines[id(call)] = next(node.ids), clock()
            inner(call)

        return started

    def end(inner: Any) -> Any:
        def ended(call: Any, value: object, error: BaseException | None) -> None:
            ident, began = coroutines.pop(id(call), (0, 0))
            if ident:
                caller = node.me if call.peer is None else call.peer.pid
                name = functions.name_of(call.aux) or "a coroutine"
                note((COROUTINE, ident, began, clock(), name, caller))
            inner(call, value, error)

        return ended

    taps.method(node.turns, "submit", submit)
    taps.method(node.turns, "_run", run)
    for runner in recorder._runners.all:
        _tap_runner(taps, runner, unpack, start, end)
    taps.method(recorder._batches, "perform", _batch(clock, note))
    return under_way


def _tap_runner(taps: Taps, runner: Runner, unpack: Any, start: Any, end: Any) -> None:
    taps.method(runner, "_unpack", unpack)
    for name in ("start", "_go_on"):
        taps.method(runner, name, start if name == "start" else _going_on(start))
    taps.method(runner, "_end", end)


def _going_on(start: Any) -> Any:
    """Make of what notes a coroutine's start what notes that of one which a function returned."""

    def wrapper(inner: Any) -> Any:
        def going_on(call: Any, coroutine: Any) -> None:
            start(lambda same: inner(same, coroutine))(call)

        return going_on

    return wrapper


def _batch(clock: Callable[[], int], note: Note) -> Any:
    def wrapper(inner: Any) -> Any:
        def performed(work: Any, order: Any) -> Any:
            began = clock()
            out = inner(work, order)
            done = len(out.results)
            note((BATCH, _ident(), began, clock(), _name(work.f), order.start, done))
            return out

        return performed

    return wrapper


def _tap_waits(recorder: Recorder) -> None:
    clock, note, node = recorder._clock, recorder.note, recorder.node
    turns, records = node.turns, recorder.records
    suspended: dict[int, tuple[int, Goal]] = {}  # by thread: since when, and what it waits for

    def wait(inner: Any) -> Any:
        def waited(slot: Any, timeout: float | None = None) -> None:
            me = _ident()
            if slot.ready or me in turns.calls:  # a call that waits is suspended
                inner(slot, timeout)
                return
            began, goal = clock(), _goal(node, slot)
            try:
                inner(slot, timeout)
            finally:
                if len(records) < _ROOM:
                    records.append((WAIT, me, began, clock(), *goal))
                else:
                    recorder.leave_out()

        return waited

    def suspend(inner: Any) -> Any:
        def suspended_(call: Any, slot: Any) -> None:
            suspended[_ident()] = clock(), _goal(node, slot)
            inner(call, slot)

        return suspended_

    def resume(inner: Any) -> Any:
        def resumed(call: Any) -> None:
            me, over = _ident(), clock()
            began, goal = suspended.pop(me, (over, _NO_GOAL))
            try:
                inner(call)
            finally:
                note((WAIT, me, began, over, *goal))
                now = clock()
                if now - over > _MIN_TURN:
                    note((TURN, me, over, now))

        return resumed

    recorder._taps.method(node, "wait", wait)
    recorder._taps.method(turns, "suspend", suspend)
    recorder._taps.method(turns, "resume", resume)


def _goal(node: Node, slot: Any) -> Goal:
    """Tell what is waited for; of a call which it is, if it is among the last that were made."""
    where, called = getattr(slot, "where", 0), getattr(slot, "called", "")
    if not called:
        return where, called, 0, 0
    if isinstance(slot, Future):
        return where, called, slot.whence, slot.id
    with suppress(RuntimeError):  # another thread makes a call at this moment
        for ident, waiting in islice(reversed(node.pending.items()), _LOOKED_AT):
            if waiting is slot:
                return where, called, node.me, ident
    return where, called, 0, 0


def _tap_peer(taps: Taps, peer: Peer, clock: Callable[[], int], note: Note) -> None:
    """Note what is sent to a process: by how much the count of bytes has grown."""
    known, pid = peer.sent, peer.pid

    def wrapper(inner: Any) -> Any:
        def sent(*args: Any) -> None:
            nonlocal known
            inner(*args)
            total = peer.sent
            if total > known:
                note((SENT, clock(), pid, total - known))
            known = total

        return sent

    for name in ("flush", "dispatch", "answer"):
        taps.method(peer, name, wrapper)


def _name(f: Any) -> str:
    name: str = getattr(f, "__qualname__", None) or type(f).__qualname__
    home = getattr(f, "__module__", None)
    return OURS + name if isinstance(home, str) and home.startswith("hpcdist._") else name


def _shown(found: Any) -> str:
    _, args, kw = found
    try:
        parts = [*map(repr, args), *(f"{name}={value!r}" for name, value in kw.items())]
    except Exception as exc:  # the user's `__repr__`
        return f"({type(exc).__name__} in a repr)"
    text = ", ".join(parts)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
