"""`hpcdist cancel JOB...`: end jobs of ours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hpcdist._cli.runs import Run, runs, verdicts
from hpcdist._cli.schedulers import find, leave, manager_of, refusals, tell


def main(options: argparse.Namespace) -> int:
    """Cancel the jobs that are named; none, if one of them is unknown."""
    ours = runs()
    meant = {name: _named(ours, name) for name in options.jobs}
    unknown = [name for name, found in meant.items() if not found]
    if unknown:
        leave(
            options,
            1,
            f"no job of ours is called {', '.join(unknown)}; `hpcdist jobs --all` lists them",
        )
    with refusals(options):
        return _cancel(list(dict.fromkeys(run for found in meant.values() for run in found)))


def _named(ours: Sequence[Run], name: str) -> list[Run]:
    """Find the jobs behind a number; that of a job array, or a run's name, stands for several.

    PBS calls its jobs by number and server: the number will do.
    """
    return [
        run
        for run in ours
        if name in (run.job, run.job.partition("_")[0], run.job.partition(".")[0], run.name)
    ]


def _cancel(found: list[Run]) -> int:
    known = verdicts(found)
    lost = [run.job for run, verdict in known.items() if verdict is None]
    if lost:
        tell(f"hpcdist cancel: the scheduler no longer knows job {', '.join(lost)}")
    for run, verdict in known.items():
        if verdict is not None and verdict.state.terminal:
            tell(f"job {run.job} has ended before: {verdict.tell()}")
    living = [run for run, verdict in known.items() if verdict and not verdict.state.terminal]
    for name in dict.fromkeys(run.scheduler for run in living):
        some = [run.job for run in living if run.scheduler == name]
        manager_of(find(name), 1).cancel(some)
        tell(f"cancelled: {', '.join(some)}")
    return 1 if lost else 0
