"""`hpcdist submit driver.py -n 128 ...`: a job in which the driver is rank 0 of a world."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hpcdist._cli import job_options
from hpcdist._cli.schedulers import chosen, leave, print_line, private_place, refusals
from hpcdist._cli.wait_for_job import Follower, NeverStarts, exit_code
from hpcdist._keeper.folders import last_lines
from hpcdist._schedulers.again import succeed
from hpcdist._schedulers.job import read_manifests

if TYPE_CHECKING:
    from hpcdist._schedulers.batch_manager import BatchManager, Submission
    from hpcdist._schedulers.job import JobId
    from hpcdist._schedulers.verdict import Verdict

_TAIL = 20
_LOOK_EVERY = 1.0


def main(options: argparse.Namespace) -> int:
    """Submit the driver, or show what would be; return the exit code."""
    if hasattr(options, "dry_run"):
        return show(options)
    params, command = _read(options)
    with refusals(options):
        manager = chosen(getattr(options, "scheduler", None)).manager(options.n)
        run = manager.submit_program(command, **_of_the_run(options), **params)
    print(run.job, flush=True)
    logs = _logs(run)
    _print_where(run, logs)
    _warn_of_private_place(options.program[0])
    if not hasattr(options, "wait"):
        return 0
    return _wait(manager, run, logs, options)


def show(options: argparse.Namespace) -> int:
    """Print the script that would be submitted."""
    params, command = _read(options)
    with refusals(options):
        manager = chosen(getattr(options, "scheduler", None), needed=False).manager(options.n)
        script = manager.program_script(command, **_of_the_run(options), **params)
    print(script, end="")
    return 0


def _of_the_run(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is no option of the job: its name, and how often it is submitted again."""
    return {
        "called": getattr(options, "name", None),
        "resubmit": getattr(options, "resubmit", 0),
    }


def _read(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return the keywords of `addprocs` that were given, and the driver with its arguments."""
    if not os.path.exists(options.program[0]):
        leave(options, 1, f"there is no file {options.program[0]}")
    params = job_options.keywords(options)
    return params, _command(options.program, params)


def _command(program: list[str], params: dict[str, Any]) -> list[str]:
    # Relative paths are the caller's: elsewhere they would name something else.
    driver = program[0] if "dir" not in params else os.path.abspath(program[0])
    return [driver, *program[1:]]


def _logs(run: Submission) -> list[str]:
    for facts in read_manifests():
        if facts.get("name") == run.name:
            return list(facts.get("logs", ()))
    return []


def _print_where(run: Submission, logs: list[str]) -> None:
    where = " and ".join(logs) or "where the options say"
    print_line(f"job {run.job}: its output goes to {where}")


def _warn_of_private_place(driver: str) -> None:
    place = private_place(os.path.abspath(driver))
    if place is not None:
        print_line(f"warning: {driver} lies below {place}, which compute nodes rarely share")


def _wait(
    manager: BatchManager, run: Submission, logs: list[str], options: argparse.Namespace
) -> int:
    try:
        with refusals(options):
            verdict = Follower(manager.scheduler, run, print_line).wait()
            while (job := _next(manager, run, verdict)) is not None:
                print_line(f"job {run.job}: {_described(verdict)}; job {job} goes on with it")
                run = replace(run, job=job)
                verdict = Follower(manager.scheduler, run, print_line).wait()
    except KeyboardInterrupt:
        print_line(f"\njob {run.job} goes on; `hpcdist cancel {run.job}` ends it")
        return 130
    except NeverStarts as exc:
        with refusals(options):
            manager.scheduler.cancel([run.job])
        print_line(f"job {run.job} can never start: {exc}; it has been cancelled")
        return 1
    code = exit_code(verdict)
    print_line(f"job {run.job}: {_described(verdict)}")
    if code:
        _show_tail(logs)
    return code


def _described(verdict: Verdict | None) -> str:
    return "no record says how it ended" if verdict is None else verdict.describe()


def _next(manager: BatchManager, run: Submission, verdict: Verdict | None) -> JobId | None:
    """Return the job that goes on with a run (`--resubmit`); it may take a moment to be there."""
    while True:
        found = succeed(manager.scheduler, run.folder, run.job, verdict)
        if not found.awaited:
            return found.job
        time.sleep(_LOOK_EVERY)


def _show_tail(logs: list[str]) -> None:
    for path in logs:
        lines = last_lines(path, _TAIL)
        if lines:
            print_line(f"the last lines of {path}:")
            for line in lines:
                print_line(f"  {line}")
