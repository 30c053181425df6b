"""Jobs end: how long is left, and launches that outlive their jobs (`renew=True`)."""

from __future__ import annotations

import pytest

from tests.helpers import eventually
from tests.slurm.cluster import Finished, Slurm
from tests.slurm.drivers import PRELUDE

pytestmark = pytest.mark.any_mpi


def run(slurm: Slurm, text: str, timeout: float = 90) -> Finished:
    """Run a driver to its good end."""
    done = slurm.driver(PRELUDE + text, timeout=timeout)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    return done


@pytest.mark.slow
def test_the_time_left_is_known_and_followed(slurm: Slurm) -> None:
    slurm.file("changed", "")
    driver = slurm.start(
        slurm.python,
        slurm.program(
            PRELUDE
            + """
(pid,) = addprocs(SlurmManager(1), t=5)
left = h.time_left(pid)
assert 0 < left <= 300, left
assert abs(remotecall_fetch(h.time_left, pid) - h.time_left(pid)) < 5
assert h.time_left() is None and h.time_left(1) is None
assert 0 < h.status()[1].time_left <= 300
print("job", h.status()[1].job_id, flush=True)
end = time.monotonic() + 100
while h.time_left(pid) < 400:
    assert time.monotonic() < end, "a longer limit has not been noticed"
    time.sleep(0.1)
assert remotecall_fetch(h.time_left, pid) > 400
print("longer", flush=True)
"""
        ),
    )
    job = eventually(lambda: [x for x in driver.out.splitlines() if x.startswith("job")], 40)
    done = slurm.root("scontrol", "update", f"JobId={job[0].split()[1]}", "TimeLimit=10")
    assert done.rc == 0, done
    done = driver.wait(120)
    assert (done.rc, "longer" in done.out) == (0, True), done


def test_a_limit_that_nobody_knows_cannot_be_renewed(slurm: Slurm) -> None:
    run(
        slurm,
        """
try:
    addprocs(SlurmManager(2), partition="debug", renew=True)
except ValueError as exc:
    assert "give time=" in str(exc), exc
else:
    raise AssertionError("no error")
""",
    )
    assert slurm.jobs() == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_jobs_are_replaced_before_they_end_and_when_they_are_lost(slurm: Slurm) -> None:
    driver = slurm.start(
        slurm.python,
        slurm.program(
            PRELUDE
            + """
launch = h.launch(SlurmManager(2), t=1, isolation="process", renew=True)
first = launch.wait(timeout=60)
print("first", launch.jobs[0], flush=True)
def item(k):
    time.sleep(0.5)
    return k, os.environ["SLURM_JOB_ID"]
found = h.pmap(item, range(300))
assert [k for k, _ in found] == list(range(300))
jobs = dict.fromkeys(job for _, job in found)
print("jobs", len(jobs), flush=True)
print(launch.history, flush=True)
launch.cancel()
"""
        ),
    )
    eventually(lambda: "first" in driver.out or driver.process.poll() is not None, 60)
    done = driver.wait(200)
    assert done.rc == 0, done
    assert "another job of 2 workers is being submitted (renew=True)" in done.err, done
    assert int(done.out.split("jobs ")[1].split()[0]) >= 2, done
