"""Checks of `hpcdist doctor` that ask PBS."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hpcdist._schedulers import commands
from hpcdist._schedulers.findings import Finding, Trial, bad, doubt, fact, good, table
from hpcdist._schedulers.pbs_words import is_torque

_NEEDED = ("qsub", "qstat", "qdel", "qselect")


def checks(trial: Trial) -> list[Callable[[], Iterable[Finding]]]:
    """Return the checks, in their order."""
    return [
        scheduler,
        lambda: [options(trial)],
        lambda: [queues()],
        lambda: [history()],
    ]


def parse(text: str, what: str) -> dict[str, dict[str, Any]]:
    """Read `qstat -f -F json` on servers or queues.

    >>> parse('{"Queue": {"workq": {"enabled": "True"}}}', "Queue")
    {'workq': {'enabled': 'True'}}
    """
    try:
        found = json.loads(text, strict=False)[what]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: facts for name, facts in found.items() if isinstance(facts, dict)}


def scheduler() -> Iterator[Finding]:
    """Check PBS's commands, and that its server answers."""
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        yield bad(
            f"not on PATH: {', '.join(missing)}",
            "go to a login node, or load the site's pbs module",
        )
        return
    done = commands.ask("qstat", "--version")
    if is_torque(done.out or done.err):
        fix = "hpcdist knows OpenPBS and PBS Professional"
        yield bad("this is Torque, whose options and answers differ", fix, done.said)
        return
    yield good(f"{done.out.strip() or 'PBS'}: {', '.join(_NEEDED)} are there")
    answer = commands.ask("qstat", "-B")
    if answer.status:
        yield bad("the server does not answer", "wait, or ask the administrators", answer.said)
    else:
        yield good(f"the server answers, after {answer.seconds:.2f} s")


def options(trial: Trial) -> Finding:
    """Render a script of ours with all the options that were given; PBS itself judges at qsub."""
    script = trial.script()
    asked = [line.partition(" -l ")[2] for line in script.splitlines() if " -l " in line]
    return good(f"our script asks for {', '.join(asked)}")


def queues() -> Finding:
    """List the queues."""
    done = commands.ask("qstat", "-Q", "-f", "-F", "json")
    found = parse(done.out, "Queue")
    if not found:
        return doubt("qstat lists no queue", "ask the administrators", done.said)
    rows = [
        (
            name,
            "yes" if facts.get("enabled") == "True" else "no",
            "yes" if facts.get("started") == "True" else "no",
            str(_limit(facts)),
        )
        for name, facts in found.items()
    ]
    return fact("queues:", table(("QUEUE", "TAKES JOBS", "STARTS THEM", "TIME LIMIT"), rows))


def _limit(facts: Mapping[str, object]) -> object:
    most = facts.get("resources_max")
    return most.get("walltime", "none") if isinstance(most, dict) else "none"


def history() -> Finding:
    """Tell whether PBS remembers jobs that have ended."""
    servers = parse(commands.ask("qstat", "-B", "-f", "-F", "json").out, "Server")
    if any(facts.get("job_history_enable") == "True" for facts in servers.values()):
        return good("the job history is on: hpcdist can always say how a job ended")
    return fact(
        "the job history is off: only its script says how a job ended, and PBS's own verdict "
        "(out of time, out of memory) is lost"
    )
