"""`hpcdist again FOLDER`: in a job that is being ended, submit it again if its time was up.

A job script runs it, with its last breath: only a question and a submission fit in.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime

from hpcdist._cli.schedulers import NoScheduler, find
from hpcdist._keeper.job_end import job_end
from hpcdist._schedulers.again import is_due, submit_again, tries
from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._schedulers.job import JobId, read_manifest
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.verdict import JobState, Verdict

# What a job leaves in the environment and a submission would take for options, or for being inside.
_OF_THE_JOB = ("SLURM_", "SBATCH_", "HPCDIST_JOB_END")
_KEPT = ("SLURM_CONF",)
_EARLY = 5.0  # seconds; clocks differ, and schedulers look now and then


def again(folder: str) -> int:
    """Submit the job of a run again, if that is due; say so in its log."""
    ends = job_end()
    for name in [name for name in os.environ if name.startswith(_OF_THE_JOB)]:
        if name not in _KEPT:
            del os.environ[name]
    try:
        facts = read_manifest(folder)
        scheduler = find(str(facts["scheduler"])).scheduler
        verdict = _verdict(scheduler, facts["jobs"][-1], ends)
        made = submit_again(scheduler, facts) if is_due(facts, verdict) else None
    except (CommandFailed, CommandLate, CommandMissing, SubmitError, NoScheduler) as exc:
        return _say(f"cannot be submitted again: {exc}", 1)
    except (ValueError, OSError, LookupError) as exc:
        return _say(f"cannot be submitted again: {exc}", 1)
    if made is None or verdict is None:
        return 0
    done, most = tries(read_manifest(folder))
    return _say(f"{verdict.word}: submitted again as job {made} (try {done} of {most})", 0)


def _verdict(scheduler: Scheduler, job: JobId, ends: int | None) -> Verdict | None:
    """Return why the job ends; the scheduler may list it as running until it has ended."""
    if ends is not None and time.time() > ends - _EARLY:
        end = datetime.fromtimestamp(ends).astimezone()
        return Verdict(state=JobState.TIMEOUT, word="TIMEOUT", end=end)
    return scheduler.post_mortem([job]).get(job)


def _say(text: str, code: int) -> int:
    print(f"hpcdist: this job {text}", file=sys.stderr, flush=True)
    return code
