"""The command line, with PBS."""

import re

import pytest

from tests.helpers import eventually
from tests.pbs.cluster import Pbs
from tests.slurm.cluster import Finished

DRIVER = """
import sys, hpcdist
hpcdist.init()
print(sorted({row.host for row in hpcdist.status()}), hpcdist.nprocs(), sys.argv[1:])
sys.exit(3)
"""


def hpcdist(pbs: Pbs, *args: str, timeout: float = 60) -> Finished:
    """Run a command of ours."""
    return pbs.login(pbs.python, "-m", "hpcdist", *args, timeout=timeout)


def test_submit_and_wait(pbs: Pbs) -> None:
    pbs.expected.append(".hpcdist/jobs/*/*")
    driver = pbs.program(DRIVER)
    options = ("--scheduler", "pbs", "--mpiprocs=2", "-n", "4", "--walltime", "5:00", "--wait")
    done = hpcdist(pbs, "submit", driver, *options, "--", "a b")
    assert done.rc == 3, done
    job = done.out.strip()
    assert re.fullmatch(r"\d+\.head", job)
    assert f"job {job}: FAILED, exit code 3" in done.err
    assert "['n1', 'n2'] 4 ['a b']" in done.err  # the last lines of its log
    assert pbs.job(job).status == 3
    listed = hpcdist(pbs, "jobs")
    assert re.search(rf"{job} +FAILED +exit code 3 +4 ranks", listed.out), listed
    assert hpcdist(pbs, "jobs", "--clear").rc == 0
    assert hpcdist(pbs, "jobs", "--all").out == "no jobs\n"


@pytest.mark.any_mpi
def test_jobs_and_cancel(pbs: Pbs) -> None:
    pbs.expected.append(".hpcdist/jobs/*/*")
    pbs.server.closed = "Not Running: Not enough free nodes available"
    submit = ("submit", pbs.program(DRIVER), "--scheduler=pbs", "-n", "2")
    first, second = (hpcdist(pbs, *submit).out.strip() for _ in range(2))
    listed = hpcdist(pbs, "jobs").out
    assert re.search(rf"{first} +PENDING +Not Running: Not enough free nodes", listed), listed
    done = hpcdist(pbs, "cancel", first)
    assert (done.rc, done.err) == (0, f"cancelled: {first}\n")
    done = hpcdist(pbs, "cancel", second.partition(".")[0])
    assert (done.rc, done.err) == (0, f"cancelled: {second}\n")
    assert not pbs.jobs()
    assert hpcdist(pbs, "cancel", "4711.head").rc == 1
    pbs.server.jobs.pop(second)  # one id that nobody knows, among others
    listed = hpcdist(pbs, "jobs").out
    assert re.search(rf"{first} +CANCELLED", listed), listed
    assert re.search(rf"{second} +unknown", listed), listed


@pytest.mark.any_mpi
def test_a_driver_that_can_never_start(pbs: Pbs) -> None:
    done = hpcdist(pbs, "submit", pbs.program(DRIVER), "--scheduler=pbs", "-n", "99", "--wait")
    assert done.rc == 1
    assert "can never start: Can Never Run" in done.err
    eventually(lambda: not pbs.jobs(), 30)
    pbs.expected.append(".hpcdist/jobs/*/*")


@pytest.mark.any_mpi
def test_script(pbs: Pbs) -> None:
    done = hpcdist(pbs, "script", "--scheduler", "pbs", "-n", "4", "-q", "debug", "--mem", "2gb")
    assert done.rc == 0, done.err
    assert "#PBS -q debug\n" in done.out
    assert "#PBS -l mem=2gb\n" in done.out
    assert not pbs.server.calls


def test_doctor(pbs: Pbs) -> None:
    done = hpcdist(pbs, "doctor", "--scheduler", "pbs", "--run", timeout=90)
    assert done.rc == 0, done.out + done.err
    for text in (
        "pbs_version = 23.06.06: qsub, qstat, qdel, qselect are there",
        "the server answers",
        "our script asks for select=2:ncpus=1:mpiprocs=1:ompthreads=1",
        "workq  yes         yes          24:00:00",
        "the job history is on",
        "MPI starts there: 2 ranks are one world, on n1",
        "all is well",
    ):
        assert text in done.out, done.out
    assert [job.resources.get("walltime") for job in pbs.server.jobs.values()][-1] == "60"
    pbs.server.history = False
    assert "the job history is off" in hpcdist(pbs, "doctor", "--scheduler", "pbs").out
    pbs.server.version = "Version: 6.1.2\n"
    done = hpcdist(pbs, "doctor", "--scheduler", "pbs")
    assert done.rc == 1
    assert "this is Torque" in done.out
