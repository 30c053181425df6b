"""What `hpcdist top` shows: lines of text, from what a driver shows of itself."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hpcdist._numbers import clock

Row = dict[str, Any]


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        worth: The least of these goes first where a terminal is narrow.
    """

    title: str
    text: Callable[[Row], str]
    right: bool
    worth: int


def size(count: float | None) -> str:
    """Write a number of bytes.

    >>> size(None), size(999), size(1234567), size(5e9)
    ('-', '999', '1.2M', '5.0G')
    """
    if count is None:
        return "-"
    for letter in ("", "k", "M", "G", "T"):
        if count < 999.5 or letter == "T":
            break
        count /= 1000
    return f"{count:.0f}{letter}" if not letter or count >= 99.5 else f"{count:.1f}{letter}"


def _age(row: Row) -> str:
    age = row["age"]
    if age is None:
        return "-"
    return f"{age:.1f}s" if age < 60 else clock(age)


def _call(row: Row) -> str:
    more = (row["running"] or 0) - 1
    name = row["call"] or ("(a coroutine)" if row["running"] else "-")
    return f"{name} +{more}" if more > 0 else str(name)


def _number(row: Row, name: str) -> str:
    return "-" if row[name] is None else f"{row[name]:.0f}"


_COLUMNS = (
    Column("PID", lambda row: str(row["pid"]), True, 9),
    Column("STATE", lambda row: str(row["state"]), False, 7),
    Column("CALL", _call, False, 8),
    Column("AGE", _age, True, 6),
    Column("QUEUE", lambda row: _number(row, "queued"), True, 4),
    Column("CPU%", lambda row: _number(row, "cpu"), True, 5),
    Column("MEM", lambda row: size(row["rss"]), True, 3),
    Column("IN/s", lambda row: size(row["bytes_in_rate"]), True, 1),
    Column("OUT/s", lambda row: size(row["bytes_out_rate"]), True, 2),
    Column("IN", lambda row: size(row["bytes_in"]), True, 0),
    Column("OUT", lambda row: size(row["bytes_out"]), True, 0),
)
_MAPS_MOST = 5
_CALL_MOST = 30
_CALL_LEAST = 8

SORTS: dict[str, Callable[[Row], Any]] = {
    "pid": lambda row: row["pid"],
    "cpu": lambda row: -(row["cpu"] or 0),
    "mem": lambda row: -(row["rss"] or 0),
    "age": lambda row: -(row["age"] or 0),
    "queue": lambda row: -(row["queued"] or 0),
    "bytes": lambda row: -(row["bytes_in_rate"] + row["bytes_out_rate"]),
}


def page(
    seen: dict[str, Any],
    width: int | None = None,
    *,
    height: int | None = None,
    sort: str = "pid",
    word: str = "",
) -> list[str]:
    """Lay the picture out as lines.

    Args:
        seen: What the driver shows.
        width: No line is longer; None: as long as they are.
        height: Where the lines would be more, groups of workers are one line each.
        sort: One of `SORTS`.
        word: Only workers in whose line, or whose host's and job's, it occurs.
    """
    rows = sorted(seen["workers"], key=SORTS[sort])
    head = [*_head(seen, rows), *_jobs(seen["jobs"]), *_maps(seen.get("maps", ()))]
    groups = _groups(rows)
    if word:
        groups = {
            group: kept
            for group, members in groups.items()
            if (kept := [row for row in members if word in _all_text(group, row)])
        }
    rows = [seen["driver"], *(row for members in groups.values() for row in members)]
    folded = height is not None and len(head) + 2 + len(rows) + len(groups) > height
    columns, widths = _fit(rows, width)
    lines = [*head, "", _line(widths, [c.title for c in columns], columns)]
    lines.append(_line(widths, _texts(columns, seen["driver"]), columns))
    for group, members in groups.items():
        lines.append(_group_line(group, members))
        if not folded:
            lines += [_line(widths, _texts(columns, row), columns) for row in members]
    if folded:
        lines.append(f"({len(rows) - 1} workers in {len(groups)} groups: a taller terminal, or")
        lines.append(" a filter, shows each; hpcdist top --once lists all)")
    return [line if width is None else line[:width] for line in lines]


