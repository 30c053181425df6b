"""`hpcdist cancel JOB...`: end jobs of ours."""

from __future__ import annotations

import argparse

from hpcdist._cli.runs import Run, named, runs, verdicts
from hpcdist._cli.schedulers import find, leave, print_line, refusals


def main(options: argparse.Namespace) -> int:
    """Cancel the jobs that are named; none, if one of them is unknown."""
    ours = runs()
    meant = {name: named(ours, name) for name in options.jobs}
    unknown = [name for name, found in meant.items() if not found]
    if unknown:
        leave(
            options,
            1,
            f"no job of hpcdist is called {', '.join(unknown)}; `hpcdist jobs --all` lists them",
        )
    with refusals(options):
        return _cancel(list(dict.fromkeys(run for found in meant.values() for run in found)))


def _cancel(found: list[Run]) -> int:
    known = verdicts(found)
    lost = [run.job for run, verdict in known.items() if verdict is None]
    if lost:
        print_line(f"hpcdist cancel: the scheduler no longer knows job {', '.join(lost)}")
    for run, verdict in known.items():
        if verdict is not None and verdict.state.terminal:
            print_line(f"job {run.job} has ended before: {verdict.describe()}")
    living = [run for run, verdict in known.items() if verdict and not verdict.state.terminal]
    for name in dict.fromkeys(run.scheduler for run in living):
        some = [run.job for run in living if run.scheduler == name]
        find(name).scheduler.cancel(some)
        print_line(f"cancelled: {', '.join(some)}")
    return 1 if lost else 0
