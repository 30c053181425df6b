"""What a scheduler of one's own is made of: public, and stable.

`Scheduler` is what to subclass; see the page "A scheduler of your own". A package that names its
scheduler as an entry point `hpcdist.managers` makes it known to the command line and to files of
settings; programs give `BatchManager(MyScheduler(), n)` to `addprocs`.
"""

from hpcdist._contract.managers import Settings
from hpcdist._keeper.installed_mpi import Mpi
from hpcdist._schedulers.batch_manager import BatchManager
from hpcdist._schedulers.commands import (
    CommandFailed,
    CommandLate,
    CommandMissing,
    Done,
    SubmitError,
    run,
)
from hpcdist._schedulers.findings import Finding, Trial
from hpcdist._schedulers.job import JobId, JobSpec
from hpcdist._schedulers.launchers import WorldLauncher
from hpcdist._schedulers.options import Asked
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.verdict import JobState, Verdict

__all__ = [
    "Asked",
    "BatchManager",
    "CommandFailed",
    "CommandLate",
    "CommandMissing",
    "Done",
    "Finding",
    "JobId",
    "JobSpec",
    "JobState",
    "Mpi",
    "Scheduler",
    "Settings",
    "SubmitError",
    "Trial",
    "Verdict",
    "WorldLauncher",
    "run",
]
