"""The runs of this user, from the manifests in their folders, and what became of their jobs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hpcdist._cli.schedulers import NoScheduler, find
from hpcdist._schedulers.again import succeed, tries
from hpcdist._schedulers.job import JobId, read_manifests
from hpcdist._schedulers.job_watch import exit_verdict
from hpcdist._schedulers.verdict import JobState, Verdict, merge


@dataclass(frozen=True)
class Run:
    """One job of ours.

    Attributes:
        array: The id of the job array that it is a task of; "": it is none.
        exit_folder: Where its script tells how it ended.
        logs: Where it writes.
        has_result: Its folder has, or gets, the result of a function: its user removes it.
    """

    job: JobId
    array: str
    scheduler: str
    name: str
    folder: str
    exit_folder: str
    size: str
    what: str
    since: datetime
    logs: tuple[str, ...] = ()
    has_result: bool = False
    is_program: bool = False  # a driver runs in it; else it has workers of a driver elsewhere
    host: str = ""  # where it was submitted, and by which process
    os_pid: int = 0


def runs() -> list[Run]:
    """Return all jobs of ours whose folders are still there, the oldest first."""
    return [run for facts in read_manifests() for run in _runs_of(facts)]


def named(ours: Sequence[Run], name: str) -> list[Run]:
    """Find the jobs behind a number; that of a job array, or a run's name, stands for several.

    PBS calls its jobs by number and server: the number will do.
    """
    return [
        run
        for run in ours
        if name
        and name
        in (
            *(run.job, run.job.partition(".")[0], run.name),
            *(run.array, run.array.partition(".")[0], run.array.partition("[")[0]),
        )
    ]


def _runs_of(facts: dict[str, Any]) -> list[Run]:
    jobs: list[JobId] = list(dict.fromkeys(facts["jobs"]))
    program = facts.get("kind") in ("program", "call")
    each = int(facts.get("n", 0)) // max(1, len(jobs))
    folder, array = str(facts.get("folder", "")), str(facts.get("array", ""))
    done, most = tries(facts)
    what = str(facts.get("what", "")) + (f" (try {done} of {most})" if most > 1 else "")
    folders = [os.path.join(folder, "tasks", str(n)) if array else folder for n in range(len(jobs))]
    return [
        Run(
            job,
            array,
            str(facts.get("scheduler", "")),
            str(facts.get("name", "")),
            folder,
            own,
            f"{each} {'ranks' if program else 'workers'}",
            what if program else _driver(facts),
            datetime.fromtimestamp(float(facts.get("when", 0)), UTC).astimezone(),
            (os.path.join(own, "log"),) if array else _logs(facts, own),
            facts.get("kind") == "call",
            program,
            str(facts.get("host", "")),
            int(facts.get("pid", 0)),
        )
        for job, own in zip(jobs, folders, strict=True)
    ]


def _logs(facts: dict[str, Any], folder: str) -> tuple[str, ...]:
    """Return where a job writes: what its manifest says, or what is usual."""
    told = facts.get("logs")
    if isinstance(told, list) and told:
        return tuple(map(str, told))
    found = [os.path.join(folder, name) for name in ("log", "pbs.log")]
    return tuple(path for path in found if os.path.exists(path)) or (found[0],)


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
        scheduler = find(name).scheduler
    except NoScheduler:  # of a package that is gone
        return dict.fromkeys(some)
    # A script that has said how it ended, and was not told to, has ended so: no need to ask.
    known: dict[Run, Verdict | None] = {run: exit_verdict(run.exit_folder) for run in some}
    open_ = [run for run, last in known.items() if last is None or last.signal]
    listed = scheduler.poll([run.job for run in open_]) if open_ else {}
    gone = [run.job for run in open_ if run.job not in listed or listed[run.job].state.terminal]
    listed |= scheduler.post_mortem(gone) if gone else {}
    for run in open_:
        known[run] = merge(listed.get(run.job), known[run])
    return known


def continued(known: dict[Run, Verdict | None]) -> tuple[dict[Run, Verdict | None], bool]:
    """Have jobs submitted again for which that is due (`--resubmit`), and look at what comes.

    Returns:
        The jobs that the runs are now; and whether one of them may soon have another.
    """
    awaited, replaced = False, set()
    for run, verdict in known.items():
        if not run.array and run.name and verdict is not None:
            found = succeed(find(run.scheduler).scheduler, run.folder, run.job, verdict)
            awaited = awaited or found.awaited
            if found.job is not None:
                replaced.add(run.folder)
    if not replaced:
        return known, awaited
    now = verdicts([run for run in runs() if run.folder in replaced])
    return {run: v for run, v in known.items() if run.folder not in replaced} | now, awaited


def ended(verdict: Verdict | None) -> bool:
    """Tell whether a job has ended, as far as anybody knows."""
    return verdict is None or verdict.state.terminal


def state_of(verdict: Verdict | None) -> tuple[str, str]:
    """Return a job's state and the reason for it, as columns.

    >>> state_of(Verdict(state=JobState.QUEUED, word="PENDING", reason="Resources"))
    ('PENDING', 'Resources')
    """
    if verdict is None:
        return "unknown", "-"
    if verdict.state is JobState.FAILED or verdict.state is JobState.CANCELLED:
        word, _, rest = verdict.describe().partition(" ")
        return word.rstrip(","), rest or "-"
    return verdict.word, verdict.reason or verdict.nodes or "-"
