"""Workers in jobs of Flux: `addprocs(FluxManager(8), queue="debug", t="30m")`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from hpcdist.managers import (
    Asked,
    BatchManager,
    CommandFailed,
    Finding,
    JobId,
    JobSpec,
    JobState,
    Mpi,
    Scheduler,
    Settings,
    SubmitError,
    Trial,
    Verdict,
    WorldLauncher,
    run,
)

# flux-jobs(1), "JOB STATUS". Older releases say PENDING and RUNNING.
STATES = {
    **dict.fromkeys(("PENDING", "DEPEND", "PRIORITY", "SCHED"), JobState.QUEUED),
    **dict.fromkeys(("RUNNING", "RUN", "CLEANUP"), JobState.RUNNING),
    "COMPLETED": JobState.DONE,
    "FAILED": JobState.FAILED,
    "CANCELED": JobState.CANCELLED,
    "TIMEOUT": JobState.TIMEOUT,
}
# The last ones are free text.
FIELDS = "{id.f58}|{status}|{returncode}|{nodelist}|{t_run!D}|{sched.t_estimate!D}|{expiration!D}|"
FIELDS += "{sched.reason_pending}|{exception.note}"
SECONDS = {"": 60, "s": 1, "m": 60, "h": 3600, "d": 86400}  # RFC 23; a bare number is minutes


def parse_jobs(text: str) -> dict[JobId, Verdict]:
    """Read `flux jobs -no FIELDS`."""
    found = {}
    for line in text.splitlines():
        parts = [*line.split("|", 8), *[""] * 8]
        job, status, code, nodes, began, begins, end, reason, note = parts[:9]
        # The code of a job is its shell's, or the negative number of the signal that ended it;
        # -128: it was cancelled before it started.
        number = int(code) if re.fullmatch(r"-?[0-9]{1,4}", code) else None
        found[JobId(job)] = Verdict(
            state=STATES.get(status, JobState.UNKNOWN),
            word=status,
            reason=note or reason,
            start=_time(began or begins),
            end=_time(end),
            nodes=nodes,
            exit_code=number if number is not None and number >= 0 else None,
            signal=-number if number is not None and -128 < number < 0 else None,
            source="flux jobs",
        )
    return found


def _time(text: str) -> datetime | None:
    return datetime.fromisoformat(text).astimezone() if text else None


class Flux(Scheduler):
    """Flux, as flux-batch(1), flux-run(1), flux-jobs(1) and flux-cancel(1) describe it."""

    name = "flux"
    program = "flux"
    prefix = "#flux:"
    aliases = {"n": "nslots", "N": "nodes", "q": "queue", "t": "time_limit", "x": "exclusive"}
    bare = frozenset({"-x", "--exclusive"})
    size_option = "nslots"
    per_node_option = ""
    dir_option = "cwd"
    time_option = "time_limit"
    impossible = {"wrap": ("template=", "the script is rendered from a template")}
    a_minute = {"time_limit": "1m"}
    template = "flux.sh.j2"
    launchers = ("flux", "mpiexec")
    always_mpiexec = False
    scrubbed = ("FLUX_JOB_", "FLUX_TASK_", "FLUX_KVS_")

    def defaults(self, job: JobSpec, settings: Settings) -> dict[str, Any]:
        """Return what a job has unless its user says otherwise."""
        return {
            "job_name": job.name,
            "nslots": job.size,
            "cwd": job.cwd,
            "output": f"{job.folder}/log",
        }

    def walltime(self, asked: Asked) -> float | None:
        """Return for how many seconds a job may run, if the options say so."""
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]*)?)([smhd]?)", str(asked.value("time_limit")))
        return float(match[1]) * SECONDS[match[2]] if match else None

    def log_files(self, asked: Asked, cwd: str, folder: str, job: JobId | None) -> list[str]:
        """Return where the output goes; Flux alone knows what the user's own patterns give."""
        return [f"{folder}/log"] if asked.value("output") is None else []

    def launcher(
        self, n: int, asked: Asked, isolation: str, found: Mpi | None, *, watched: bool = True
    ) -> WorldLauncher:
        """Take `flux run`, which speaks MPICH's PMI, and Open MPI's by a plugin."""
        if asked.own.launcher == "mpiexec" and found is not None:
            return super().launcher(n, asked, isolation, found, watched=watched)
        pmix = ("-opmi=pmix",) if found is not None and found.family == "openmpi" else ()
        label = ("--label-io",) if watched else ()
        return WorldLauncher(
            # The default ends all ranks half a minute after the first has ended.
            ("flux", "run", f"-n{n}", "-oexit-timeout=none", *pmix, *label),
            label="^([0-9]+): ",
            rank_variable="FLUX_TASK_RANK",
            mpi=isolation != "process",
            apart=isolation == "process",
        )

    def hand_in(self, job: JobSpec, script: str, log: str | None) -> JobId:
        """Submit a script by `flux batch`."""
        done = run(["flux", "batch", script], deadline=150, log=log)
        if done.status:
            raise SubmitError(done.said)
        ids = re.findall(r"^[fƒ]\w+$", done.out, re.MULTILINE)
        if not ids:
            raise ValueError(f"flux batch printed no job id: {done.out!r}")
        return JobId(ids[-1])

    def find(self, job: JobSpec, script: str, log: str | None) -> JobId | None:
        """Look for the job by its name, which is no other's."""
        done = run(["flux", "jobs", "-a", "-no", "{id.f58}|{name}"], log=log)
        if done.status:
            raise CommandFailed(done)
        pairs = (line.partition("|") for line in done.out.splitlines())
        return next((JobId(number) for number, _, name in pairs if name == job.name), None)

    def poll(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask `flux jobs`, which remembers jobs that have ended."""
        done = run(["flux", "jobs", "-no", FIELDS, *jobs], log=log)
        if done.status and "unknown" not in done.err:
            raise CommandFailed(done)
        return {job: said for job, said in parse_jobs(done.out).items() if job in jobs}

    def cancel(self, jobs: Sequence[JobId], log: str | None = None) -> None:
        """Cancel by `flux cancel`; jobs that have ended are no error."""
        done = run(["flux", "cancel", *jobs], log=log)
        if done.status and "inactive" not in done.err:
            raise CommandFailed(done)

    def checks(self, trial: Trial) -> Iterable[Callable[[], Iterable[Finding]]]:
        """Return the checks of `hpcdist doctor`."""
        return [self._answers, lambda: [Finding.fact(f"ranks start by {trial.launcher().argv[0]}")]]

    def _answers(self) -> Iterable[Finding]:
        done = run(["flux", "resource", "list"])
        if done.status:
            yield Finding.bad("no Flux instance answers", "go to where one runs", done.said)
        else:
            yield Finding.good("Flux answers")
            yield Finding.fact("resources:", done.out.rstrip())


class FluxManager(BatchManager):
    """Workers in jobs of Flux. Keywords of `addprocs` are options of `flux batch`."""

    def __init__(self, n: int) -> None:
        super().__init__(Flux(), n)
