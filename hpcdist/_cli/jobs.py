"""`hpcdist jobs`: our jobs, how they stand, and where their folders are."""

from __future__ import annotations

import argparse
from datetime import datetime, timedelta

from hpcdist._cli.runs import Run, ended, runs, state_of, table, verdicts
from hpcdist._cli.schedulers import refusals, tell
from hpcdist._managers.batch import job
from hpcdist._managers.batch.verdict import Verdict

_HEADLINE = ("JOB", "STATE", "REASON", "SIZE", "SINCE", "WHAT", "FOLDER")
_RECENT = timedelta(days=1)


def main(options: argparse.Namespace) -> int:
    """Print the table."""
    with refusals(options):
        known = verdicts(runs())
    if options.clear:
        return _clear(known)
    shown = {run: verdict for run, verdict in known.items() if options.all or _counts(run, verdict)}
    if not shown:
        older = f"; {len(known)} older one(s): hpcdist jobs --all" if known else ""
        print(f"no jobs{older}")
        return 0
    print(table(_HEADLINE, [_row(run, verdict) for run, verdict in shown.items()]))
    return 0


def _counts(run: Run, verdict: Verdict | None) -> bool:
    if not ended(verdict):
        return True
    end = verdict.end if verdict is not None else None
    return datetime.now().astimezone() - (end or run.since) < _RECENT


def _row(run: Run, verdict: Verdict | None) -> tuple[str, ...]:
    state, reason = state_of(verdict)
    since = f"{run.since:%Y-%m-%d %H:%M}"
    return run.job, state, reason, run.size, since, run.what, run.folder


def _clear(known: dict[Run, Verdict | None]) -> int:
    """Remove the folders, with all that is in them, of runs that have ended."""
    folders = dict.fromkeys(run.folder for run in known)
    living = {run.folder for run, verdict in known.items() if not ended(verdict)}
    for folder in folders:
        if folder not in living:
            job.forget(folder)
            tell(f"removed {folder}")
    return 0
