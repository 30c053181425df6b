"""What every process of the cluster is doing."""

from __future__ import annotations

import os
import pickle
import socket
import time
from dataclasses import dataclass, fields
from typing import Any

from hpcdist._monitor import output
from hpcdist._remote import calls
from hpcdist._runtime.controls import STATUS
from hpcdist._runtime.node import node

_ANSWER = 2.0
_began = time.time()


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


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "rss":
        return f"{value / 1e6:.0f} MB"
    if name == "since":
        return time.strftime("%H:%M:%S", time.localtime(value))
    return str(value)


def table(records: dict[int, Any]) -> StatusTable:
    """Ask every worker how it is."""
    rows = StatusTable([_own()])
    asked = []
    for pid in sorted(node.members.living):
        try:
            asked.append((pid, node.request(pid, STATUS, None)))
        except Exception:  # it died this moment: then it is not listed
            continue
    deadline = time.monotonic() + _ANSWER
    for pid, slot in asked:
        member = node.members.living.get(pid)
        if member is None:
            continue
        running = queued = rss = None
        state = "unresponsive"
        try:
            node.wait(slot, max(0.0, deadline - time.monotonic()))
            if slot.error is not None:
                continue
            running, queued, rss = pickle.loads(slot.value[1])
            state = "busy" if running else "idle"
        except TimeoutError:
            pass
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
            )
        )
    return rows


def _own() -> WorkerStatus:
    running, queued = calls.counts()
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
    )
