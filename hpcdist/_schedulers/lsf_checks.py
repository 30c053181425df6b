"""Checks of `hpcdist doctor` that ask LSF."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping

from hpcdist._schedulers import commands
from hpcdist._schedulers.findings import Finding, Trial, bad, doubt, fact, good

_NEEDED = ("bsub", "bjobs", "bkill")


def checks(trial: Trial) -> list[Callable[[], Iterable[Finding]]]:
    """Return the checks, in their order."""
    return [scheduler, lambda: [script(trial)], lambda: [queues()], lambda: [units()]]


def scheduler() -> Iterator[Finding]:
    """Check LSF's commands, and that LSF answers."""
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        yield bad(f"not on PATH: {', '.join(missing)}", "go to a login node, or source profile.lsf")
        return
    done = commands.ask("bsub", "-V")
    version = (done.err or done.out).partition("\n")[0].partition(",")[0].strip() or "LSF"
    yield good(f"{version}: {', '.join(_NEEDED)} are there")
    named = commands.ask("lsid")
    cluster = re.search(r"^My cluster name is (\S+)", named.out, re.MULTILINE)
    if named.status or cluster is None:
        yield bad("LSF does not answer", "wait, or ask the administrators", named.said)
    else:
        yield good(f"the cluster {cluster[1]} answers, after {named.seconds:.2f} s")


def script(trial: Trial) -> Finding:
    """Write a script of ours. LSF itself can judge none without taking it."""
    count = trial.script().count("\n#BSUB ")
    return fact(f"a script of {count} directives would be submitted: hpcdist script shows it")


def queues() -> Finding:
    """List the queues."""
    done = commands.ask("bqueues")
    if done.status:
        return doubt("bqueues lists no queue", "ask the administrators", done.said)
    return fact("queues:", done.out.rstrip())


def units(environ: Mapping[str, str] | None = None) -> Finding:
    """Tell what a bare number of `-M` and rusage[mem=] means here."""
    folder = (os.environ if environ is None else environ).get("LSF_ENVDIR", "/etc")
    try:
        with open(os.path.join(folder, "lsf.conf"), errors="replace") as file:
            unit = parse_unit(file.read())
    except OSError:
        return fact("lsf.conf cannot be read: give memory with its unit, as in M='4GB'")
    return fact(f"a memory limit without a unit counts in {unit}")


def parse_unit(text: str) -> str:
    """Read LSF_UNIT_FOR_LIMITS in lsf.conf.

    >>> parse_unit('LSF_UNIT_FOR_LIMITS="GB"\\n'), parse_unit("# LSF_UNIT_FOR_LIMITS=GB\\n")
    ('GB', 'KB')
    """
    match = re.search(r"^\s*LSF_UNIT_FOR_LIMITS\s*=\s*\"?(\w+)", text, re.MULTILINE)
    return match[1].upper() if match else "KB"
