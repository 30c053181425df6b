"""Grid Engine: its options and its commands. What the commands print is read in `sge_words`."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from hpcdist._contract.managers import Settings
from hpcdist._public import public
from hpcdist._schedulers import commands, options
from hpcdist._schedulers.batch_manager import BatchManager
from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._schedulers.findings import Finding, Trial
from hpcdist._schedulers.job import JobId, JobSpec, jobs_folder
from hpcdist._schedulers.launchers import like_rsh
from hpcdist._schedulers.options import Asked, contradiction
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.sge_words import (
    OPTIONS,
    YES_OR_NO,
    expand,
    in_error,
    parse_environments,
    parse_qacct,
    parse_qstat,
    parse_reasons,
    parse_script,
    parse_submit,
)
from hpcdist._schedulers.verdict import JobState, Verdict
from hpcdist._schedulers.walltime import among, clock_seconds

SUBMIT_DEADLINE = 150.0  # a job submission verifier of the site's may take its time
JOBS_AT_ONCE = 50
USUAL_ENVIRONMENT = "mpi"

# Options of qsub that would make something else of the job than a launch can live with.
IMPOSSIBLE = {
    "t": ("split=", "hpcdist makes the job array itself"),
    "b": ("template=", "the script is rendered from a template"),
    "sync": ("addprocs", "it waits for the workers itself, and `hpcdist submit --wait` for a job"),
    "verify": ("addprocs", "nothing would be submitted; `hpcdist doctor` tests a script so"),
    "cwd": ("dir=", "dir= says where workers run"),
}
# What is ours though it may be spelled like a resource.
_NO_DIRECTIVES = frozenset({"pe", "ntasks", "ntasks_per_node"})
# Options without a value, as they are written on our command line: qsub(1) of 8.1.9.
BARE = frozenset({"-V", "-h", "--clear", "--hard", "--notify", "--soft", "--verbose"})


class SGE(Scheduler):
    """Grid Engine, as `qsub`, `qstat`, `qacct`, `qconf` and `qdel` show it."""

    name = "sge"
    program = "qconf"  # other schedulers have a qsub, too
    prefix = "#$"
    bare = BARE
    dir_option = "wd"
    impossible = IMPOSSIBLE
    time_option = "h_rt"
    a_minute = {"h_rt": "60"}  # noqa: RUF012
    template = "sge.sh.j2"
    task_variable = "SGE_TASK_ID"
    first_task = 1
    longest_array = 1000  # max_aj_tasks is 75000 unless the site says otherwise: sge_conf(5)
    remote = like_rsh("qrsh", "-inherit")
    lists_hosts = True

    def __init__(self) -> None:
        self._deleted: set[JobId] = set()  # seen while they were: accounting does not tell

    def defaults(self, job: JobSpec, settings: Settings) -> dict[str, Any]:
        """Return what a job has unless its user says otherwise."""
        return {
            "N": job.name,
            "S": "/bin/bash",  # many a queue's shell is csh
            "wd": settings.dir,
            "o": os.path.join(job.folder, "log"),
            "j": "y",
            "r": "n",
            "pe": USUAL_ENVIRONMENT if job.size > 1 else None,
            "ntasks": job.size,
            "t": f"1-{job.tasks}" if job.tasks else None,
            "tc": job.max_running,
        }

    def check(self, asked: Asked, settings: Settings, n: int) -> None:
        """Refuse options that contradict each other."""
        name, _, slots = str(asked.value("pe") or "").partition(" ")
        if slots.strip() not in ("", str(n)):
            advice = "the manager's number says how many workers there are"
            raise contradiction(f"SGEManager({n})", asked.spelling("pe"), advice)
        if not re.fullmatch(r"[^\s#'\"]*", name):
            raise ValueError(f"pe={name!r} is no name of a parallel environment")
        if asked.value("ntasks_per_node") is not None and asked.own.split != "node":
            advice = "the allocation rule of the parallel environment says so"
            raise contradiction("Grid Engine", asked.spelling("ntasks_per_node"), advice)
        base = asked.own.job_dir or jobs_folder()
        if set(base) & set(",:$") and asked.value("o") is None:
            raise ValueError(f"job_dir={base!r}: Grid Engine takes no path with one of , : $")

    def quote(self, value: str) -> str:
        """Write a value as qsub reads it, which drops quotes and what follows a #, anywhere.

        >>> SGEManager(1).quote("a b")
        '"a b"'
        """
        if re.search(r"""[#"']""", value):
            raise ValueError(f"{value!r}: a directive of Grid Engine can hold neither # nor quotes")
        return f'"{value}"' if re.search(r"\s", value) or not value else value

    def long(self, name: str) -> tuple[str, str]:
        """Write a long option, with a single dash; what is no option is a resource."""
        return (f"-{name}", " ") if name in OPTIONS else (f"-l {name}", "=")

    def directives(self, asked: Asked) -> tuple[str, ...]:
        """Write the options, and the parallel environment with its slots."""
        given = {
            name: (written, "y" if value is True and name in YES_OR_NO else value)
            for name, (written, value) in asked.options.items()
            if name not in _NO_DIRECTIVES
        }
        lines = options.directives(Asked(asked.own, given), self.quote, long=self.long)
        environment = str(asked.value("pe") or "").partition(" ")[0]
        pe = (f"-pe {environment} {asked.value('ntasks')}",) if environment else ()
        split = len(lines) - len(asked.own.options)
        return (*lines[:split], *pe, *lines[split:])

    def walltime(self, asked: Asked) -> float | None:
        """Return for how many seconds a job may run, if the options say so."""
        others = (str(asked.value("l")), *asked.own.options)
        raw = among(others, r"\bh_rt=([\d:]+)")
        return clock_seconds(asked.value("h_rt") or raw)

    def task(self, array: JobId, index: int) -> JobId:
        """Return the id of a task of a job array: "9.1" is the first of 9."""
        return JobId(f"{array}.{index + 1}")

    # Commands

    def hand_in(self, job: JobSpec, script: str, log: str | None) -> JobId:
        """Submit a script by qsub."""
        done = commands.run(["qsub", "-terse", script], deadline=SUBMIT_DEADLINE, log=log)
        if done.status and "parallel environment" in done.said:
            raise SubmitError(f"{done.said}\n{_known_environments(log)}")
        if done.status:
            raise SubmitError(done.said)
        return parse_submit(done.out, done.err)

    def find(self, job: JobSpec, script: str, log: str | None) -> JobId | None:
        """Look for the job of a script, which no other job has."""
        for some in _batches(_numbers(parse_qstat(_listed(log)))):
            found = parse_script(_details(some, log), script)
            if found is not None:
                return found
        return None

    def poll(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask qstat for the jobs, and then why some of them wait."""
        listed = parse_qstat(_listed(log))
        found = {job: listed[job] for job in jobs if job in listed}
        self._deleted |= {job for job in found if found[job].word.startswith("d")}
        waiting = [job for job in found if found[job].state.waiting]
        reasons: dict[str, str] = {}
        for some in _batches(_numbers(waiting)):
            reasons |= parse_reasons(_details(some, log))
        for job in waiting:
            if (number := job.partition(".")[0]) in reasons:
                found[job] = replace(found[job], reason=reasons[number])
        return found

    def post_mortem(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask qacct, which lags behind, may be forbidden, and knows nothing of what still runs."""
        try:
            found = self.poll(jobs, log)
        except (CommandFailed, CommandLate, CommandMissing):
            found = {}
        gone = [job for job in jobs if job not in found]
        for number in _numbers(gone):
            told = parse_qacct(_try(["qacct", "-j", number], log))
            for job in gone:
                if job in told and job.partition(".")[0] == number:
                    found[job] = self._cancelled(told[job]) if job in self._deleted else told[job]
        return found

    @staticmethod
    def _cancelled(told: Verdict) -> Verdict:
        if told.state is not JobState.FAILED or told.signal is None:
            return told
        return replace(told, state=JobState.CANCELLED, word="CANCELLED")

    def cancel(self, jobs: Sequence[JobId], log: str | None = None) -> None:
        """Cancel by qdel; jobs that have ended are no error."""
        for some in _batches(jobs):
            done = commands.run(["qdel", ",".join(some)], log=log)
            said = done.out + done.err
            if done.status and "does not exist" not in said and "already in deletion" not in said:
                raise CommandFailed(done)

    def cancel_lost(self, number: JobId) -> None:
        """Cancel a job; by force, where users may (qmaster_params ENABLE_FORCED_QDEL).

        Without it a job whose host does not answer stays in deletion until it does.
        """
        done = commands.run(["qdel", "-f", number])
        if done.status:
            self.cancel([number])

    def hopeless(self, verdict: Verdict) -> bool:
        """Tell whether a job waits for what can never come: it could not be started."""
        return verdict.state.waiting and in_error(verdict.word)

    def own_log(self, asked: Asked) -> bool:
        """Tell whether the script itself writes its output into the run's folder.

        What Grid Engine says is there before, in a file that the tasks of a job array share.
        """
        return asked.value("o") is None

    def log_files(self, asked: Asked, cwd: str, folder: str, job: JobId | None) -> list[str]:
        """Return where the job's output goes, as far as that is known."""
        output, error = asked.value("o"), asked.value("e")
        name = str(asked.value("N") or os.path.basename(folder))
        found = [os.path.join(folder, "log")] if output is None else []
        for given in (output, error):
            path = None if given is None else expand(str(given), job, name, _user())
            found += [] if path is None else [os.path.join(cwd, path)]
        return found

    def checks(self, trial: Trial) -> Iterable[Callable[[], Iterable[Finding]]]:
        """Return the checks of the doctor."""
        from hpcdist._schedulers import sge_checks  # which nobody else needs

        return sge_checks.checks(trial)


@public
class SGEManager(SGE, BatchManager):
    """Workers in jobs of Grid Engine. Keywords of `addprocs` are options of `qsub`, or resources.

    Args:
        n: How many workers, in one job unless `split` says otherwise.
        via: The login host, as "[user@]host[:port]", where this process is not on one.
        ssh: The program that leads there, with what always follows it.

    Example:
        >>> import hpcdist
        >>> script = hpcdist.SGEManager(16).job_script(pe="orte", q="long.q", h_rt="01:00:00")
        >>> "#$ -l h_rt=01:00:00" in script, "#$ -pe orte 16" in script
        (True, True)
    """

    # It is a scheduler and a manager of it, so that a site's own class can change either.
    def __init__(self, n: int, *, via: str | None = None, ssh: str | Sequence[str] = "ssh") -> None:
        SGE.__init__(self)
        BatchManager.__init__(self, self, n, via=via, ssh=ssh)


def _user() -> str:
    if (host := commands.place()) is not None:
        return host.user
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _listed(log: str | None) -> str:
    """Return `qstat -xml`: all jobs of this user that have not ended."""
    done = commands.run(["qstat", "-xml", "-g", "d", "-u", _user()], log=log)  # d: all tasks
    if done.status or "</job_info>" not in done.out:
        raise CommandFailed(done)
    return done.out


def _details(jobs: Sequence[str], log: str | None) -> str:
    return _try(["qstat", "-xml", "-j", ",".join(jobs)], log)


def _known_environments(log: str | None) -> str:
    known = ", ".join(parse_environments(_try(["qconf", "-spl"], log))) or "none"
    return f"parallel environments here: {known}; pe= chooses one"


def _numbers(jobs: Iterable[str]) -> list[str]:
    """Return the numbers of jobs, without those of tasks."""
    return list(dict.fromkeys(job.partition(".")[0] for job in jobs))


def _batches(jobs: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(jobs), JOBS_AT_ONCE):
        yield jobs[start : start + JOBS_AT_ONCE]


def _try(argv: Sequence[str], log: str | None) -> str:
    """Return what a command prints; nothing where it has no answer."""
    try:
        return commands.run(argv, log=log).out
    except (CommandLate, CommandMissing):
        return ""
