"""`adapt=(lo, hi)`: jobs come with work, go when it is done, and stay for the next driver."""

from __future__ import annotations

import pytest

from tests.pbs.cluster import Pbs
from tests.pbs.drivers import run


@pytest.mark.any_mpi
def test_jobs_come_with_work_and_stay_for_the_next_driver(pbs: Pbs) -> None:
    said = run(
        pbs,
        """
options = {"walltime": "0:10:00", "isolation": "process", "adapt": (0, 2), "linger": 120}

def lingering():
    return len(list(RUNS.glob("*/lingering")))

def item(k):
    seen = Path("begun") / str(h.myid())
    seen.touch()
    if k < 4:  # until all workers of both jobs have one
        until(lambda: len(list(seen.parent.iterdir())) >= 4)
    return k, os.environ["PBS_JOBID"]

def jobs_of(n):
    return {job for _, job in h.pmap(item, range(n), batch_size=1)}

Path("begun").mkdir()
with h.cluster(PBSManager(2), **options) as pids:
    assert pids == []
    first = jobs_of(40)
    assert len(first) == 2, first
until(lambda: lingering() == 2)

again = h.launch(PBSManager(2), **options, idle=2)
assert jobs_of(4) <= first
until(lambda: again.pids == [] and again.workers_wanted == 0)
say(used=[str(job.id) for job in again.history if job.workers], first=sorted(first))
again.cancel()
say(over=True)
""",
    )
    assert " left) instead of queueing" in said["err"], said
    assert said["used"], said
    for ident in said["used"]:
        pbs.job(ident)  # what is given back ends
    # One that was not needed lingers on.
    for job in pbs.jobs():
        pbs.login(pbs.python, "-m", "hpcdist", "cancel", job.id)
    for ident in said["first"]:
        pbs.job(ident)
    assert pbs.login(pbs.python, "-m", "hpcdist", "jobs", "--clear").rc == 0
