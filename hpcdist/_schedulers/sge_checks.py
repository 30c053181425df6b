"""Checks of `hpcdist doctor` that ask Grid Engine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator

from hpcdist._schedulers import commands
from hpcdist._schedulers.findings import Finding, Trial, bad, doubt, fact, good
from hpcdist._schedulers.sge_words import parse_environments

_NEEDED = ("qsub", "qstat", "qdel", "qconf", "qrsh")


def checks(trial: Trial) -> list[Callable[[], Iterable[Finding]]]:
    """Return the checks, in their order."""
    return [
        scheduler,
        lambda: [environments(trial)],
        lambda: [verify(trial)],
        lambda: [accounting()],
    ]


def scheduler() -> Iterator[Finding]:
    """Check Grid Engine's commands, and that its master answers."""
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        yield bad(
            f"not on PATH: {', '.join(missing)}",
            "go to a submit host, or source the site's settings.sh",
        )
        return
    done = commands.ask("qstat", "-help")
    version = done.out.partition("\n")[0].strip() or "Grid Engine"
    yield good(f"{version}: {', '.join(_NEEDED)} are there")
    listed = commands.ask("qconf", "-sh")
    if listed.status:
        yield bad("the master does not answer", "wait, or ask the administrators", listed.said)
    else:
        yield good(f"the master answers, after {listed.seconds:.2f} s")


def environments(trial: Trial) -> Finding:
    """Check that there is the parallel environment that jobs will ask for."""
    known = parse_environments(commands.ask("qconf", "-spl").out)
    script = trial.script()
    asked = [line.split()[2] for line in script.splitlines() if line.startswith("#$ -pe ")]
    listed = f"parallel environments: {', '.join(known) or 'none'}"
    if not asked:
        return fact(listed)
    if asked[0] not in known:
        return bad(f"there is no parallel environment {asked[0]}", "choose one: --pe=…", listed)
    shown = commands.ask("qconf", "-sp", asked[0]).out
    fields = dict(line.split(None, 1) for line in shown.splitlines() if len(line.split()) > 1)
    text = f"{listed}; jobs ask for {asked[0]}"
    if fields.get("control_slaves", "TRUE").strip().upper() != "TRUE":
        fix = "choose one with control_slaves TRUE, or keep jobs on one host"
        return doubt(f"{text}, which lets no other host be reached by qrsh", fix)
    return good(f"{text}, allocation rule {fields.get('allocation_rule', '?').strip()}")


def verify(trial: Trial) -> Finding:
    """Let qsub judge a script of ours, with all the options that were given."""
    with tempfile.TemporaryDirectory(prefix="hpcdist-doctor-") as folder:
        path = os.path.join(folder, "script.sh")
        with open(path, "w") as file:
            file.write(trial.script())
        done = commands.ask("qsub", "-w", "v", path)
    if "found suitable queue" in done.out + done.err:
        return good("qsub -w v finds queues for our script")
    return bad(
        "qsub -w v refuses our script",
        "hpcdist passes on options that it does not know: --pe=…, --q=…, --h_rt=…",
        done.said,
    )


def accounting() -> Finding:
    """Tell whether Grid Engine remembers jobs that have ended."""
    done = commands.ask("qacct", "-d", "0")
    if done.status == 0:
        return good("qacct answers: hpcdist can say how a job ended")
    return fact("qacct says nothing here: only its exit file says how a job ended", done.said)
