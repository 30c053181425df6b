"""What every process of the cluster is doing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hpcdist._keeper.processes import stat_of
from hpcdist._monitor import output
from hpcdist._numbers import clock
from hpcdist._public import public
from hpcdist._runtime.node import Node
from hpcdist._runtime.running import Runners
from hpcdist._wire import messages
from hpcdist._wire.member import Member
from hpcdist._wire.messages import AskStatus, Condition

_ANSWER = 2.0
_began = time.time()


@public
@dataclass(frozen=True)
class WorkerStatus:
    """One process of the cluster."""

    pid: int
    host: str
    os_pid: int
    manager: str
    job_id: str | None
    world: int | None
    rank: int | None
    state: str
    running: int | None
    queued: int | None
    rss: int | None
    since: float
    tags: tuple[str, ...] = ()
    time_left: float | None = None


class StatusTable(list[WorkerStatus]):
    """A list that prints as a table."""

    def __repr__(self) -> str:
        names = [f.name for f in fields(WorkerStatus)]
        rows = [[_shown(name, getattr(row, name)) for name in names] for row in self]
        widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [names, *rows]
        ]
        return "\n".join(lines)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        names = [f.name for f in fields(WorkerStatus)]
        return html_table(names, [[_shown(name, getattr(r, name)) for name in names] for r in self])


def html_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table for notebooks.

    >>> html_table(["pid", "state"], [[2, "<idle>"]])
    '<table><tr><th>pid</th><th>state</th></tr><tr><td>2</td><td>&lt;idle&gt;</td></tr></table>'
    """
    import html

    def line(kind: str, cells: Iterable[object]) -> str:
        inner = "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    lines = [line("th", heads), *(line("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def without_answer(node: Node, pid: int) -> str:
    """Say of a worker that does not answer whether it is stopped, if that can be seen from here."""
    member = node.members.living.get(pid)
    stopped = member is not None and is_stopped(node, member)
    return "STOPPED" if stopped else "unresponsive"


def is_stopped(node: Node, member: Member) -> bool:
    """Tell whether a worker is stopped, as by SIGSTOP; only of this host it can be seen."""
    if not node.machine.shares_memory or member.host != node.machine.hostname():
        return False
    stat = stat_of(member.os_pid)
    return stat is not None and stat.state in "Tt"


def _shown(name: str, value: Any) -> str:
    if value is None or value == ():
        return "-"
    if name == "tags":
        return ",".join(value)
    if name == "rss":
        return f"{value / 1e6:.0f} MB"
    if name == "since":
        return time.strftime("%H:%M:%S", time.localtime(value))
    if name == "time_left":
        return clock(value)
    return str(value)


def table(node: Node, records: dict[int, Any]) -> StatusTable:
    """Ask every worker how it is."""
    rows = StatusTable([_own(node)])
    asked = []
    for pid in sorted(node.members.living):
        try:
            asked.append((pid, node.request(pid, AskStatus())))
        except Exception:  # it died this moment: then it is not listed
            continue
    deadline = node.machine.now() + _ANSWER
    for pid, slot in asked:
        member = node.members.living.get(pid)
        if member is None:
            continue
        running = queued = rss = None
        try:
            node.wait(slot, max(0.0, deadline - node.machine.now()))
            if slot.error is not None:
                continue
            said, _ = messages.decode(Condition, slot.value[1])
            running, queued, rss = said.running, said.queued, said.rss
            state = "busy" if running else "idle"
            if pid in node.members.draining:
                state = "DRAINING"
        except TimeoutError:
            state = without_answer(node, pid)
        record = records.get(pid)
        config = record.config if record is not None else None
        rows.append(
            WorkerStatus(
                pid,
                member.host,
                member.os_pid,
                member.manager,
                config.job_id if config is not None else None,
                member.world,
                member.rank,
                state,
                running,
                queued,
                rss,
                record.since if record is not None else _began,
                member.tags,
                _left(node, pid),
            )
        )
    return rows


def _own(node: Node) -> WorkerStatus:
    running, queued = node.service(Runners).counts
    state = "busy" if running else "idle"
    return WorkerStatus(
        node.me,
        socket.gethostname(),
        os.getpid(),
        "",
        None,
        None,
        None,
        state,
        running,
        queued,
        output.rss(),
        _began,
        (),
        _left(node, node.me),
    )


def _left(node: Node, pid: int) -> float | None:
    end = node.members.ends.get(pid)
    return None if end is None else max(0.0, end.at - node.machine.time())
