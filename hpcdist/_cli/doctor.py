"""`hpcdist doctor`: what is here, what fits, and how to mend the rest."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hpcdist._cli import checks, job_options, testjob
from hpcdist._cli.schedulers import Known, NoScheduler, chosen, leave
from hpcdist._contract.managers import Settings, default_addprocs_params
from hpcdist._keeper.installed_mpi import MpiNotFound
from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._schedulers.findings import Finding, Mark, Trial, bad, fact, show

if TYPE_CHECKING:
    from hpcdist._schedulers.batch_manager import BatchManager

_REFUSALS = (
    *(CommandFailed, CommandLate, CommandMissing, SubmitError, MpiNotFound),
    *(ValueError, TypeError, OSError),
)


def main(options: argparse.Namespace) -> int:
    """Print the findings as they come; return 1 if a check has failed."""
    params = job_options.keywords(options)
    failed = 0
    found = []
    try:
        for finding in _all(options, params):
            failed += finding.mark is Mark.BAD
            if hasattr(options, "json"):
                found.append({**vars(finding), "mark": finding.mark.name.lower()})
            else:
                print(show(finding, sys.stdout.encoding), flush=True)
    except KeyboardInterrupt:
        return 130
    if hasattr(options, "json"):
        print(json.dumps({"failed": failed, "findings": found}, indent=1))
        return 1 if failed else 0
    print(f"\n{failed} check(s) failed" if failed else "\nall is well")
    return 1 if failed else 0


def _all(options: argparse.Namespace, params: dict[str, Any]) -> Iterator[Finding]:
    scheduler = _scheduler(options)
    if scheduler is None:
        yield fact("no scheduler was found on PATH; the rest is about this machine alone")
    try:
        settings = _settings(scheduler, options.n, params)
    except (TypeError, ValueError) as exc:
        leave(options, 2, str(exc))
    python = settings.python
    try:
        here = checks.ask(python, settings.dir)
    except RuntimeError as exc:
        fix = "install hpcdist there, or choose another --python or --container"
        yield bad(f"{shlex.join(python)} cannot import hpcdist", fix, str(exc))
        return
    yield from checks.local(python, here, start=scheduler is None)
    if checks.is_command(python):
        yield checks.sees(python, here)
    if scheduler is None:
        return
    yield checks.folder()
    yield checks.addresses(params.get("interface"))
    manager = scheduler.manager(options.n)
    if here["library"] is None:  # complained of before; the rest can be checked without it
        params = {"isolation": "process"} | params
    yield from _theirs(manager, params, here)
    tried = []
    if hasattr(options, "run"):
        for finding in _run(manager, params, here):
            tried.append(finding)
            yield finding
    if not tried or any(finding.mark is Mark.BAD for finding in tried):
        yield checks.visible(here, inside=checks.is_command(python))


def _scheduler(options: argparse.Namespace) -> Known | None:
    """Return the scheduler to check; None: there is none here, and none was asked for."""
    name = getattr(options, "scheduler", None)
    try:
        return chosen(name)
    except NoScheduler as exc:
        if name is not None or hasattr(options, "run") or options.theirs:
            leave(options, 1, str(exc))
        return None


def _settings(scheduler: Known | None, n: int, params: dict[str, Any]) -> Settings:
    """Return the settings of a launch with these options; files of settings count."""
    if scheduler is None:
        return Settings.of(default_addprocs_params(), params)
    return scheduler.manager(n).settings_of(params)


def _theirs(
    manager: BatchManager, params: dict[str, Any], here: dict[str, Any]
) -> Iterator[Finding]:
    """Run the scheduler's own checks. Where the first one fails, there is nobody to ask."""
    trial = Trial(
        script=lambda: manager.job_script(**params),
        launcher=lambda: manager.plan(manager.settings_of(params)).launcher(manager.n),
        family=_family(here),
    )
    for number, check in enumerate(manager.scheduler.checks(trial)):
        found = list(_guarded(check))
        yield from found
        if number == 0 and any(finding.mark is Mark.BAD for finding in found):
            return


def _family(here: dict[str, Any]) -> str | None:
    known = checks.library(str(here["library"]))
    return known[0] if known is not None else None


def _run(manager: BatchManager, params: dict[str, Any], here: dict[str, Any]) -> Iterator[Finding]:
    minute, aliases = manager.scheduler.a_minute, manager.scheduler.aliases
    limited = any(aliases.get(given, given) in minute for given in params)
    job = params if limited else {**minute, **params}
    return _guarded(lambda: testjob.check(manager, job, here, params.get("interface")))


def _guarded(check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except _REFUSALS as exc:
        yield bad("this could not be checked", "choose other options", str(exc))
