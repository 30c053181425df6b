"""Slurm: its options and its commands. What the commands print is read in `slurm_words`."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpcdist._contract.managers import Settings
from hpcdist._keeper import installed_mpi
from hpcdist._public import public
from hpcdist._schedulers import allocation, commands
from hpcdist._schedulers.allocation import StepId
from hpcdist._schedulers.batch_manager import BatchManager
from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._schedulers.findings import Finding, Trial
from hpcdist._schedulers.job import JobId, JobSpec, jobs_folder
from hpcdist._schedulers.launchers import WorldLauncher, mpiexec
from hpcdist._schedulers.options import Asked, contradiction
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.slurm_words import (
    ALIASES,
    ENDS,
    LABEL,
    expand,
    has_id,
    never_starts,
    parse_array_limit,
    parse_found,
    parse_mpi_list,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
    parse_submit,
)
from hpcdist._schedulers.verdict import Verdict
from hpcdist._schedulers.walltime import among, slurm_seconds

# sbatch itself tries 15 times, with longer and longer pauses, when the controller is busy
# (MAX_RETRIES in src/sbatch/sbatch.c): about 130 s.
SUBMIT_DEADLINE = 150.0
MPI_LIST_DEADLINE = 10.0
JOBS_AT_ONCE = 50  # several hundred ids in one command were seen to time out at sites

# Options of sbatch that would make something else of the job than a launch can live with.
IMPOSSIBLE = {
    "array": ("split=", "hpcdist makes the job array itself"),
    "wrap": ("template=", "the script is rendered from a template"),
    "test_only": ("addprocs", "nothing would be submitted; `hpcdist doctor` tests a script so"),
}

_SQUEUE_FIELDS = "%i|%T|%S|%e|%N|%r"  # the reason is free text, and so comes last
_SACCT_FIELDS = "JobID,State,ExitCode,Start,End,NodeList"
# Which MPI flavour of srun goes with which library; the first that Slurm has is taken.
_FLAVOURS: dict[str, tuple[str, ...]] = {
    "mpich": ("pmi2",),
    "intel": ("pmi2",),
    "openmpi": ("pmix",),
}
_USUAL_FLAVOURS = frozenset({"none", "pmi2", "pmix"})
# srun(1). Deaths stay apart: no task ends the others, nor does a lost node. A step takes the job's
# environment also where the job itself was submitted with --export=NONE.
_SRUN = ("--kill-on-bad-exit=0", "--no-kill", "--wait=0", "--export=ALL")

_END = ("scancel", "--signal=KILL", "{step}")
_KILL = (
    *("srun", "--overlap", "--mpi=none", "--nodes=1", "--ntasks=1", "--nodelist={host}"),
    *("kill", "-{signal}", "{pid}"),
)
# Options without a value: sbatch(1) of 22.05 and 24.11.
BARE = frozenset(
    {
        *("-H", "--hold", "-O", "--overcommit", "-Q", "--quiet", "-k", "--no-kill", "-v"),
        *("--verbose", "-W", "--wait", "-s", "--oversubscribe", "-I", "-V", "-h"),
        *("--contiguous", "--exclusive", "--get-user-env", "--ignore-pbs", "--nice"),
        *("--no-requeue", "--requeue", "--parsable", "--propagate", "--reboot", "--spread-job"),
        *("--test-only", "--use-min-nodes", "--resv-ports", "--segment", "--stepmgr", "--wrap"),
    }
)


class Slurm(Scheduler):
    """Slurm, as `sbatch`, `squeue`, `sacct`, `scontrol`, `scancel` and `srun` show it."""

    name = "slurm"
    program = "sbatch"
    prefix = "#SBATCH"
    aliases = ALIASES
    bare = BARE
    dir_option = "chdir"
    impossible = IMPOSSIBLE
    a_minute = {"time": "1"}  # noqa: RUF012
    template = "slurm.sh.j2"
    launchers = ("srun", "mpiexec")
    has_flavours = True
    always_mpiexec = False
    task_variable = "SLURM_ARRAY_TASK_ID"
    longest_array = 1001  # unless the site says otherwise

    def defaults(self, job: JobSpec, settings: Settings) -> dict[str, Any]:
        """Return what a job has unless its user says otherwise."""
        asked = job.options
        at_once = f"%{job.max_running}" if job.max_running else ""
        folder, array = job.folder.replace("%", "%%"), ["tasks", "%a"] if job.tasks else []
        return {
            "job_name": job.name,
            "ntasks": job.size,
            "nodes": 1 if asked.own.split == "node" else None,
            "array": f"0-{job.tasks - 1}{at_once}" if job.tasks else None,
            "chdir": settings.dir,
            "output": os.path.join(folder, *array, "log"),
            "open_mode": "append",
            "no_requeue": not asked.value("requeue"),
            "no_kill": True,
        }

    def check(self, asked: Asked, settings: Settings, n: int) -> None:
        """Refuse options that contradict each other."""
        nodes = asked.value("nodes")
        if nodes is not None and asked.own.split == "node" and str(nodes) != "1":
            advice = "such a job has one node"
            raise contradiction("split='node'", asked.spelling("nodes"), advice)
        base = asked.own.job_dir or jobs_folder()
        if "\\" in base and asked.value("output") is None:
            # sbatch(1), "filename pattern": it takes all of them out.
            raise ValueError(f"job_dir={base!r}: Slurm writes no log where there is a backslash")

    def quote(self, value: str) -> str:
        """Write a value as sbatch reads it.

        It knows quotes, but a backslash escapes within single quotes too, and `#` outside of any
        begins a comment (get_argument() in src/sbatch/opt.c; seen with 22.05).

        >>> print(SlurmManager(1).quote(r"it's a\\b"))
        'it'"'"'s a\\\\b'
        """
        if re.fullmatch(r"[\w@%+=:,./~^*\[\]&|!-]+", value):
            return value
        return "'" + value.replace("\\", "\\\\").replace("'", "'\"'\"'") + "'"

    def walltime(self, asked: Asked) -> float | None:
        """Return for how many seconds a job may run, if the options say so."""
        raw = among(asked.own.options, r"^--time[= ](\S+)", r"^-t\s*(\S+)")
        return slurm_seconds(asked.value("time") or raw)

    def in_allocation(self, asked: Asked) -> bool:
        """Tell whether worlds start at once, in an allocation that this process runs in."""
        return _in_allocation(asked)

    def launcher(
        self,
        n: int,
        asked: Asked,
        isolation: str,
        found: installed_mpi.Mpi | None,
        *,
        watched: bool = True,
    ) -> WorldLauncher:
        """Choose between srun, with the flavour that fits the library, and the MPI's own."""
        own = asked.own
        wanted = _FLAVOURS[found.family] if found is not None else ("none",)
        offered = self.flavours() if found is not None else frozenset()
        fitting = [flavour for flavour in wanted if flavour in offered]
        by_mpiexec = own.launcher == "mpiexec"
        if own.launcher == "auto" and own.mpi is None and not own.srun_args and found is not None:
            apart = found.family == "openmpi" and found.version >= (5,) and found.lacks is None
            by_mpiexec = apart or not fitting
        if by_mpiexec and found is not None:
            return replace(mpiexec(n, found, watched=watched), kill=_KILL)
        flavour = own.mpi or (fitting or list(wanted))[0]
        cpus = asked.value("cpus_per_task")  # 22.05 does not hand it on to srun
        each = () if cpus is None else (f"--cpus-per-task={cpus}",)
        label = ("--label",) if watched else ()
        if _in_allocation(asked):  # beside the step that this process may be in
            nodes = asked.value("nodes")
            each = (*each, "--overlap", *(() if nodes is None else (f"--nodes={nodes}",)))
        argv = ("srun", f"--mpi={flavour}", f"--ntasks={n}", *each, *_SRUN, *label, *own.srun_args)
        one_world = flavour != "none"
        apart = not (one_world and flavour.startswith("pmix"))  # its ranks die with each other
        # By PMIx it is Open MPI. An allreduce of 4 ranks on 2 cores took 28 ms without, 0.2 with.
        env: Mapping[str, str] = installed_mpi.OPENMPI_ENV if flavour.startswith("pmix") else {}
        if flavour == "pmi2" and found is not None:
            env = found.network
        return WorldLauncher(
            argv,
            env=env,
            mpi=one_world,
            apart=apart,
            end=_END,
            kill=_KILL,
            label=LABEL,
            ends=ENDS,
            step_variables=("SLURM_JOB_ID", "SLURM_STEP_ID"),
        )

    def array_limit(self) -> int:
        """Ask for the site's MaxArraySize: one more than the greatest number of a task."""
        told = _try(["scontrol", "show", "config"], None)
        return parse_array_limit(told) or self.longest_array

    def flavours(self) -> frozenset[str]:
        """Ask srun which MPI flavours it has; what is usual where it cannot be asked."""
        try:
            host = commands.place()
            return _flavours("" if host is None else host.name)
        except (CommandMissing, CommandLate):
            return _USUAL_FLAVOURS

    # Commands

    def hand_in(self, job: JobSpec, script: str, log: str | None) -> JobId:
        """Submit a script by sbatch; or run it here, in the allocation of this process."""
        asked = job.options
        if _in_allocation(asked):
            return allocation.start(script)
        lingers = asked.value("wait") or {"-W", "--wait"} & set(asked.own.options)
        until = has_id if lingers else None
        argv = ["sbatch", "--parsable", script]
        done = commands.run(argv, deadline=SUBMIT_DEADLINE, log=log, until=until)
        if done.status and re.search(r"(unrecogni[sz]ed|unknown|invalid) option", done.said):
            argv.remove("--parsable")  # a wrapper of the site's may not know it
            done = commands.run(argv, deadline=SUBMIT_DEADLINE, log=log, until=until)
        if done.status:
            raise SubmitError(done.said)
        return parse_submit(done.out, done.err)

    def find(self, job: JobSpec, script: str, log: str | None) -> JobId | None:
        """Look for the job of a script, which no other job has."""
        clusters = job.options.value("clusters")
        where = ["-M", str(clusters)] if clusters is not None else []
        argv = ["squeue", *where, "--me", "-h", "-t", "all", "-o", "%F|%o"]
        done = commands.run(argv, log=log)
        if done.status:
            raise CommandFailed(done)
        return parse_found(done.out, script)

    def task(self, array: JobId, index: int) -> JobId:
        """Return the id of a task of a job array."""
        return JobId(f"{array}_{index}", array.cluster)

    def poll(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask squeue."""
        here = [job for job in jobs if isinstance(job, StepId)]
        found: dict[JobId, Verdict] = {step: allocation.state(step) for step in here}
        for where, some in _batches([job for job in jobs if not isinstance(job, StepId)]):
            ids = ",".join(dict.fromkeys(job.partition("_")[0] for job in some))
            argv = ["squeue", *where, "-h", "-r", "-t", "all", "-j", ids, "-o", _SQUEUE_FIELDS]
            done = commands.run(argv, log=log)
            if done.status and "Invalid job id" not in done.said:
                raise CommandFailed(done)
            listed = parse_squeue(done.out)
            found |= {job: listed[job] for job in some if job in listed}
        return found

    def post_mortem(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask sacct, which may be switched off or forbidden; then scontrol."""
        here = [job for job in jobs if isinstance(job, StepId)]
        found: dict[JobId, Verdict] = {step: allocation.state(step) for step in here}
        for where, some in _batches([job for job in jobs if not isinstance(job, StepId)]):
            argv = ["sacct", *where, "-X", "-n", "-P", "-j", ",".join(some), "-o", _SACCT_FIELDS]
            listed = parse_sacct(_try(argv, log))
            found |= {job: listed[job] for job in some if job in listed}
            for job in some:
                if job not in found or not found[job].state.terminal:
                    told = parse_scontrol(_try(["scontrol", *where, "show", "job", job], log))
                    if job in told:
                        found[job] = told[job]
        return found

    def cancel(self, jobs: Sequence[JobId], log: str | None = None) -> None:
        """Cancel by scancel; -Q: jobs that have ended are no error."""
        for step in (job for job in jobs if isinstance(job, StepId)):
            allocation.end(step)
        for where, some in _batches([job for job in jobs if not isinstance(job, StepId)]):
            done = commands.run(["scancel", *where, "-Q", *some], log=log)
            if done.status and "Invalid job id" not in done.said:
                raise CommandFailed(done)

    def hopeless(self, verdict: Verdict) -> bool:
        """Tell whether a job waits for what can never come."""
        return verdict.state.waiting and never_starts(verdict.reason)

    def log_files(self, asked: Asked, cwd: str, folder: str, job: JobId | None) -> list[str]:
        """Return where the job's output goes, as far as that is known."""
        output, error = asked.value("output"), asked.value("error")
        name = str(asked.value("job_name") or os.path.basename(folder))
        found = [os.path.join(folder, "log")] if output is None else []
        for given in (output, error):
            path = None if given is None else expand(str(given), job, name)
            found += [] if path is None else [os.path.join(cwd, path)]
        return found

    def checks(self, trial: Trial) -> Iterable[Callable[[], Iterable[Finding]]]:
        """Return the checks of the doctor."""
        from hpcdist._schedulers import slurm_checks  # which nobody else needs

        return slurm_checks.checks(trial)


@public
class SlurmManager(Slurm, BatchManager):
    """Workers in jobs of Slurm. Keywords of `addprocs` are options of `sbatch`.

    Args:
        n: How many workers, in one job unless `split` says otherwise.
        via: The login host, as "[user@]host[:port]", where this process is not on one.
        ssh: The program that leads there, with what always follows it.

    Example:
        >>> import hpcdist
        >>> manager = hpcdist.SlurmManager(128)
        >>> script = manager.job_script(partition="debug", t="00:05:00", mpi="pmi2")
        >>> [line for line in script.splitlines() if " -t " in line]
        ['#SBATCH -t 00:05:00']
    """

    # It is a scheduler and a manager of it, so that a site's own class can change either.
    def __init__(self, n: int, *, via: str | None = None, ssh: str | Sequence[str] = "ssh") -> None:
        Slurm.__init__(self)
        BatchManager.__init__(self, self, n, via=via, ssh=ssh)


def _in_allocation(asked: Asked) -> bool:
    """Tell whether the workers are to be a step of the allocation this process runs in."""
    return asked.own.launcher == "srun" and commands.place() is None and allocation.inside()


@functools.cache
def _flavours(host: str) -> frozenset[str]:
    """Ask once on each host."""
    done = commands.run(["srun", "--mpi=list"], deadline=MPI_LIST_DEADLINE)
    # Versions differ in which of the two streams they print it on.
    return parse_mpi_list(done.out + "\n" + done.err) or _USUAL_FLAVOURS


def _batches(jobs: Sequence[JobId]) -> Iterator[tuple[list[str], list[JobId]]]:
    """Yield the jobs of each cluster, some at a time, after the option that names the cluster."""
    for cluster in dict.fromkeys(job.cluster for job in jobs):
        here = [job for job in jobs if job.cluster == cluster]
        for start in range(0, len(here), JOBS_AT_ONCE):
            yield ["-M", cluster] if cluster else [], here[start : start + JOBS_AT_ONCE]


def _try(argv: Sequence[str], log: str | None) -> str:
    """Return what a command prints; nothing where it has no answer."""
    try:
        return commands.run(argv, log=log).out
    except (CommandLate, CommandMissing):
        return ""
