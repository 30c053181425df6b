"""PBS (OpenPBS, PBS Professional): its options and its commands. What they print: `pbs_words`."""

from __future__ import annotations

import getpass
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpcdist._managers.base import Settings
from hpcdist._managers.batch import commands
from hpcdist._managers.batch.base import BatchManager
from hpcdist._managers.batch.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._managers.batch.job import JobId
from hpcdist._managers.batch.options import Asked, contradiction
from hpcdist._managers.batch.pbs_words import (
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
from hpcdist._managers.batch.verdict import Verdict

SUBMIT_DEADLINE = 150.0
JOBS_AT_ONCE = 50

# Options of qsub that would make something else of the job than a launch can live with.
IMPOSSIBLE = {
    "J": ("split=", "hpcdist makes as many jobs as are needed"),
    "I": ("addprocs", "nobody sits at a worker's terminal"),
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


class PBSManager(BatchManager):
    """Workers in jobs of PBS. Keywords of `addprocs` are options and resources of `qsub`.

    Args:
        n: How many workers, in one job unless `split` says otherwise.

    Example:
        >>> import hpcdist
        >>> manager = hpcdist.PBSManager(128)
        >>> script = manager.job_script(q="debug", walltime="00:05:00")
        >>> [line for line in script.splitlines() if "walltime" in line or " -q " in line]
        ['#PBS -q debug', '#PBS -l walltime=00:05:00']
    """

    scheduler = "pbs"
    prefix = "#PBS"
    template = "pbs.sh.j2"
    remote = ("pbs_tmrsh", "{host}", "/bin/sh", "-c", "{command}")
    aliases = ALIASES

    def asked(self, settings: Settings) -> Asked:
        """Read and check the options of a launch; nothing is made and nothing is asked."""
        found = super().asked(replace(settings, extra=_spread(settings.extra)))
        # All but qsub's letters are resources, and a resource has a value: `-l name=true`.
        return replace(
            found,
            options={
                key: (key, value) if len(key) == 1 else (name, "true" if value is True else value)
                for key, (name, value) in found.options.items()
            },
        )

    def defaults(
        self, asked: Asked, settings: Settings, size: int, folder: str, *, tasks: int, name: str
    ) -> dict[str, Any]:
        """Return what a job has unless its user says otherwise."""
        log = os.path.join(folder, "pbs.log")
        return {
            "N": name,
            "S": "/bin/bash",  # whatever the user's own shell is
            "r": "n",
            "j": "oe" if asked.value("e") is None else None,
            # Written from the start, in its place: what hosts other than the first say, and PBS.
            # A path with other letters than ASCII's is refused.
            "k": "doe" if log.isascii() else None,
            "o": log if log.isascii() else None,
            **dict.fromkeys((*CHUNK, "ntasks")),
            **self._resources(asked, settings, size),
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

    def check(self, asked: Asked, settings: Settings) -> None:
        """Refuse options that contradict each other."""
        own = asked.own
        for name, (ours, advice) in IMPOSSIBLE.items():
            if asked.value(name) is not None:
                raise contradiction(ours, asked.spelling(name), advice)
        if own.mpi is not None or own.launcher == "srun":
            theirs = f"mpi={own.mpi!r}" if own.mpi is not None else "launcher='srun'"
            raise contradiction(repr(self), theirs, "with PBS the MPI's own mpiexec starts ranks")
        tasks = asked.value("ntasks")
        if tasks is not None and str(tasks) != str(self.n):
            advice = "the manager's number says how many workers there are"
            raise contradiction(repr(self), asked.spelling("ntasks"), advice)
        advice = "say it in select=, chunk by chunk"
        for written in ("select", "nodes", *_WHOLE):
            for name in CHUNK if written not in _WHOLE else CHUNK[1:]:
                if None not in (asked.value(written), asked.value(name)):
                    raise contradiction(asked.spelling(written), asked.spelling(name), advice)
        for name in ("ncpus", "mpiprocs"):
            value = asked.value(name)
            if value is not None and not re.fullmatch("[1-9][0-9]*", str(value)):
                raise ValueError(f"{asked.spelling(name)}: a number of 1 or more is wanted")
        select = asked.value("select")
        if own.split == "node" and select is not None and len(chunks(str(select))) > 1:
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

    def per_node(self, asked: Asked) -> int | None:
        """Return how many workers the options put on a node."""
        if (select := asked.value("select")) is not None:
            given = chunks(str(select))[0].get("mpiprocs")
        else:
            given = asked.value("mpiprocs")
        return None if given is None or not str(given).isdigit() else int(given)

    # Commands

    def hand_in(self, script: str, asked: Asked, log: str | None) -> JobId:
        """Submit a script by qsub, which runs here and leaves no daemon behind (-f)."""
        try:
            version = commands.run(["qstat", "--version"], log=log)
        except CommandLate as exc:
            raise SubmitError(f"{exc}; nothing was submitted") from exc
        if is_torque(version.out or version.err):
            raise SubmitError(
                "this is Torque, whose options and answers are others than those of OpenPBS and "
                f"PBS Professional: PBSManager does not know it ({version.said.splitlines()[0]})"
            )
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

    def find(self, script: str, asked: Asked, log: str | None) -> JobId | None:
        """Look for the job of a script, which no other job has."""
        mine = commands.run(["qselect", "-u", getpass.getuser()], log=log)
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

    def hopeless(self, verdict: Verdict) -> bool:
        """Tell whether a job waits for what can never come."""
        return verdict.state.waiting and never_starts(verdict.reason)

    def own_log(self, asked: Asked) -> bool:
        """Whether the script writes its output into the run's folder by itself."""
        return asked.value("o") is None

    def log_files(self, asked: Asked, cwd: str, folder: str, job: JobId | None) -> list[str]:
        """Return where the job's output goes, as far as that can be told."""
        given = [asked.value("o"), asked.value("e")]
        found = [os.path.join(os.getcwd(), str(path)) for path in given if path is not None]
        if given[0] is None:
            found += [os.path.join(folder, "log"), os.path.join(folder, "pbs.log")]
        return found


def _spread(given: Mapping[str, Any]) -> dict[str, Any]:
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
