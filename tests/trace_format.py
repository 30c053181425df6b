"""The rules of Chrome's "Trace Event Format" for what our traces have, as Perfetto has them."""

from collections import defaultdict
from typing import Any

__all__ = ["faults_of"]

_NUMBER = (int, float)
_NEEDED: dict[str, dict[str, Any]] = {
    "X": {"pid": int, "tid": int, "ts": _NUMBER, "dur": _NUMBER, "name": str, "cat": str},
    "M": {"pid": int, "tid": int, "name": str, "args": dict},
    "i": {"pid": int, "tid": int, "ts": _NUMBER, "name": str, "s": str},
    "b": {"pid": int, "tid": int, "ts": _NUMBER, "name": str, "cat": str, "id": int},
    "e": {"pid": int, "tid": int, "ts": _NUMBER, "name": str, "cat": str, "id": int},
    "s": {"pid": int, "tid": int, "ts": _NUMBER, "name": str, "cat": str, "id": int},
    "f": {"pid": int, "tid": int, "ts": _NUMBER, "name": str, "cat": str, "id": int, "bp": str},
}
_META = {
    "process_name": "name",
    "process_sort_index": "sort_index",
    "thread_name": "name",
}
_ROUNDING = 0.01  # of a microsecond


def faults_of(events: Any) -> list[str]:
    """Say what is wrong with the events of a trace."""
    if not isinstance(events, list):
        return [f"not a list but {type(events).__name__}"]
    found = [fault for event in events for fault in _faults_of_one(event)]
    return found or [*_unpaired(events), *_crossing(events), *_loose_flows(events)]


def _faults_of_one(event: dict[str, Any]) -> list[str]:
    needed = _NEEDED.get(event.get("ph", ""))
    if needed is None:
        return [f"unknown phase: {event}"]
    faults = [
        f"{name} is missing or of another type: {event}"
        for name, kind in needed.items()
        if not isinstance(event.get(name), kind)
    ]
    if event["ph"] == "X" and not faults and event["dur"] < 0:
        faults.append(f"a negative duration: {event}")
    if event["ph"] == "i" and event.get("s") not in ("g", "p", "t"):
        faults.append(f"no such scope: {event}")
    if event["ph"] == "M" and _META.get(event.get("name", ""), "") not in event.get("args", {}):
        faults.append(f"no such metadata: {event}")
    return faults


def _unpaired(events: list[dict[str, Any]]) -> list[str]:
    """Each asynchronous event begins once, and then ends once."""
    open_: dict[Any, float] = {}
    faults = []
    for event in events:
        key = event.get("pid"), event.get("cat"), event.get("id"), event["name"]
        if event["ph"] == "b":
            if key in open_:
                faults.append(f"begins twice: {event}")
            open_[key] = event["ts"]
        elif event["ph"] == "e" and open_.pop(key, float("inf")) > event["ts"]:
            faults.append(f"ends before it begins: {event}")
    return [*faults, *(f"never ends: {key}" for key in open_)]


def _loose_flows(events: list[dict[str, Any]]) -> list[str]:
    """Each arrow has a beginning and an end, no earlier, and both lie in slices."""
    slices: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    faults = []
    ends: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in (e for e in events if e["ph"] in ("s", "f")):
        ends[event["cat"], event["name"], event["id"]].append(event)
        around = slices[event["pid"], event["tid"]]
        if not any(began <= event["ts"] <= ended for began, ended in around):
            faults.append(f"in no slice: {event}")
        if event["ph"] == "f" and event["bp"] != "e":
            faults.append(f"binds to the next slice: {event}")
    for found in ends.values():
        if [event["ph"] for event in sorted(found, key=lambda e: (e["ts"], -ord(e["ph"])))] != [
            "s",
            "f",
        ]:
            faults.append(f"no arrow: {found}")
    return faults


def _crossing(events: list[dict[str, Any]]) -> list[str]:
    """Slices of one thread lie in each other, or apart."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    faults = []
    for slices in threads.values():
        stack: list[dict[str, Any]] = []
        for each in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= each["ts"] + _ROUNDING:
                stack.pop()
            if stack and each["ts"] + each["dur"] > stack[-1]["ts"] + stack[-1]["dur"] + _ROUNDING:
                faults.append(f"{each} crosses {stack[-1]}")
            stack.append(each)
    return faults
