"""The file of a trace: events as Chrome's trace viewer and Perfetto read them.

The format is the "JSON Array Format" of Google's "Trace Event Format". One process of the cluster
is one process there. Its threads hold slices (`X`) that lie in each other; what lies across them,
coroutines and the time in the queue, are asynchronous events (`b`, `e`). Times are in microseconds
since the trace began, on the clock of process 1. Flow events (`s`, `f`) are the arrows from a wait
to the call that is waited for.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from hpcdist._events.records import BATCH, CALL, COROUTINE, SENT, STEP, TURN, WAIT

Event = dict[str, Any]
_MIN_QUEUE = 100_000  # ns: below that a call has not waited, it was on its way
_ENDS_MOST = 100_000
_MESSAGES, _TREES = 1_000_000, 1_000_001  # tracks beside those of threads


class Frame(NamedTuple):
    """What was taken from a process at once, as it lies in the file that grows during a trace."""

    pid: int
    offset: int  # of its clock, to be taken off its times
    left_out: int
    records: bytes


class Person(NamedTuple):
    """A process, as it is shown."""

    pid: int
    name: str


class Ended(NamedTuple):
    """A process that has died during the trace."""

    pid: int
    at: int
    why: str


_Key = tuple[int, int]  # of a call: its caller, and the id it has there


class _Place(NamedTuple):
    """Where a slice is, from when to when."""

    pid: int
    tid: int
    began: float
    ended: float


class _Arrows:
    """Brings together the two ends of arrows, a wait and the call it is for, as they come.

    A call nobody waits for has no arrow: of ends that stay alone only the last are kept.
    """

    def __init__(self) -> None:
        self._waits: dict[_Key, _Place] = {}
        self._calls: dict[_Key, _Place] = {}
        self._ids = 0

    def wait(self, key: _Key, wait: _Place) -> Iterator[Event]:
        """Take a wait; yield the arrow, if the call has come."""
        call = self._calls.pop(key, None)
        if call is None:
            _keep(self._waits, key, wait)
        else:
            yield from self._arrow(wait, call)

    def call(self, key: _Key, call: _Place) -> Iterator[Event]:
        """Take a call; yield the arrow, if a wait for it has come."""
        wait = self._waits.pop(key, None)
        if wait is None:
            _keep(self._calls, key, call)
        else:
            yield from self._arrow(wait, call)

    def _arrow(self, wait: _Place, call: _Place) -> Iterator[Event]:
        end = max(wait.began, call.began)  # an arrow does not point back in time
        if end >= min(wait.ended, call.ended):  # the wait began when the call had ended
            return
        self._ids += 1
        for phase, place, at in (("s", wait, wait.began), ("f", call, end)):
            made = {
                "ph": phase,
                "pid": place.pid,
                "tid": place.tid,
                "id": self._ids,
                "ts": at,
                "name": "call",
                "cat": "flow",
            }
            yield made | {"bp": "e"} if phase == "f" else made  # it ends in the slice it lies in


def _keep(ends: dict[_Key, _Place], key: _Key, end: _Place) -> None:
    ends.setdefault(key, end)
    if len(ends) > _ENDS_MOST:
        del ends[next(iter(ends))]


class _Plain(pickle.Unpickler):
    """Reads what a trace has, and nothing else: the file may come from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        kinds = {kind.__name__: kind for kind in (Frame, Person, Ended)}
        if module != __name__ or name not in kinds:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a trace")
        return kinds[name]


def read_spool(file: BinaryIO) -> Iterator[Any]:
    """Yield what was written, up to where the writing was broken off."""
    while True:
        try:
            yield _Plain(file).load()
        except Exception:  # bytes that were never pickled may raise anything
            return


