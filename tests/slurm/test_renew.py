"""`renew=True`: whatever befalls a job, its map has every item once, and another job comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import eventually
from tests.slurm.cluster import Job, Slurm
from tests.slurm.endings import HEAD, says

pytestmark = pytest.mark.any_mpi

MAP = """
from pathlib import Path
launch = hpcdist.launch(SlurmManager(2), t=5, partition="scavenge", isolation="process", renew=True)
launch.wait(timeout=60)
Path("runs").mkdir()

def items():
    k = 0
    while not Path("enough").exists():
        yield k
        k += 1

def run(k):
    job = os.environ["SLURM_JOB_ID"]
    with open(f"runs/{job}-{os.getpid()}", "a") as file:
        print(k, file=file)
    time.sleep(0.1)
    return k, job

say(ready=True)
found = list(hpcdist.imap(run, items(), batch_size=1))
runs = [int(k) for file in Path("runs").iterdir() for k in file.read_text().split()]
again = sorted(k for k in set(runs) if runs.count(k) > 1)
history = [(job.id, job.state, job.workers) for job in launch.history]
say(items=[k for k, _ in found], jobs=list(dict.fromkeys(job for _, job in found)))
say(again=again, most=max(map(runs.count, again), default=1), ran=len(set(runs)))
say(history=history)
launch.cancel()
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("accident", ["cancelled", "preempted", "lost"])
def test_every_item_once_whatever_befalls_a_job(preempting_slurm: Slurm, accident: str) -> None:
    slurm = preempting_slurm
    driver = slurm.start(slurm.python, slurm.program(HEAD + MAP))
    says(driver, "ready", 60)
    (job,) = slurm.jobs()
    eventually(lambda: sum(len(file.read_text()) for file in runs(slurm, job)) > 20)
    usurper = befall(slurm, accident, job)

    def successor() -> list[Job]:
        others = [other for other in slurm.jobs() if other.id not in (job.id, usurper)]
        return [other for other in others if other.state == "RUNNING"]

    (after,) = eventually(successor, 60)
    eventually(lambda: runs(slurm, after), 60)
    slurm.file("enough", "")
    done = driver.wait(60)
    assert done.rc == 0, done
    items = says(driver, "items")["items"]
    assert items == list(range(len(items)))
    assert says(driver, "items")["jobs"] == [job.id, after.id]
    ran = says(driver, "again")
    assert ran["ran"] == len(items)
    # What the two workers ran as their job ended. Behind a dead cable they may have gone on.
    assert len(ran["again"]) <= (4 if accident == "lost" else 2), ran
    assert ran["most"] <= 2, ran
    history = says(driver, "history")["history"]
    assert [(who, workers) for who, _, workers in history] == [(job.id, 2), (after.id, 2)], history
    assert "lost workers 2 and 3" in done.err, done
    if usurper:
        slurm.login("scancel", usurper)
    if accident == "lost":
        slurm.heal_node(int(job.nodes[1:]))


def runs(slurm: Slurm, job: Job) -> list[Path]:
    """Return the files in which the workers of a job say what they run."""
    return list(slurm.path("runs").glob(f"{job.id}-*"))


def befall(slurm: Slurm, accident: str, job: Job) -> str:
    """Let something happen to a job; return the number of the one that takes its place, if any."""
    if accident == "cancelled":
        assert slurm.login("scancel", job.id).rc == 0
    elif accident == "lost":
        slurm.kill_node(int(job.nodes[1:]))
    else:
        everything = ("--exclusive", f"--nodelist={job.nodes}", "-t", "5", "-o", "/dev/null")
        return slurm.submit("#!/bin/sh\nexec sleep 300\n", "-p", "compute", *everything)
    return ""
