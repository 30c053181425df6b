"""PBS (OpenPBS, PBS Professional): its options and its commands. What they print: `pbs_words`."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpcdist._contract.managers import Settings
from hpcdist._numbers import whole
from hpcdist._public import public
from hpcdist._schedulers import commands
from hpcdist._schedulers.batch_manager import BatchManager
from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._schedulers.findings import Finding, Trial
from hpcdist._schedulers.job import JobId, JobSpec
from hpcdist._schedulers.options import Asked, contradiction
from hpcdist._schedulers.pbs_words import (
    chunks,
    has_id,
    is_torque,
    never_starts,
    only_about_jobs,
    parse_found,
    parse_jobs,
    parse_submit,
    verdict_of,
    without_history,
)
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.verdict import Verdict
from hpcdist._schedulers.walltime import among, clock_seconds

SUBMIT_DEADLINE = 150.0
JOBS_AT_ONCE = 50
LOST_DEADLINE = 90.0

# Options of qsub that would make something else of the job than a launch can live with.
IMPOSSIBLE = {
    "J": ("split=", "hpcdist makes the job array itself"),
    "I": ("addprocs", "a worker has no terminal"),
    "z": ("addprocs", "qsub would not say the job's id"),
    "C": ("template=", "a template says how directives are written"),
}
ALIASES = {
    "queue": "q",
    "account": "A",
    "project": "P",
    "job_name": "N",
    "ntasks_per_node": "mpiprocs",
}
# What a chunk of `select` has. PBS refuses them beside it (msg_invaljobresc in pbs_messages.c).
CHUNK = ("ncpus", "mpiprocs", "ompthreads", "ngpus")
# What only a job without `select` may ask for as a whole: PBS makes one chunk of it.
_WHOLE = ("mem", "vmem")

# pbs_tmrsh runs an argv, with no shell (seen with 23.06), on a host of the job's node file.
# Options without a value: qsub(1B) of OpenPBS 23.06.
BARE = frozenset({"-f", "-h", "-I", "-V", "-X", "-z"})


class PBS(Scheduler):
    """PBS, as `qsub`, `qstat`, `qselect` and `qdel` show it."""

    name = "pbs"
    program = "qsub"  # Grid Engine has one too
    prefix = "#PBS"
    aliases = ALIASES
    bare = BARE
    impossible = IMPOSSIBLE
    time_option = "walltime"
    a_minute = {"walltime": "60"}  # noqa: RUF012
    template = "pbs.sh.j2"
    task_variable = "PBS_ARRAY_INDEX"
    shortest_array = 2  # "illegal -J value"
    longest_array = 1000  # max_array_size is 10000 unless the site says otherwise
    remote = ("pbs_tmrsh", "{host}", "/bin/sh", "-c", "{command}")

    def read(self, given: Mapping[str, object]) -> Asked:
        """Read the options of a launch, also those given by `l=`."""
        return super().read(_spread(given))

    def directives(self, asked: Asked) -> tuple[str, ...]:
        """Write the options: all but qsub's letters are resources."""
        written = {
            # A resource has a value: `-l name=true`.
            key: (key, value) if len(key) == 1 else (name, "true" if value is True else value)
            for key, (name, value) in asked.options.items()
        }
        return super().directives(replace(asked, options=written))

    def defaults(self, job: JobSpec, settings: Settings) -> dict[str, Any]:
        """Return what a job has unless its user says otherwise."""
        asked = job.options
        log = os.path.join(job.folder, "pbs.^array_index^.log" if job.tasks else "pbs.log")
        at_once = f"%{job.max_running}" if job.max_running else ""
        return {
            "N": job.name,
            "S": "/bin/bash",  # whatever the user's own shell is
            # "cannot submit non-rerunable Array Job" (qsub): a task whose host is lost waits again.
            "r": "y" if job.tasks else "n",
            "J": f"0-{job.tasks - 1}{at_once}" if job.tasks else None,
            "j": "oe" if asked.value("e") is None else None,
            # Written from the start, in its place: what hosts other than the first say, and PBS.
            # A path with other letters than ASCII's is refused.
            "k": "doe" if log.isascii() else None,
            "o": log if log.isascii() else None,
            **dict.fromkeys((*CHUNK, "ntasks")),
            **self._resources(asked, settings, job.size),
        }

    def _resources(self, asked: Asked, settings: Settings, size: int) -> dict[str, Any]:
        raw = " ".join(asked.own.options)
        if asked.value("select", "nodes") is not None or re.search("(select|nodes)=", raw):
            return {}
        if asked.value(*_WHOLE) is not None:
            return {"ncpus": asked.value("ncpus") or size}
        each = int(asked.value("mpiprocs") or 1)
        threads = None if settings.enable_threaded_blas else 1
        also = {"ompthreads": asked.value("ompthreads") or threads, "ngpus": asked.value("ngpus")}
        full, rest = divmod(size, each)
        made = [(full, each), (1, rest)]
        select = "+".join(
            ":".join(
                [f"{count}:ncpus={asked.value('ncpus') or workers}:mpiprocs={workers}"]
                + [f"{key}={value}" for key, value in also.items() if value is not None]
            )
            for count, workers in made
            if count and workers
        )
        apart = each > 1 and size > each and asked.value("place") is None
        return {"select": select} | ({"place": "scatter"} if apart else {})

    def forced(self, asked: Asked) -> Iterable[str]:
        """Return the options whose place in the script the defaults know better."""
        return (*CHUNK, "ntasks")

    def check(self, asked: Asked, settings: Settings, n: int) -> None:
        """Refuse options that contradict each other."""
        advice = "say it in select=, chunk by chunk"
        for written in ("select", "nodes", *_WHOLE):
            for name in CHUNK if written not in _WHOLE else CHUNK[1:]:
                if None not in (asked.value(written), asked.value(name)):
                    raise contradiction(asked.spelling(written), asked.spelling(name), advice)
        for name in ("ncpus", "mpiprocs"):
            value = asked.value(name)
            if value is not None and not re.fullmatch("[1-9][0-9]*", str(value)):
                raise ValueError(f"{asked.spelling(name)}: must be a number of 1 or more")
        select = asked.value("select")
        wanted = sum(count for count, _ in chunks(str(select or "")))
        if asked.own.split == "node" and wanted > 1:
            raise contradiction(
                "split='node'", asked.spelling("select"), "such a job has one chunk"
            )

    def quote(self, value: str) -> str:
        """Write a value as qsub reads it: it knows quotes, which hide all but themselves."""
        return (
            value if re.fullmatch(r"[\w@%+=:,./~^*\[\]&|!<>()#-]+", value) else shlex.quote(value)
        )

    def long(self, name: str) -> tuple[str, str]:
        """Write a resource."""
        return f"-l {name}", "="

    def walltime(self, asked: Asked) -> float | None:
        """Return for how many seconds a job may run, if the options say so."""
        raw = among(asked.own.options, r"\bwalltime=([\d:.]+)")
        return clock_seconds(asked.value("walltime") or raw)

    def per_node(self, asked: Asked) -> int | None:
        """Return how many workers the options put on a node."""
        if (select := asked.value("select")) is not None:
            given = chunks(str(select))[0][1].get("mpiprocs")
        else:
            given = asked.value("mpiprocs")
        return None if given is None else whole(str(given))

    def task(self, array: JobId, index: int) -> JobId:
        """Return the id of a task of a job array: that of "26[].head" is "26[1].head"."""
        return JobId(array.replace("[]", f"[{index}]"))

    # Commands

    def hand_in(self, job: JobSpec, script: str, log: str | None) -> JobId:
        """Submit a script by qsub, which runs here and leaves no daemon behind (-f)."""
        try:
            version = commands.run(["qstat", "--version"], log=log)
        except CommandLate as exc:
            raise SubmitError(f"{exc}; nothing was submitted") from exc
        if is_torque(version.out or version.err):
            raise SubmitError(
                "this is Torque, whose options and answers differ from those of OpenPBS and "
                f"PBS Professional: PBSManager does not support it ({version.said.splitlines()[0]})"
            )
        asked = job.options
        waits = "block" in f"{asked.value('W')}{asked.own.options}"
        argv = ["qsub", "-f", script]
        until = has_id if waits else None
        done = commands.run(argv, deadline=SUBMIT_DEADLINE, log=log, until=until)
        if done.status and "usage:" in done.said.lower():
            argv.remove("-f")  # a wrapper of the site's may not know it
            done = commands.run(argv, deadline=SUBMIT_DEADLINE, log=log, until=until)
        if done.status:
            raise SubmitError(done.said)
        return parse_submit(done.out, done.err)

    def find(self, job: JobSpec, script: str, log: str | None) -> JobId | None:
        """Look for the job of a script, which no other job has."""
        mine = commands.run(["qselect", "-u", commands.user()], log=log)
        if mine.status:
            raise CommandFailed(mine)
        ids = mine.out.split()
        if not ids:
            return None
        return parse_found(commands.run(["qstat", "-f", "-F", "json", *ids], log=log).out, script)

    def poll(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask qstat, which prints what it knows whatever its exit status is."""
        found: dict[JobId, Verdict] = {}
        for start in range(0, len(jobs), JOBS_AT_ONCE):
            some = list(jobs[start : start + JOBS_AT_ONCE])
            done = commands.run(["qstat", "-x", "-f", "-F", "json", *some], log=log)
            if without_history(done.said):
                done = commands.run(["qstat", "-f", "-F", "json", *some], log=log)
            listed = parse_jobs(done.out)
            if done.status and not listed and not only_about_jobs(done.err):
                raise CommandFailed(done)
            found |= {job: verdict_of(listed[job]) for job in some if job in listed}
        return found

    def post_mortem(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask for the history, which may be switched off."""
        try:
            return self.poll(jobs, log)
        except (CommandFailed, CommandLate, CommandMissing):
            return {}

    def cancel(self, jobs: Sequence[JobId], log: str | None = None) -> None:
        """Cancel by qdel; jobs that have ended, or are about to, are no error."""
        for start in range(0, len(jobs), JOBS_AT_ONCE):
            done = commands.run(["qdel", *jobs[start : start + JOBS_AT_ONCE]], log=log)
            if done.status and not only_about_jobs(done.err):
                raise CommandFailed(done)

    def cancel_lost(self, number: JobId) -> None:
        """Cancel a job by force: the server forgets it, and has its other hosts end it.

        As long as the server believes in the host, it waits for it, deaf to everybody, for a minute
        and then refuses ("qdel: Server could not connect to MOM 2.head"); asked by force again, it
        obeys at once (seen with 23.06.06). Where a site does not allow that, without force.
        """
        force = ["qdel", "-W", "force", number]
        for argv in (force, force, ["qdel", number]):
            done = commands.run(argv, deadline=LOST_DEADLINE)
            if not done.status or only_about_jobs(done.err):
                return
        raise CommandFailed(done)

    def hopeless(self, verdict: Verdict) -> bool:
        """Tell whether a job waits for what can never come."""
        return verdict.state.waiting and never_starts(verdict.reason)

    def own_log(self, asked: Asked) -> bool:
        """Tell whether the script itself writes its output into the run's folder."""
        return asked.value("o") is None

    def log_files(self, asked: Asked, cwd: str, folder: str, job: JobId | None) -> list[str]:
        """Return where the job's output goes, as far as that is known."""
        given = [asked.value("o"), asked.value("e")]
        found = [os.path.join(os.getcwd(), str(path)) for path in given if path is not None]
        if given[0] is None:
            found += [os.path.join(folder, "log"), os.path.join(folder, "pbs.log")]
        return found

    def checks(self, trial: Trial) -> Iterable[Callable[[], Iterable[Finding]]]:
        """Return the checks of the doctor."""
        from hpcdist._schedulers import pbs_checks  # which nobody else needs

        return pbs_checks.checks(trial)


@public
class PBSManager(PBS, BatchManager):
    """Workers in jobs of PBS. Keywords of `addprocs` are options and resources of `qsub`.

    Args:
        n: How many workers, in one job unless `split` says otherwise.
        via: The login host, as "[user@]host[:port]", where this process is not on one.
        ssh: The program that leads there, with what always follows it.

    Example:
        >>> import hpcdist
        >>> manager = hpcdist.PBSManager(128)
        >>> script = manager.job_script(q="debug", walltime="00:05:00")
        >>> [line for line in script.splitlines() if "walltime" in line or " -q " in line]
        ['#PBS -q debug', '#PBS -l walltime=00:05:00']
    """

    # It is a scheduler and a manager of it, so that a site's own class can change either.
    def __init__(self, n: int, *, via: str | None = None, ssh: str | Sequence[str] = "ssh") -> None:
        PBS.__init__(self)
        BatchManager.__init__(self, self, n, via=via, ssh=ssh)


def _spread(given: Mapping[str, object]) -> dict[str, Any]:
    """Take what is given in qsub's own way, by `l=`, for the resources it names.

    >>> _spread({"l": ["select=1:ncpus=2,walltime=1:00", "place=free"], "q": "debug"})
    {'q': 'debug', 'select': '1:ncpus=2', 'walltime': '1:00', 'place': 'free'}
    """
    rest = {name: value for name, value in given.items() if name.lstrip("-") != "l"}
    lines = [value for name, value in given.items() if name.lstrip("-") == "l"]
    for line in lines:
        for item in line if isinstance(line, list | tuple) else [line]:
            pairs = (part.partition("=") for part in str(item).split(","))
            rest |= {name: value or True for name, _, value in pairs}
    return rest
