"""`hpcdist submit driver.py -n 128 ...`: a job in which the driver is rank 0 of a world."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from hpcdist._cli import job_options
from hpcdist._cli.following import Follower, NeverStarts, exit_code
from hpcdist._cli.schedulers import chosen, leave, manager_of, private_place, refusals, tell
from hpcdist._managers.batch.following import last_lines
from hpcdist._managers.batch.job import read_manifests

if TYPE_CHECKING:
    from hpcdist._managers.batch.base import BatchManager, Submission

_TAIL = 20


def main(options: argparse.Namespace) -> int:
    """Submit the driver, or show what would be; return the exit code."""
    if not os.path.exists(options.program[0]):
        leave(options, 1, f"there is no file {options.program[0]}")
    params = job_options.keywords(options)
    command = _command(options.program, params)
    shown = hasattr(options, "dry_run")
    with refusals(options):
        manager = manager_of(
            chosen(getattr(options, "scheduler", None), needed=not shown), options.n
        )
        if shown:
            print(manager.program_script(command, **params), end="")
            return 0
        run = manager.submit_program(command, **params)
    print(run.job, flush=True)
    logs = _logs(run)
    _tell_where(run, logs)
    _warn_of_private_place(options.program[0])
    if not hasattr(options, "wait"):
        return 0
    return _wait(manager, run, logs, options)


def _command(program: list[str], params: dict[str, Any]) -> list[str]:
    # Relative paths are the caller's: elsewhere they would name something else.
    driver = program[0] if "dir" not in params else os.path.abspath(program[0])
    return [driver, *program[1:]]


def _logs(run: Submission) -> list[str]:
    for facts in read_manifests():
        if facts.get("name") == run.name:
            return list(facts.get("logs", ()))
    return []


def _tell_where(run: Submission, logs: list[str]) -> None:
    where = " and ".join(logs) or "where the options say"
    tell(f"job {run.job}: its output goes to {where}")


def _warn_of_private_place(driver: str) -> None:
    place = private_place(os.path.abspath(driver))
    if place is not None:
        tell(f"warning: {driver} lies below {place}, which compute nodes rarely share")


def _wait(
    manager: BatchManager, run: Submission, logs: list[str], options: argparse.Namespace
) -> int:
    try:
        with refusals(options):
            verdict = Follower(manager, run, tell).wait()
    except KeyboardInterrupt:
        tell(f"\njob {run.job} goes on; `hpcdist cancel {run.job}` ends it")
        return 130
    except NeverStarts as exc:
        with refusals(options):
            manager.cancel([run.job])
        tell(f"job {run.job} can never start: {exc}; it has been cancelled")
        return 1
    code = exit_code(verdict)
    said = "nobody tells how it ended" if verdict is None else verdict.tell()
    tell(f"job {run.job}: {said}")
    if code:
        _show_tail(logs)
    return code


def _show_tail(logs: list[str]) -> None:
    for path in logs:
        lines = last_lines(path, _TAIL)
        if lines:
            tell(f"the last lines of {path}:")
            for line in lines:
                tell(f"  {line}")
