"""LSF: its options and its commands. What the commands print is read in `lsf_words`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from hpcdist._contract.managers import Settings
from hpcdist._numbers import whole
from hpcdist._public import public
from hpcdist._schedulers import commands, options
from hpcdist._schedulers.batch_manager import BatchManager
from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._schedulers.findings import Finding, Trial
from hpcdist._schedulers.job import JobId, JobSpec
from hpcdist._schedulers.launchers import like_rsh
from hpcdist._schedulers.lsf_words import (
    FIELDS,
    not_there,
    parse_lines,
    parse_records,
    parse_script,
    parse_submit,
    verdicts,
)
from hpcdist._schedulers.options import Asked, contradiction
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.verdict import Verdict
from hpcdist._schedulers.walltime import among, lsf_seconds

SUBMIT_DEADLINE = 150.0  # bsub itself asks again while mbatchd is busy
JOBS_AT_ONCE = 50

# Options of bsub that would make something else of the job than a launch can live with.
IMPOSSIBLE = dict.fromkeys(
    ("I", "Ip", "Is", "IS", "ISp", "ISs", "IX", "K"),
    ("addprocs", "it waits for the workers itself, and `hpcdist submit --wait` for a job"),
)
# Options without a value, as they are written on our command line: bsub of LSF 10.1.
BARE = frozenset({"-B", "-H", "-N", "-V", "-h", "-r", "-x", "--Ne", "--rn", "--ul"})


class LSF(Scheduler):
    """LSF, as `bsub`, `bjobs` and `bkill` show it."""

    name = "lsf"
    program = "bsub"
    prefix = "#BSUB"
    aliases = {"n": "ntasks"}  # noqa: RUF012
    bare = BARE
    dir_option = "cwd"
    impossible = IMPOSSIBLE
    time_option = "W"
    a_minute = {"W": "1"}  # noqa: RUF012
    template = "lsf.sh.j2"
    remote = like_rsh("blaunch")
    lists_hosts = True

    def defaults(self, job: JobSpec, settings: Settings) -> dict[str, Any]:
        """Return what a job has unless its user says otherwise."""
        asked = job.options
        return {
            "J": job.name,
            "Jd": os.path.join(job.folder, "script.sh"),  # by which the job is found again
            "ntasks": job.size,
            "cwd": settings.dir,
            "o": "/dev/null" if self.own_log(asked) else None,
            "rn": not asked.value("r"),
        }

    def own_log(self, asked: Asked) -> bool:
        """Tell whether the script writes its output itself: LSF would hold it back to the end."""
        return not any(asked.value(name) for name in ("o", "oo"))

    def check(self, asked: Asked, settings: Settings, n: int) -> None:
        """Refuse options that contradict each other."""
        if "[" in str(asked.value("J") or ""):
            advice = "hpcdist makes as many jobs as there are worlds"
            raise contradiction("split=", asked.spelling("J"), advice)
        if asked.value("ntasks_per_node") is not None and _spanned(asked):
            advice = "they say the same"
            raise contradiction(asked.spelling("R"), asked.spelling("ntasks_per_node"), advice)

    def quote(self, value: str) -> str:
        """Write a value as bsub reads it, which knows both kinds of quotes.

        >>> print(LSFManager(1).quote("select[type==any] rusage[mem=4G]"))
        "select[type==any] rusage[mem=4G]"
        """
        if re.fullmatch(r"[\w@%+=:,./~^-]+", value):
            return value
        mark = "'" if '"' in value or "$" in value else '"'
        if mark in value:
            raise ValueError(f"{value!r}: a directive of LSF cannot hold both kinds of quotes")
        return f"{mark}{value}{mark}"

    def long(self, name: str) -> tuple[str, str]:
        """Write a long option, with a single dash."""
        return f"-{name}", " "

    def directives(self, asked: Asked) -> tuple[str, ...]:
        """Write the options, and the number of slots."""
        given = dict(asked.options)
        _, size = given.pop("ntasks", ("", None))
        given.pop("ntasks_per_node", None)
        per_node = asked.number("ntasks_per_node")
        slots = {"n": ("n", size)}
        if per_node is not None:
            slots["R"] = ("R", _resources(given.pop("R", ("", None))[1], per_node))
        return options.directives(Asked(asked.own, slots | given), self.quote, long=self.long)

    def walltime(self, asked: Asked) -> float | None:
        """Return for how many seconds a job may run, if the options say so."""
        return lsf_seconds(asked.value("W") or among(asked.own.options, r"^-W\s*(\S+)"))

    def per_node(self, asked: Asked) -> int | None:
        """Return how many workers the options put on a node."""
        return asked.number("ntasks_per_node") or whole(_spanned(asked))

    # Commands

    def hand_in(self, job: JobSpec, script: str, log: str | None) -> JobId:
        """Submit a script on bsub's standard input: only so are its directives read everywhere."""
        text = commands.text_of(script)
        done = commands.run(["bsub"], deadline=SUBMIT_DEADLINE, log=log, input=text)
        if done.status:
            raise SubmitError(done.said)
        return parse_submit(done.out, done.err)

    def find(self, job: JobSpec, script: str, log: str | None) -> JobId | None:
        """Look for the job of a script, which no other job has."""
        return parse_script(_records((), ("jobid", "job_description"), log), script)

    def poll(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask bjobs, which remembers a job that has ended for about an hour."""
        found: dict[JobId, Verdict] = {}
        for some in _batches(jobs):
            listed = verdicts(_records(some, FIELDS, log), datetime.now().astimezone())
            found |= {job: listed[job] for job in some if job in listed}
        return found

    def post_mortem(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask bjobs again; of what it has forgotten, the exit files tell."""
        try:
            return self.poll(jobs, log)
        except (CommandFailed, CommandLate, CommandMissing):
            return {}

    def cancel(self, jobs: Sequence[JobId], log: str | None = None) -> None:
        """Cancel by bkill; jobs that have ended are no error."""
        for some in _batches(jobs):
            done = commands.run(["bkill", *some], log=log)
            said = done.out + done.err
            if done.status and "already finished" not in said and not not_there(said):
                raise CommandFailed(done)

    def hopeless(self, verdict: Verdict) -> bool:
        """Tell whether a job waits for what can never come: LSF does not say so."""
        return False

    def log_files(self, asked: Asked, cwd: str, folder: str, job: JobId | None) -> list[str]:
        """Return where the job's output goes, as far as that is known."""
        given = [asked.value(name) for name in ("o", "oo", "e", "eo")]
        found = [os.path.join(folder, "log")] if self.own_log(asked) else []
        for path in given:
            known = None if path is None else str(path).replace("%J", job or "%J")
            found += [] if known is None or "%" in known else [os.path.join(cwd, known)]
        return found

    def checks(self, trial: Trial) -> Iterable[Callable[[], Iterable[Finding]]]:
        """Return the checks of the doctor."""
        from hpcdist._schedulers import lsf_checks  # which nobody else needs

        return lsf_checks.checks(trial)


@public
class LSFManager(LSF, BatchManager):
    """Workers in jobs of LSF. Keywords of `addprocs` are options of `bsub`.

    Args:
        n: How many workers, in one job unless `split` says otherwise.
        via: The login host, as "[user@]host[:port]", where this process is not on one.
        ssh: The program that leads there, with what always follows it.

    Example:
        >>> import hpcdist
        >>> script = hpcdist.LSFManager(16).job_script(q="normal", W="1:00", R="span[ptile=8]")
        >>> [line for line in script.splitlines() if line.startswith(("#BSUB -q", "#BSUB -R"))]
        ['#BSUB -q normal', '#BSUB -R "span[ptile=8]"']
    """

    # It is a scheduler and a manager of it, so that a site's own class can change either.
    def __init__(self, n: int, *, via: str | None = None, ssh: str | Sequence[str] = "ssh") -> None:
        LSF.__init__(self)
        BatchManager.__init__(self, self, n, via=via, ssh=ssh)


def _spanned(asked: Asked) -> str | None:
    """Return the K of span[ptile=K]."""
    match = re.search(r"\bptile=([0-9]+)", str(asked.value("R") or ""))
    return match[1] if match else None


def _resources(given: object, per_node: int) -> list[object]:
    """Add to resource requirements how many slots of a host are taken; bsub joins several."""
    before = list(given) if isinstance(given, list | tuple) else [given]
    return [*(item for item in before if item), f"span[ptile={per_node}]"]


def _records(jobs: Sequence[str], fields: Sequence[str], log: str | None) -> list[dict[str, str]]:
    """Ask bjobs, in JSON where it knows that."""
    done = commands.run(["bjobs", "-a", "-json", "-o", " ".join(fields), *jobs], log=log)
    found = parse_records(done.out)
    if found is None and re.search(r"(Illegal|[Uu]nrecognized|[Ii]nvalid) option|json", done.err):
        form = f"{' '.join(fields)} delimiter='|'"
        done = commands.run(["bjobs", "-a", "-noheader", "-o", form, *jobs], log=log)
        found = parse_lines(done.out, fields) or None
    if found is None and not not_there(done.out + done.err):
        raise CommandFailed(done)
    return found or []


def _batches(jobs: Sequence[JobId]) -> Iterator[Sequence[JobId]]:
    for start in range(0, len(jobs), JOBS_AT_ONCE):
        yield jobs[start : start + JOBS_AT_ONCE]
