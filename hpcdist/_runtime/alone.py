"""A driver without workers, in a job of several tasks, has forgotten something: say so, once."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

_ADVICE = {
    "Slurm": "Call hpcdist.init() near its top and start it with `srun python driver.py`, "
    'or add workers: addprocs(SlurmManager({tasks}), launcher="srun")',
    "PBS": "Call hpcdist.init() near its top and start it with `mpiexec python driver.py`",
}


class Alone:
    """Tells a driver that works alone what it may have meant."""

    def __init__(self) -> None:
        self._has_warned = False

    def warn(self) -> None:
        """Say on stderr that there are no workers, where the job has room for some."""
        if self._has_warned:
            return
        self._has_warned = True
        scheduler, tasks = tasks_of_job(os.environ)
        if tasks > 1 and sys.stderr is not None:
            print(
                f"hpcdist: this {scheduler} job has {tasks} tasks, but the program added no "
                "workers: everything runs in this one process. "
                f"{_ADVICE[scheduler].format(tasks=tasks)}.",
                file=sys.stderr,
            )


def tasks_of_job(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return the scheduler of the job we are in and how many tasks it has; outside of one, 1.

    >>> tasks_of_job({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"})
    ('Slurm', 8)
    >>> tasks_of_job({})
    ('', 1)
    """
    if "SLURM_JOB_ID" in environ:
        tasks = environ.get("SLURM_NTASKS", "1")
        return "Slurm", int(tasks) if tasks.isdecimal() and len(tasks) < 10 else 1
    if "PBS_JOBID" in environ:
        try:
            with open(environ.get("PBS_NODEFILE", ""), errors="replace") as file:
                return "PBS", sum(bool(line.strip()) for line in file)  # a line for each task
        except OSError:
            return "PBS", 1
    return "", 1
