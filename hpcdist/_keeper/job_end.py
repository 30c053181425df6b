"""When the job ends that this process runs in, as its environment says."""

from __future__ import annotations

import os

from hpcdist._numbers import whole

# Ours, set by our scripts where the options say for how long a job may run; and Slurm's own, since
# 23.11 (sbatch(1), "OUTPUT ENVIRONMENT VARIABLES"), which knows of the partition's limit too.
_VARIABLES = ("SLURM_JOB_END_TIME", "HPCDIST_JOB_END")


def job_end() -> int | None:
    """Return the end at the latest, in Unix time; None: nothing says so."""
    for name in _VARIABLES:
        found = whole(os.environ.get(name))
        if found:
            return found
    return None
