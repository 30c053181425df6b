"""What a trace tells in numbers: who was busy, what took long, what was sent where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Event = Mapping[str, Any]

_OURS = "(hpcdist) "
_SLICES_MOST = 40_000  # on the timeline: the longest
_SHOWN = 80  # characters of an event that is none
_MOST = 1e18  # microseconds, or anything else
_NUMBERS = {"pid", "tid", "ts", "dur", "to", "bytes", "records", "queued_us"}
_NEEDED = {  # by phase
    "X": ("pid", "tid", "ts", "dur", "name"),
    "i": ("pid", "ts", "name"),
    "M": ("pid", "name"),
}
_NEEDED_ARGS = ("to", "bytes")  # of messages


class Slice(NamedTuple):
    """Something that took time, in one thread. Times are in microseconds."""

    pid: int
    tid: int
    ts: float
    dur: float
    name: str
    category: str


class Use(NamedTuple):
    """How a process has spent the time of the trace."""

    pid: int
    name: str
    calls: int
    busy: float  # in calls that did not wait
    waiting: float  # in calls that did
    share: float  # of the time that it was busy


class Total(NamedTuple):
    """How often, and how long in all, something was."""

    pid: int
    name: str
    times: int
    total: float
    longest: float


class Pair(NamedTuple):
    """What one process has sent to another."""

    origin: int
    to: int
    messages: int
    size: int


@dataclass
class Summary:
    """What a trace tells."""

    span: float = 0.0
    names: dict[int, str] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    longest: list[Slice] = field(default_factory=list)
    functions: list[Total] = field(default_factory=list)
    waits: list[Total] = field(default_factory=list)
    queued: list[Total] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    hidden: int = 0  # slices that the timeline leaves out
    left_out: int = 0  # records for which there was no room in the trace
    lost: list[tuple[int, float, str]] = field(default_factory=list)


def summarize(events: Iterable[Event], *, most: int = 25) -> Summary:
    """Work out what a trace tells.

    Args:
        events: Those of the file.
        most: How many lines of each kind.

    Raises:
        ValueError: They are no events of a trace.
    """
    made = Summary()
    slices: list[Slice] = []
    waits_of_queue: dict[tuple[int, str], list[float]] = defaultdict(list)
    sent: dict[tuple[int, int], list[int]] = defaultdict(list)
    end = 0.0
    for event in events:
        _check(event)
        phase, category, args = event.get("ph"), event.get("cat"), event.get("args") or {}
        end = max(end, event.get("ts", 0.0) + event.get("dur", 0.0))
        if phase == "M" and event["name"] == "process_name":
            made.names[event["pid"]] = str(args.get("name"))
        elif phase == "X":
            slices.append(_slice(event))
            if category == "call" and not str(event["name"]).startswith(_OURS):
                waits_of_queue[event["pid"], str(event["name"])].append(args.get("queued_us", 0.0))
        elif phase == "i" and category == "message":
            sent[event["pid"], args["to"]].append(args["bytes"])
        elif phase == "i" and "records" in args:
            made.left_out += args["records"]
        elif phase == "i" and event["name"] == "lost":
            made.lost.append((event["pid"], event["ts"], str(args.get("why", ""))))
    made.span = end
    made.uses = _uses(slices, made.names, end)
    shown = [s for s in slices if s.category in ("call", "map") and not s.name.startswith(_OURS)]
    made.longest = sorted(shown, key=lambda s: -s.dur)[:most]
    made.functions = _totals(((0, s.name.partition(": item")[0]), s.dur) for s in shown)[:most]
    made.waits = _totals(((s.pid, s.name), s.dur) for s in slices if s.category == "wait")[:most]
    made.queued = _totals((key, wait) for key, all_ in waits_of_queue.items() for wait in all_)
    made.queued = [total for total in made.queued if total.longest > 1000][:most]
    pairs = (Pair(*key, len(sizes), sum(sizes)) for key, sizes in sent.items())
    made.pairs = sorted(pairs, key=lambda pair: -pair.size)
    kept = sorted(slices, key=lambda s: -s.dur)[:_SLICES_MOST]
    made.slices, made.hidden = sorted(kept, key=lambda s: s.ts), len(slices) - len(kept)
    return made


def _check(event: Event) -> None:
    """Refuse an event that lacks what its kind has, or has no number where one belongs."""
    phase, category, args = event.get("ph"), event.get("cat", ""), event.get("args") or {}
    if isinstance(phase, str) and isinstance(category, str) and isinstance(args, dict):
        needed = _NEEDED.get(phase, ())
        in_args = _NEEDED_ARGS if (phase, category) == ("i", "message") else ()
        if (
            all(name in event for name in needed)
            and all(name in args for name in in_args)
            and all(_is_number(event[name]) for name in _NUMBERS.intersection(event))
            and all(_is_number(args[name]) for name in _NUMBERS.intersection(args))
        ):
            return
    raise ValueError(f"it is no event of a trace: {str(event)[:_SHOWN]}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < _MOST


def _slice(event: Event) -> Slice:
    return Slice(
        event["pid"],
        event["tid"],
        event["ts"],
        event["dur"],
        str(event["name"]),
        str(event.get("cat", "")),
    )


def _totals(parts: Iterable[tuple[tuple[int, str], float]]) -> list[Total]:
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for key, time in parts:
        found[key].append(time)
    made = [Total(*key, len(times), sum(times), max(times)) for key, times in found.items()]
    return sorted(made, key=lambda total: -total.total)


def _uses(slices: Sequence[Slice], names: Mapping[int, str], span: float) -> list[Use]:
    calls: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    waits: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    for each in slices:
        if each.category in ("call", "wait"):
            kind = calls if each.category == "call" else waits
            kind[each.pid, each.tid].append(each)
    uses = []
    for pid, name in sorted(names.items()):
        own = [track for track in calls if track[0] == pid]
        count = sum(len(calls[track]) for track in own)
        running = sum(each.dur for track in own for each in calls[track])
        waiting = sum(_inside(calls[track], waits.get(track, ())) for track in own)
        busy = max(0.0, running - waiting)
        uses.append(Use(pid, name, count, busy, waiting, min(1.0, busy / span) if span else 0.0))
    return uses


def _inside(calls: Sequence[Slice], waits: Sequence[Slice]) -> float:
    """Add up the waits of a thread that lie in its calls; neither overlap among themselves."""
    total, left = 0.0, sorted(calls, key=lambda each: each.ts)
    at = 0
    for wait in sorted(waits, key=lambda each: each.ts):
        while at < len(left) and left[at].ts + left[at].dur < wait.ts:
            at += 1
        if at < len(left) and left[at].ts <= wait.ts:
            total += min(wait.dur, left[at].ts + left[at].dur - wait.ts)
    return total
