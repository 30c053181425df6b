"""`adapt=(lo, hi)` on a cluster: jobs come with work and go when it is done."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Slurm
from tests.slurm.drivers import PRELUDE

pytestmark = pytest.mark.any_mpi


def test_jobs_come_with_work_and_go_when_it_is_done(slurm: Slurm) -> None:
    done = slurm.driver(
        PRELUDE
        + """
from hpcdist._schedulers.slurm import Slurm
polls, poll = [], Slurm.poll
Slurm.poll = lambda *args: (polls.append(time.monotonic()), poll(*args))[1]

launch = h.launch(SlurmManager(2), t=5, isolation="process", adapt=(0, 2), idle=2)
assert launch.wait() == [] and queue() == []
assert h.pmap(abs, []) == []

def item(k):
    seen = Path("begun") / str(os.getpid())
    seen.touch()
    if k < 4:  # until all workers of both jobs have one
        until(lambda: len(list(seen.parent.iterdir())) == 4, 60)
    return k, os.environ["SLURM_JOB_ID"]

Path("begun").mkdir()
found = h.pmap(item, range(40), batch_size=1)
assert [k for k, _ in found] == list(range(40))
assert len({job for _, job in found}) == 2, found
until(lambda: not queue() and launch.pids == [], 60)
assert launch.workers_wanted == 0

with h.Executor() as executor:
    assert list(executor.map(abs, [-1])) == [1]
assert len(launch.history) == 3, launch.history
launch.cancel()
nothing_left()
pauses = [late - early for early, late in zip(polls, polls[1:])]
assert min(pauses, default=9) > 4.4, pauses  # 90 % of five seconds, and the clock
""",
        timeout=150,
    )
    assert done.rc == 0, f"{done.out}\n{done.err}"
