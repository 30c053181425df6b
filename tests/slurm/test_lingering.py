"""Drivers end, and their jobs stay for the next one: `linger=`."""

import re

import pytest

from tests.helpers import eventually
from tests.slurm.cluster import Finished, Running, Slurm
from tests.slurm.drivers import PRELUDE

pytestmark = pytest.mark.any_mpi

# Adds workers, and says which job they are in.
ADD = """
def add(n=2, **more):
    params = {"t": 9, "linger": 120, "isolation": "process", **more}
    pids = addprocs(SlurmManager(n), **params)
    jobs = {remotecall_fetch(lambda: os.environ["SLURM_JOB_ID"], pid) for pid in pids}
    print("job", *jobs, flush=True)
    return pids
"""


def start(slurm: Slurm, text: str) -> Running:
    """Start a driver."""
    return slurm.start(slurm.python, slurm.program(PRELUDE + ADD + text))


def run(slurm: Slurm, text: str) -> Finished:
    """Run a driver to its good end."""
    done = slurm.driver(PRELUDE + ADD + text, timeout=120)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    return done


def job_in(text: str) -> str:
    """Return the job that a driver has named last."""
    found = re.findall(r"^job (\d+)", text, re.MULTILINE)
    assert found, text
    return str(found[-1])


def hpcdist(slurm: Slurm, *words: str) -> Finished:
    """Run a command of hpcdist."""
    return slurm.login(slurm.python, "-m", "hpcdist", *words)


def lingers(slurm: Slurm, job: str) -> bool:
    """Tell whether `hpcdist jobs` says that a job lingers, and for how long."""
    shown = hpcdist(slurm, "jobs").out.splitlines()
    return any(re.match(rf"{job} +LINGERING .* [12]?:\d\d ", line) for line in shown)


def of_workers(slurm: Slurm) -> list[str]:
    """Return the commands on the nodes that are workers, or start them."""
    found = slurm.processes("n1", "n2", "n3").values()
    return [text for text in found if " srun" in text[:12] or "hpcdist worker" in text]


@pytest.mark.timeout(300)
def test_a_killed_drivers_job_goes_to_one_of_the_next(slurm: Slurm) -> None:
    killed = start(slurm, "a, b = add()\nh.remotecall(time.sleep, a, 600)\ntime.sleep(600)\n")
    eventually(lambda: "job" in killed.out or killed.process.poll() is not None, 60)
    job = job_in(killed.out)
    killed.kill()
    killed.wait()
    eventually(lambda: lingers(slurm, job), 30)
    assert [text for text in of_workers(slurm) if "--linger" not in text] == []

    other = run(slurm, "add(t=8, linger=None)\n")
    assert job_in(other.out) != job, other
    assert f"job {job} lingers, and was not taken over: time is '9' there and '8' here" in other.err

    text = "add()\nprint('at work', flush=True)\ntime.sleep(600)\n"
    both = [start(slurm, text) for _ in range(2)]
    eventually(lambda: all("at work" in each.out for each in both), 90)
    jobs = [job_in(each.out) for each in both]
    assert jobs.count(job) == 1, (jobs, job)
    told = rf"took over job {job} \([78]:\d\d left\) instead of queueing"
    assert [bool(re.search(told, each.err)) for each in both] == [each == job for each in jobs]
    for each in both:
        each.kill()
        each.wait()
    eventually(lambda: all(lingers(slurm, each) for each in jobs), 30)
    assert hpcdist(slurm, "cancel", *jobs).rc == 0
    eventually(lambda: not slurm.jobs(), 30)
    hpcdist(slurm, "jobs", "--clear")


@pytest.mark.timeout(300)
def test_a_job_outlives_crashed_workers_and_errors_until_it_is_released(slurm: Slurm) -> None:
    done = run(
        slurm,
        """
pids = add()
for pid in pids:
    h.remotecall(os._exit, pid, 3)
until(lambda: h.workers() == [1])
until(lambda: list(RUNS.glob("*/lingering")))
try:
    with h.cluster(SlurmManager(2), t=9, linger=120, isolation="process") as pids:
        print("job", remotecall_fetch(lambda: os.environ["SLURM_JOB_ID"], pids[0]), flush=True)
        raise ZeroDivisionError
except ZeroDivisionError:
    until(lambda: list(RUNS.glob("*/lingering")))
add(linger=2, interface="lo")  # where the keeper dials in vain, and opens a door
""",
    )
    jobs = re.findall(r"^job (\d+)", done.out, re.MULTILINE)
    assert len(jobs) == 3, done
    assert len(set(jobs)) == 1, done
    assert done.err.count(f"took over job {jobs[0]} (") == 2, done
    assert done.err.count(f"job {jobs[0]} lingers for 2:00: the next addprocs") == 2, done
    assert f"job {jobs[0]} lingers for 0:02" in done.err, done
    eventually(lambda: not slurm.jobs(), 30)  # its time is over
    assert slurm.ended(jobs[0]).state == "COMPLETED"
    hpcdist(slurm, "jobs", "--clear")
    run(slurm, "add()\nh.shutdown(release=True)\nnothing_left()\n")
