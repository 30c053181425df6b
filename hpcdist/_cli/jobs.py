"""`hpcdist jobs`: our jobs, how they stand, what they said last, and where their folders are."""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime, timedelta

from hpcdist._cli.runs import Run, continued, ended, named, runs, state_of, verdicts
from hpcdist._cli.schedulers import leave, print_line, refusals
from hpcdist._keeper.folders import last_lines
from hpcdist._keeper.lingering import read_state
from hpcdist._numbers import clock
from hpcdist._schedulers import job
from hpcdist._schedulers.findings import table
from hpcdist._schedulers.verdict import JobState, Verdict

_HEADLINE = (
    *("JOB", "STATE", "REASON", "SIZE", "LEFT", "SINCE", "NAME", "WHAT", "LAST LINE", "FOLDER"),
)
_WIDEST = 50  # characters of the last line,
_LINES = 5  # which may be followed by empty ones
_RECENT = timedelta(days=1)


def main(options: argparse.Namespace) -> int:
    """Print the table."""
    ours = runs()
    for name in options.names:
        if not named(ours, name):
            leave(
                options, 1, f"no job of hpcdist is called {name}; `hpcdist jobs --all` lists them"
            )
    meant = [run for name in options.names for run in named(ours, name)] or ours
    with refusals(options):
        known, _ = continued(verdicts(list(dict.fromkeys(meant))))
    if options.clear:
        return _clear(known)
    every = options.all or bool(options.names)
    shown = {run: verdict for run, verdict in known.items() if every or _counts(run, verdict)}
    if options.json:
        print(json.dumps([_facts(run, verdict) for run, verdict in shown.items()], indent=1))
        return 0
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
    waits = None if ended(verdict) else read_state(run.exit_folder)
    if waits is not None:
        state, left = "LINGERING", clock(max(0.0, waits["until"] - time.time()))
    else:
        left = _left(verdict)
    since = f"{run.since:%Y-%m-%d %H:%M}"
    told = (run.job, state, reason, run.size, left, since)
    return *told, run.name, run.what, _last_line(run), run.folder


def _facts(run: Run, verdict: Verdict | None) -> dict[str, str | float | None]:
    """Return a row for programs."""
    row = dict(
        zip(
            (title.lower().replace(" ", "_") for title in _HEADLINE),
            _row(run, verdict),
            strict=True,
        )
    )
    end = verdict.end if verdict is not None and verdict.state is JobState.RUNNING else None
    left = None if end is None else max(0.0, (end - datetime.now().astimezone()).total_seconds())
    return {**row, "left": left, "since": run.since.isoformat(), "scheduler": run.scheduler}


def _last_line(run: Run) -> str:
    """Return the last line that a job has written, as far as there is room for it."""
    lines = [line for path in run.logs for line in last_lines(path, _LINES) if line.strip()]
    line = "".join(c if c.isprintable() else " " for c in lines[-1]).strip() if lines else ""
    return line if len(line) <= _WIDEST else line[: _WIDEST - 1] + "…"


def _left(verdict: Verdict | None) -> str:
    """Write how long a job may still run."""
    if verdict is None or verdict.state is not JobState.RUNNING or verdict.end is None:
        return "-"
    return clock(max(0.0, (verdict.end - datetime.now().astimezone()).total_seconds()))


def _clear(known: dict[Run, Verdict | None]) -> int:
    """Remove the folders, with all that is in them, of runs that have ended."""
    folders = dict.fromkeys(run.folder for run in known if not run.has_result)
    living = {run.folder for run, verdict in known.items() if not ended(verdict)}
    for folder in folders:
        if folder not in living:
            job.forget(folder)
            print_line(f"removed {folder}")
    return 0
