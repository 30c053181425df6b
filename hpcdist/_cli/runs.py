"""The runs of this user, from the manifests in their folders, and what became of their jobs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hpcdist._cli.schedulers import NoScheduler, find, manager_of
from hpcdist._managers.batch.following import exit_verdict
from hpcdist._managers.batch.job import JobId, read_manifests
from hpcdist._managers.batch.verdict import JobState, Verdict, merge


@dataclass(frozen=True)
class Run:
    """One job of ours.

    Attributes:
        exit_folder: Where its script tells how it ended.
    """

    job: JobId
    scheduler: str
    name: str
    folder: str
    exit_folder: str
    size: str
    what: str
    since: datetime


def runs() -> list[Run]:
    """Return all jobs of ours whose folders are still there, the oldest first."""
    return [run for facts in read_manifests() for run in _runs_of(facts)]


def _runs_of(facts: dict[str, Any]) -> list[Run]:
    jobs: list[JobId] = list(dict.fromkeys(facts["jobs"]))
    program = facts.get("kind") == "program"
    each = int(facts.get("n", 0)) // max(1, len(jobs))
    folder = str(facts.get("folder", ""))
    return [
        Run(
            job,
            str(facts.get("scheduler", "")),
            str(facts.get("name", "")),
            folder,
            _exit_folder(folder, job),
            f"{each} {'ranks' if program else 'workers'}",
            str(facts.get("what", "")) if program else _driver(facts),
            datetime.fromtimestamp(float(facts.get("when", 0)), UTC).astimezone(),
        )
        for job in jobs
    ]


def _exit_folder(folder: str, job: JobId) -> str:
    _, _, task = job.partition("_")
    return os.path.join(folder, "tasks", task) if task.isdigit() else folder


def _driver(facts: dict[str, Any]) -> str:
    host, pid = facts.get("host"), facts.get("pid")
    here = "" if host == socket.gethostname() else f" on {host}"
    return f"of process {pid}{here}"


def verdicts(found: Sequence[Run]) -> dict[Run, Verdict | None]:
    """Ask for the states of jobs: one question a scheduler, and one for those it has forgotten.

    Raises:
        CommandFailed, CommandLate, CommandMissing: There was no answer.
    """
    known: dict[Run, Verdict | None] = {}
    for name in dict.fromkeys(run.scheduler for run in found):
        some = [run for run in found if run.scheduler == name]
        known |= _ask(name, some)
    return known


def _ask(name: str, some: Sequence[Run]) -> dict[Run, Verdict | None]:
    try:
        manager = manager_of(find(name), 1)
    except NoScheduler:  # of a package that is gone
        return dict.fromkeys(some)
    # A script that has said how it ended, and was not told to, has ended so: no need to ask.
    known: dict[Run, Verdict | None] = {run: exit_verdict(run.exit_folder) for run in some}
    open_ = [run for run, last in known.items() if last is None or last.signal]
    listed = manager.poll([run.job for run in open_]) if open_ else {}
    gone = [run.job for run in open_ if run.job not in listed or listed[run.job].state.terminal]
    listed |= manager.post_mortem(gone) if gone else {}
    for run in open_:
        known[run] = merge(listed.get(run.job), known[run])
    return known


def ended(verdict: Verdict | None) -> bool:
    """Tell whether a job has ended, as far as anybody knows."""
    return verdict is None or verdict.state.terminal


def table(headline: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table; the last column is as wide as it is.

    >>> print(table(["A", "B"], [["long", "x"], ["s", "y"]]))
    A     B
    long  x
    s     y
    """
    lines = [list(headline), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headline) - 1)]
    return "\n".join(
        "  ".join(
            [*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]
        )
        for line in lines
    )


def state_of(verdict: Verdict | None) -> tuple[str, str]:
    """Return a job's state and the reason for it, as columns.

    >>> state_of(Verdict(state=JobState.QUEUED, word="PENDING", reason="Resources"))
    ('PENDING', 'Resources')
    """
    if verdict is None:
        return "unknown", "-"
    if verdict.state is JobState.FAILED or verdict.state is JobState.CANCELLED:
        word, _, rest = verdict.tell().partition(" ")
        return word.rstrip(","), rest or "-"
    return verdict.word, verdict.reason or verdict.nodes or "-"
