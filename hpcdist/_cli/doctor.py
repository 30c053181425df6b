"""`hpcdist doctor`: what is here, what fits, and how to mend the rest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpcdist._cli import checks, job_options, testjob
from hpcdist._cli.findings import Finding, Mark, bad, fact, show
from hpcdist._cli.schedulers import NoScheduler, Scheduler, chosen, leave, manager_of
from hpcdist._managers.batch.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._managers.launching import MpiNotFound

if TYPE_CHECKING:
    from hpcdist._managers.batch.base import BatchManager

_REFUSALS = (
    *(CommandFailed, CommandLate, CommandMissing, SubmitError, MpiNotFound),
    *(ValueError, TypeError, OSError),
)


def main(options: argparse.Namespace) -> int:
    """Print the findings as they come; return 1 if a check has failed."""
    params = job_options.keywords(options)
    python = params.get("python", sys.executable)
    failed = 0
    try:
        for finding in _all(options, params, python):
            print(show(finding, sys.stdout.encoding), flush=True)
            failed += finding.mark is Mark.BAD
    except KeyboardInterrupt:
        return 130
    print(f"\n{failed} check(s) failed" if failed else "\nall is well")
    return 1 if failed else 0


def _all(options: argparse.Namespace, params: dict[str, Any], python: str) -> Iterator[Finding]:
    scheduler = _scheduler(options)
    if scheduler is None:
        yield fact("no scheduler was found on PATH; the rest is about this machine alone")
    try:
        here = checks.ask(python)
    except RuntimeError as exc:
        fix = "install hpcdist there, or choose another --python"
        yield bad(f"{python} cannot import hpcdist", fix, str(exc))
        return
    yield from checks.local(python, here, start=scheduler is None)
    if scheduler is None:
        return
    yield checks.folder()
    yield checks.addresses(params.get("interface"))
    manager = manager_of(scheduler, options.n)
    if here["library"] is None:  # complained of before; the rest can be checked without it
        params = {"isolation": "process"} | params
    yield from _theirs(scheduler, manager, params, here)
    tried = []
    if hasattr(options, "run"):
        for finding in _run(scheduler, manager, params, here):
            tried.append(finding)
            yield finding
    if not tried or any(finding.mark is Mark.BAD for finding in tried):
        yield checks.visible(here)


def _scheduler(options: argparse.Namespace) -> Scheduler | None:
    """Return the scheduler to check; None: there is none here, and none was asked for."""
    name = getattr(options, "scheduler", None)
    try:
        return chosen(name)
    except NoScheduler as exc:
        if name is not None or hasattr(options, "run") or options.theirs:
            leave(options, 1, str(exc))
        return None


def _theirs(
    scheduler: Scheduler, manager: BatchManager, params: dict[str, Any], here: dict[str, Any]
) -> Iterator[Finding]:
    """Run the scheduler's own checks. Where the first one fails, there is nobody to ask."""
    if not scheduler.checks:  # another package brings its manager, and none of these
        return
    module = import_module(scheduler.checks)
    for number, check in enumerate(module.checks(manager, params, _family(here))):
        found = list(_guarded(check))
        yield from found
        if number == 0 and any(finding.mark is Mark.BAD for finding in found):
            return


def _family(here: dict[str, Any]) -> str | None:
    known = checks.library(str(here["library"]))
    return known[0] if known is not None else None


def _run(
    scheduler: Scheduler, manager: BatchManager, params: dict[str, Any], here: dict[str, Any]
) -> Iterator[Finding]:
    name, minute = scheduler.limit
    limited = not name or any(manager.aliases.get(given, given) == name for given in params)
    job = params if limited else {name: minute} | params
    return _guarded(lambda: testjob.check(manager, job, here, params.get("interface")))


def _guarded(check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except _REFUSALS as exc:
        yield bad("this could not be checked", "choose other options", str(exc))
