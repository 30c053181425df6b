"""`hpcdist logs [-f] JOB`: what a job has printed, and with -f what it goes on to print."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from hpcdist._cli.runs import Run, continued, ended, named, runs, state_of, verdicts
from hpcdist._cli.schedulers import leave, print_line, refusals
from hpcdist._schedulers.commands import CommandFailed, CommandLate
from hpcdist._schedulers.job_watch import exit_verdict

_LOOK_EVERY = 0.2
_ASK_EVERY = 5.0  # seconds; a script that ends by itself says so in its folder
_CHUNK = 1 << 16


def main(options: argparse.Namespace) -> int:
    """Print the logs of one job, or of all tasks of a job array."""
    found = named(runs(), options.job)
    if not found:
        leave(
            options,
            1,
            f"no job of hpcdist is called {options.job}; `hpcdist jobs --all` lists them",
        )
    logs = Logs(list(dict.fromkeys(path for run in found for path in run.logs)))
    if not options.follow:
        if not logs.print_new():
            print_line(f"hpcdist logs: nothing has been written yet to {', '.join(logs.paths)}")
        return 0
    try:
        with refusals(options):
            _follow({run.folder for run in found}, logs)
    except KeyboardInterrupt:
        print_line("")
        return 130
    return 0


class Logs:
    """Files that are read on from where they were left."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self._places = dict.fromkeys(paths, 0)

    def print_new(self) -> bool:
        """Print what is new in them; tell whether there was anything."""
        printed = False
        for path in self.paths:
            try:
                with open(path, "rb") as file:
                    if os.fstat(file.fileno()).st_size < self._places[path]:
                        self._places[path] = 0  # begun anew
                    file.seek(self._places[path])
                    while data := file.read(_CHUNK):
                        printed = True
                        sys.stdout.buffer.write(data)
                    self._places[path] = file.tell()
            except OSError:  # not there yet, or no longer
                continue
        sys.stdout.flush()
        return printed


def _follow(folders: set[str], logs: Logs) -> None:
    """Print what comes, until all of the jobs have ended; say on stderr how they stand."""
    said: dict[str, str] = {}
    due, asked_at_the_end, over = 0.0, False, False
    while True:
        now = time.monotonic()
        found = [run for run in runs() if run.folder in folders]
        at_the_end = all(exit_verdict(run.exit_folder) is not None for run in found)
        if now >= due or (at_the_end and not asked_at_the_end):
            over = _ask(found, said)
            due, asked_at_the_end = now + _ASK_EVERY, at_the_end
        logs.print_new()
        if over:
            return
        time.sleep(_LOOK_EVERY)


def _ask(found: list[Run], said: dict[str, str]) -> bool:
    """Say what has changed; tell whether all have ended."""
    try:
        known, awaited = continued(verdicts(found))
    except (CommandFailed, CommandLate) as exc:  # says nothing of the jobs
        print_line(f"hpcdist logs: {exc}; asking again")
        return False
    for run, verdict in known.items():
        state, reason = state_of(verdict)
        text = f"job {run.job}: {state}" + (f" ({reason})" if reason not in ("-", "None") else "")
        if said.get(run.job) != text:
            said[run.job] = text
            print_line(text)
    return not awaited and all(map(ended, known.values()))