def _head(seen: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    driver = seen["driver"]
    states = Counter(row["state"] for row in rows)
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    moment = time.strftime("%H:%M:%S", time.localtime(seen["at"]))
    workers = f"{len(rows)} worker{'s' if len(rows) != 1 else ''}"
    return [
        f"{moment}  {workers}{': ' if counted else ''}{counted}",
        f"driver {driver['os_pid']} on {driver['host']}: {driver['command']}",
    ]


def _jobs(jobs: Sequence[Row]) -> list[str]:
    lines = []
    for job in jobs:
        wanted = "" if job["wanted"] is None else f" of {job['wanted']}"
        reason = f" ({job['reason']})" if job["reason"] else ""
        left = "" if job["time_left"] is None else f", {clock(job['time_left'])} left"
        name = job["job_id"] or "(being submitted)"
        lines.append(f"job {name} {job['state']}{reason}: {job['workers']}{wanted} workers{left}")
    return lines


def _maps(maps: Sequence[Row]) -> list[str]:
    lines = []
    for each in maps[:_MAPS_MOST]:
        total, share = each["total"], ""
        if total:
            share = f" {100 * each['done'] // total}%"
        of = "" if total is None else f" of {total:,}"
        to_go = "" if each["to_go"] is None else f", {clock(each['to_go'])} to go"
        failures = f", {each['failures']} failures" if each["failures"] else ""
        lines.append(
            f"map {each['function']}{share}: {each['done']:,}{of}, "
            f"{each['rate']:.3g} a second{to_go}, {each['workers']} workers{failures}"
        )
    if len(maps) > _MAPS_MOST:
        lines.append(f"({len(maps) - _MAPS_MOST} more maps)")
    return lines


Group = tuple[str, str | None]  # host and job


def _groups(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["host"], row["job_id"]), []).append(row)
    return groups


def _group_line(group: Group, rows: Sequence[Row]) -> str:
    host, job = group
    lefts = [row["time_left"] for row in rows if row["time_left"] is not None]
    left = f", {clock(min(lefts))} left" if lefts else ""
    name = host if job is None else f"{host}, job {job}{left}"
    states = Counter(row["state"] for row in rows)
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    cpu = sum(row["cpu"] or 0 for row in rows)
    rss = sum(row["rss"] or 0 for row in rows)
    queued = sum(row["queued"] or 0 for row in rows)
    into = sum(row["bytes_in_rate"] for row in rows)
    out = sum(row["bytes_out_rate"] for row in rows)
    waiting = f", {queued} queued" if queued else ""
    return (
        f"-- {name}: {counted}{waiting}, CPU {cpu:.0f}%, {size(rss)}B, "
        f"{size(into)}B/s in, {size(out)}B/s out"
    )


def _all_text(group: Group, row: Row) -> str:
    texts = [str(row["pid"]), str(row["state"]), _call(row), group[0], group[1] or "", *row["tags"]]
    return " ".join(texts)


def _texts(columns: Sequence[Column], row: Row) -> list[str]:
    return [column.text(row) for column in columns]


def _fit(rows: Sequence[Row], width: int | None) -> tuple[list[Column], list[int]]:
    """Choose the columns that fit, the dearest first, and their widths."""
    columns = list(_COLUMNS)
    while True:
        widths = [
            max(len(column.title), *(len(column.text(row)) for row in rows)) for column in columns
        ]
        call = next((k for k, column in enumerate(columns) if column.title == "CALL"), None)
        if call is not None:
            widths[call] = min(widths[call], _CALL_MOST)
        if width is None:
            return columns, widths
        over = sum(widths) + 2 * len(widths) - 2 - width
        if over <= 0 or len(columns) == 1:
            return columns, widths
        if call is not None and widths[call] - over >= _CALL_LEAST:
            widths[call] -= over
            return columns, widths
        columns.remove(min(reversed(columns), key=lambda column: column.worth))


def _line(widths: Sequence[int], texts: Sequence[str], columns: Sequence[Column]) -> str:
    cells = [
        text.rjust(width) if column.right else text[:width].ljust(width)
        for width, text, column in zip(widths, texts, columns, strict=True)
    ]
    return "  ".join(cells).rstrip()
