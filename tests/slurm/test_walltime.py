"""The time of a job is over, or another job takes its place: programs and lingering jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from hpcdist import read_checkpoint
from tests.helpers import eventually
from tests.slurm.cluster import PREEMPTING, Running, Slurm
from tests.slurm.conftest import a_cluster
from tests.slurm.endings import HEAD, says

pytestmark = [pytest.mark.any_mpi, pytest.mark.slow, pytest.mark.timeout(300)]

# A job ends at its limit, not some minutes later; and its script gets Slurm's usual 30 s to say so.
CONF = f"OverTimeLimit=0\nKillWait=30\n{PREEMPTING}"

# Its ninth item comes to an end in the second job only.
PROGRAM = """
import os, time
from pathlib import Path
import hpcdist

NAME = {name!r}
hpcdist.init()
second = Path(NAME, "begun").exists()
Path(NAME, "begun").touch()

def item(k):
    with open(f"{NAME}/ran", "a") as file:
        print(k, file=file)
    if k == 8 and not second:
        time.sleep(600)
    return k * k

found = hpcdist.pmap(item, range(9), batch_size=1, checkpoint=f"{NAME}/kept")
print("found", found)
"""

LINGERING = """
pids = addprocs(SlurmManager(2), t=1, linger=60, isolation="process")
say(job=hpcdist.status()[1].job_id)
"""


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    yield from a_cluster(request, sacct=False, extra_conf=CONF)


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    yield cluster
    cluster.tidy()


def submit(slurm: Slurm, name: str, *options: str) -> tuple[Running, str]:
    """Start `submit --wait --resubmit 1` of the program; return it, and its first job."""
    slurm.file(f"{name}/program.py", PROGRAM.replace("{name!r}", repr(name)))
    words = ("submit", f"{name}/program.py", "-n", "2", "--name", name, "--resubmit", "1", "--wait")
    waiting = slurm.start(slurm.python, "-m", "hpcdist", *words, *options)
    return waiting, eventually(lambda: waiting.out.strip(), 60)


def until_kept(slurm: Slurm, name: str) -> None:
    """Wait until the eight items that come to an end are in the checkpoint."""
    kept = slurm.path(f"{name}/kept")
    eventually(lambda: kept.exists() and len(list(read_checkpoint(kept))) == 8, 90)


def went_on(slurm: Slurm, waiting: Running, name: str, job: str, word: str) -> None:
    """See that a second job has finished what the first one was ended in."""
    done = waiting.wait(200)
    assert done.rc == 0, done
    assert re.search(rf"job {job}: {word}.*; job \d+ goes on with it", done.err), done
    ran = sorted(map(int, slurm.read(f"{name}/ran").split()))
    assert ran == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8], ran
    shown = slurm.login(slurm.python, "-m", "hpcdist", "jobs", name).out
    assert "(try 2 of 2)" in shown, shown
    log = slurm.login(slurm.python, "-m", "hpcdist", "logs", name).out
    assert "found [0, 1, 4, 9, 16, 25, 36, 49, 64]" in log, log
    assert "8 of 9 items are finished and do not run again" in log, log
    assert slurm.login(slurm.python, "-m", "hpcdist", "jobs", "--clear").rc == 0


def test_time_is_over_for_a_program_and_for_a_job_that_lingers(slurm: Slurm) -> None:
    slurm.expected += ["/dev/shm/*", "/tmp/ompi.*"]  # of ranks that Slurm has killed
    waiting, job = submit(slurm, "over", "-t", "1")
    driver = slurm.start(slurm.python, slurm.program(HEAD + LINGERING))
    lingering = says(driver, "job")["job"]
    assert driver.wait(60).rc == 0
    assert f"job {lingering} lingers for 0:" in driver.err, driver.err
    until_kept(slurm, "over")
    # It asked for a minute, of which some seconds were gone: the job ends by itself before it.
    ended = slurm.ended(lingering, 120)
    assert ended.state == "COMPLETED", ended
    went_on(slurm, waiting, "over", job, "TIMEOUT")


def test_a_program_that_is_preempted_is_started_again(slurm: Slurm) -> None:
    slurm.expected += ["/dev/shm/*", "/tmp/ompi.*"]
    waiting, job = submit(slurm, "taken", "-t", "9", "--partition", "scavenge")
    until_kept(slurm, "taken")
    (running,) = [each for each in slurm.jobs() if each.id == job]
    everything = ("--exclusive", f"--nodelist={running.nodes}", "-t", "5", "-o", "/dev/null")
    usurper = slurm.submit("#!/bin/sh\nexec sleep 300\n", "-p", "compute", *everything)
    went_on(slurm, waiting, "taken", job, "PREEMPTED")
    slurm.login("scancel", usurper)