class Converter:
    """Turns frames into events.

    Args:
        base: When the trace began, by the clock of process 1.
    """

    def __init__(self, base: int) -> None:
        self._base = base
        self._threads: dict[tuple[int, int], int] = {}
        self._known: set[tuple[int, int]] = set()  # tracks that have a name
        self._left_out: Counter[int] = Counter()
        self._arrows = _Arrows()
        self._ids = 0
        self._shapes: dict[int, Callable[[int, int, tuple[Any, ...]], Iterator[Event]]] = {
            CALL: self._call,
            WAIT: self._wait,
            TURN: self._turn,
            SENT: self._sent,
            STEP: self._step,
            BATCH: self._batch,
            COROUTINE: self._coroutine,
        }

    def events(self, frame: Any) -> Iterator[Event]:
        """Yield the events of a frame."""
        if isinstance(frame, Person):
            yield _meta(frame.pid, 0, "process_name", name=frame.name)
            yield _meta(frame.pid, 0, "process_sort_index", sort_index=frame.pid)
        elif isinstance(frame, Ended):
            at = (frame.at - self._base) / 1000
            yield _instant(frame.pid, 0, at, "lost", "g", why=frame.why)
        elif isinstance(frame, Frame):
            self._left_out[frame.pid] += frame.left_out
            shift = frame.offset + self._base
            for record in _Plain(io.BytesIO(frame.records)).load():
                yield from self._shapes[record[0]](frame.pid, shift, record)

    def last(self) -> Iterator[Event]:
        """Yield what tells how much was left out."""
        for pid, count in sorted(self._left_out.items()):
            if count:
                yield _instant(pid, 0, 0.0, f"{count} records left out", "p", records=count)

    def _track(self, pid: int, track: int, name: str) -> Iterator[Event]:
        if (pid, track) not in self._known:
            self._known.add((pid, track))
            yield _meta(pid, track, "thread_name", name=name)

    def _thread(self, pid: int, thread: int) -> int:
        found = self._threads.get((pid, thread))
        if found is None:
            found = 1 + sum(owner == pid for owner, _ in self._threads)
            self._threads[pid, thread] = found
        return found

    def _slice(
        self, pid: int, shift: int, thread: int, began: int, ended: int, name: str, category: str
    ) -> Event:
        return {
            "ph": "X",
            "pid": pid,
            "tid": self._thread(pid, thread),
            "ts": (began - shift) / 1000,
            "dur": max(0, ended - began) / 1000,
            "name": name,
            "cat": category,
            "args": {},
        }

    def _across(
        self, pid: int, shift: int, began: int, ended: int, name: str, category: str
    ) -> Iterator[Event]:
        self._ids += 1
        for phase, at in (("b", began), ("e", ended)):
            yield {
                "ph": phase,
                "pid": pid,
                "tid": 0,
                "id": self._ids,
                "ts": (at - shift) / 1000,
                "name": name,
                "cat": category,
                "args": {},
            }

    def _call(self, pid: int, shift: int, record: tuple[Any, ...]) -> Iterator[Event]:
        _, thread, queued, began, ended, name, shown, caller, ident = record
        yield from self._track(pid, self._thread(pid, thread), "calls")
        made = self._slice(pid, shift, thread, began, ended, name, "call")
        made["args"] = {"caller": caller, "queued_us": (began - queued) / 1000}
        if shown is not None:
            made["args"]["arguments"] = shown
        yield made
        if ident:
            yield from self._arrows.call((caller, ident), _place(made))
        if began - queued > _MIN_QUEUE:
            yield from self._across(pid, shift, queued, began, f"{name} is queued", "queued")

    def _wait(self, pid: int, shift: int, record: tuple[Any, ...]) -> Iterator[Event]:
        _, thread, began, ended, where, called, caller, ident = record
        yield from self._track(pid, self._thread(pid, thread), "calls")
        what = f"wait for {where}" if where else "wait"
        name = f"{what}: {called}" if called else what
        made = self._slice(pid, shift, thread, began, ended, name, "wait")
        made["args"] = {"for": where, "called": called}
        yield made
        if ident:
            yield from self._arrows.wait((caller, ident), _place(made))

    def _turn(self, pid: int, shift: int, record: tuple[Any, ...]) -> Iterator[Event]:
        _, thread, began, ended = record
        yield self._slice(pid, shift, thread, began, ended, "wait for a turn", "wait")

    def _sent(self, pid: int, shift: int, record: tuple[Any, ...]) -> Iterator[Event]:
        _, at, to, size = record
        yield from self._track(pid, _MESSAGES, "messages")
        at_us = (at - shift) / 1000
        made = _instant(pid, _MESSAGES, at_us, f"to {to}", "t", to=to, bytes=size)
        made["cat"] = "message"
        yield made

    def _step(self, pid: int, shift: int, record: tuple[Any, ...]) -> Iterator[Event]:
        _, at, step, origin, size = record
        yield from self._track(pid, _TREES, "tree steps")
        at_us = (at - shift) / 1000
        made = _instant(pid, _TREES, at_us, step.lower(), "t", bytes=size)
        made["cat"], made["args"]["from"] = "tree", origin
        yield made

    def _batch(self, pid: int, shift: int, record: tuple[Any, ...]) -> Iterator[Event]:
        _, thread, began, ended, name, first, count = record
        items = f"item {first}" if count == 1 else f"items {first} to {first + count - 1}"
        made = self._slice(pid, shift, thread, began, ended, f"{name}: {items}", "map")
        made["args"] = {"first": first, "items": count, "function": name}
        yield made

    def _coroutine(self, pid: int, shift: int, record: tuple[Any, ...]) -> Iterator[Event]:
        _, _, began, ended, name, caller = record
        for event in self._across(pid, shift, began, ended, name, "coroutine"):
            event["args"] = {"caller": caller}
            yield event


def _place(made: Event) -> _Place:
    return _Place(made["pid"], made["tid"], made["ts"], made["ts"] + made["dur"])


def _meta(pid: int, tid: int, kind: str, **args: Any) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": kind, "args": args}


def _instant(pid: int, tid: int, at: float, name: str, scope: str, **args: Any) -> Event:
    return {
        "ph": "i",
        "pid": pid,
        "tid": tid,
        "ts": at,
        "s": scope,
        "name": name,
        "cat": "note",
        "args": args,
    }


def convert(spool: BinaryIO) -> Iterator[str]:
    """Yield the text of a trace's file, in pieces, from what was written during the trace.

    Raises:
        ValueError: It is no such file.
    """
    frames = read_spool(spool)
    base = next(frames, None)
    if not isinstance(base, int):
        raise ValueError("it is no trace of hpcdist's")
    converter = Converter(base)
    yield "[\n"
    comma = ""
    for frame in frames:
        try:
            lines = [json.dumps(event) for event in converter.events(frame)]
        except Exception as exc:  # somebody else has pickled it: it may hold anything
            raise ValueError("it is no trace of hpcdist's") from exc
        for line in lines:
            yield comma + line
            comma = ",\n"
    for event in converter.last():
        yield comma + json.dumps(event)
        comma = ",\n"
    yield "\n]\n"
