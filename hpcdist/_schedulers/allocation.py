"""Worlds as steps of the allocation this process runs in, instead of jobs of their own.

The script is the same as a job's; it runs here, beside this process, and its launcher finds the
allocation in the environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading

from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.verdict import JobState, Verdict

# What Slurm's launcher would take for options of a new step (srun(1), "INPUT ENVIRONMENT
# VARIABLES"), and what marks a process as a task of an older one.
_OF_A_STEP = (
    *("SLURM_STEP", "SLURM_TASK", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_CPU_BIND", "SLURM_MPI"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_GTIDS", "SLURM_SRUN", "SLURM_LAUNCH"),
    *("SLURM_DISTRIBUTION", "SLURM_CPUS_PER_TASK", "SLURM_MEM_PER", "SLURM_NNODES", "SLURM_UMASK"),
    *("SRUN_", "PMI", "OMPI_", "PRTE_", "HYD", "MPI_LOCAL"),
)


class StepId(JobId):
    """An allocation, and the process that runs a step in it for us."""

    process: subprocess.Popen[bytes]


def inside() -> bool:
    """Tell whether this process runs in an allocation."""
    return "SLURM_JOB_ID" in os.environ


def start(script: str) -> StepId:
    """Run a job's script here."""
    log = os.open(os.path.join(os.path.dirname(script), "log"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        process = subprocess.Popen(
            ["/bin/bash", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={k: v for k, v in os.environ.items() if not k.startswith(_OF_A_STEP)},
            start_new_session=True,
        )
    finally:
        os.close(log)
    step = StepId(os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_CLUSTERS"))
    step.process = process
    threading.Thread(target=process.wait, name="hpcdist-step", daemon=True).start()
    return step


def state(step: StepId) -> Verdict:
    """Tell how a step stands."""
    status = step.process.returncode
    if status is None:
        return Verdict(state=JobState.RUNNING, word="RUNNING", source="process")
    done = JobState.FAILED if status else JobState.DONE
    word = "FAILED" if status else "COMPLETED"
    return Verdict(state=done, word=word, exit_code=status, source="process")


def end(step: StepId) -> None:
    """End a step; the script passes it on to the keeper, which ends the ranks."""
    if step.process.returncode is None:
        step.process.send_signal(signal.SIGTERM)
