"""`hpcdist submit`, `script`, `jobs`, `cancel` and `doctor` on a real cluster."""

import re
import signal
from collections.abc import Callable

import pytest

from tests.slurm.cluster import Finished, Slurm
from tests.slurm.drivers import submit_sleeper

pytestmark = pytest.mark.timeout(120)

DRIVER = """
import sys
import hpcdist

hpcdist.init()
hosts = hpcdist.everywhere.call(hpcdist.myid)
print("ranks", hosts, "arguments", sys.argv[1:], flush=True)
if sys.argv[1:2] == ["raise"]:
    raise LookupError("the end of it")
sys.exit(int(sys.argv[1]) if sys.argv[1:] else 0)
"""

Cli = Callable[..., Finished]


@pytest.fixture
def cli(slurm: Slurm) -> Cli:
    """`cli("submit", ...)`, by the user on the login node; a driver is there."""
    slurm.file("driver.py", DRIVER)
    # What a driver has printed stays until `hpcdist jobs --clear`.
    slurm.expected += [".hpcdist/jobs/*/*"]

    def run(*args: str, env: dict[str, str] | None = None) -> Finished:
        return slurm.login(slurm.python, "-m", "hpcdist", *args, env=env)

    return run


def test_submit_and_wait(slurm: Slurm, cli: Cli) -> None:
    done = cli("submit", "driver.py", "-n", "4", "--partition", "debug", "-t", "1", "--wait")
    assert done.rc == 0, done.err
    assert re.fullmatch(r"\d+\n", done.out)
    job = done.out.strip()
    (log,) = re.findall(r"its output goes to (\S+)\n", done.err)
    assert f"job {job}: COMPLETED\n" in done.err
    text = slurm.path("..").joinpath(log.removeprefix("/home/hpcuser/")).read_text()
    assert "ranks {1: 1, 2: 2, 3: 3, 4: 4} arguments []" in text
    (row,) = cli("jobs").out.splitlines()[1:]
    assert row.split()[:2] == [job, "COMPLETED"]
    assert "4 ranks" in row
    assert cli("jobs", "--clear").rc == 0
    assert cli("jobs", "--all").out == "no jobs\n"


def test_the_drivers_exit_code_and_its_last_words(cli: Cli) -> None:
    done = cli("submit", "driver.py", "-n", "3", "-t", "1", "--wait", "7", "--size", "2")
    assert done.rc == 7
    assert "FAILED, exit code 7" in done.err
    assert "arguments ['7', '--size', '2']" in done.err
    done = cli("submit", "-n", "2", "--wait", "-t1", "driver.py", "raise", "--wait")
    assert done.rc == 1
    assert "LookupError: the end of it" in done.err


def test_a_world_over_two_nodes(slurm: Slurm, cli: Cli) -> None:
    done = cli("submit", "driver.py", "-n", "4", "-N2", "--ntasks-per-node=2", "-t", "1", "--wait")
    assert done.rc == 0, done.err


@pytest.mark.any_mpi
def test_jobs_and_cancel(slurm: Slurm, cli: Cli) -> None:
    waiting, job = submit_sleeper(slurm)
    foreign = slurm.submit("#!/bin/sh\nsleep 600\n")
    (row,) = cli("jobs").out.splitlines()[1:]
    assert row.split()[:2] == [job, "RUNNING"]
    assert "2 ranks" in row
    assert "sleeper.py" in row

    done = cli("cancel", foreign)
    assert done.rc == 1
    assert f"no job of hpcdist is called {foreign}" in done.err
    done = cli("cancel", job, "999999")
    assert done.rc == 1
    assert {found.id for found in slurm.jobs()} == {job, foreign}
    done = cli("cancel", job)
    assert (done.rc, done.out) == (0, "")

    end = waiting.wait()
    assert end.rc not in (0, 130)
    assert f"job {job}: CANCELLED" in end.err
    assert "has ended before: CANCELLED" in cli("cancel", job).err
    assert cli("jobs").out.splitlines()[1].split()[:2] == [job, "CANCELLED"]
    slurm.login("scancel", foreign)


@pytest.mark.any_mpi
def test_control_c_leaves_the_job_alone(slurm: Slurm, cli: Cli) -> None:
    waiting, job = submit_sleeper(slurm)
    waiting.send(signal.SIGINT)
    end = waiting.wait()
    assert end.rc == 130
    assert f"job {job} goes on; `hpcdist cancel {job}` ends it" in end.err
    assert [found.state for found in slurm.jobs()] == ["RUNNING"]
    assert cli("cancel", job).rc == 0


@pytest.mark.any_mpi
def test_jobs_tells_why_one_is_queued(slurm: Slurm, cli: Cli) -> None:
    done = cli("submit", "driver.py", "-n", "2", "--hold")
    job = done.out.strip()
    (row,) = cli("jobs").out.splitlines()[1:]
    assert row.split()[:3] == [job, "PENDING", "JobHeldUser"]
    assert cli("cancel", job).rc == 0
    assert slurm.jobs() == []


@pytest.mark.any_mpi
def test_refusals(slurm: Slurm, cli: Cli) -> None:
    done = cli("submit", "driver.py", "-n", "2", "--partition", "nosuch", "--wait")
    assert (done.rc, done.out) == (1, "")
    assert "hpcdist submit: sbatch: error: invalid partition specified: nosuch" in done.err
    done = cli("submit", "driver.py", "-n", "2", "--no-such-option", "1")
    assert (done.rc, done.out) == (1, "")
    assert "unrecognized option '--no-such-option=1'" in done.err
    done = cli("submit", "driver.py", "-n", "2", "--setup", "ls /nowhere", "-t", "1", "--wait")
    assert done.rc == 2
    assert "setup failed on n" in done.err
    assert slurm.jobs() == []


def test_scripts_are_accepted_by_sbatch(slurm: Slurm, cli: Cli) -> None:
    for args in (["submit", "--dry-run", "driver.py"], ["script"]):
        done = cli(*args, "-n", "3", "--partition", "debug", "-t", "1")
        assert done.rc == 0, done.err
        script = slurm.file("shown.sh", done.out)
        told = slurm.login("sbatch", "--test-only", script)
        assert told.rc == 0, told.err
        assert "using 3 processors" in told.err
    assert slurm.jobs() == []


def test_doctor(slurm: Slurm, cli: Cli) -> None:
    done = cli("doctor", "--scheduler", "slurm", "--run", "--partition", "debug", "-N", "2")
    assert done.rc == 0, done.out + done.err
    for line in (
        "✓ the controller on login answers",
        "✓ sbatch --test-only accepts our script",
        "✓ n1 has the interpreter, hpcdist and MPI of this machine",
        "✓ n1 reaches this machine at 10.",
        "✓ MPI starts there: 2 ranks are one world, on n1, n2",
        "accounting (sacct) is off",
    ):
        assert line in done.out, done.out
    assert re.search(r"✓ srun offers .*pmi2.* needs pmi", done.out)
    assert re.search(r"debug +up +\S+ +3 of 3 +64", done.out)
    assert slurm.jobs() == []
    assert not any(slurm.path("../.hpcdist/jobs").glob("*"))


def test_doctor_finds_what_is_wrong(slurm: Slurm, cli: Cli) -> None:
    done = cli("doctor", "--partition", "nosuch")
    assert done.rc == 1
    assert "✗ sbatch --test-only refuses our script\n" in done.out
    assert "invalid partition specified: nosuch" in done.out

    done = cli("doctor", "--run", env={"HPCDIST_DIR": "/tmp/private"})
    slurm.login("rm", "-rf", "/tmp/private")
    assert done.rc == 1
    assert "✗ the test job did not come as far as our code" in done.out
    assert "/tmp/private" in done.out

    done = cli("doctor", "--run", "--mpi", "none")
    assert done.rc == 1
    assert "✗ 2 ranks were started, and MPI makes worlds of 1" in done.out
    assert slurm.jobs() == []
    # Open MPI 5 leaves these when it is started so, also without us.
    for node in slurm.nodes:
        slurm.root("sh", "-c", "rm -rf /tmp/ompi.* /dev/shm/sm_segment.*", on=node)


def test_doctor_sees_a_login_node_that_nodes_cannot_reach(slurm: Slurm, cli: Cli) -> None:
    # What a firewall on the login node does, as far as our own ports go.
    block = ("ip", "route", "add", "blackhole")
    (address,) = re.findall(r"inet (10\.\S+)/", slurm.root("ip", "-4", "addr").out)
    extra = "192.0.2.7"
    assert slurm.root("ip", "addr", "add", f"{extra}/32", "dev", "br0").rc == 0
    try:
        for i in (1, 2, 3):
            assert slurm.root(*block, f"{extra}/32", on=f"n{i}").rc == 0
        done = cli("doctor", "--run", "--interface", extra)
        assert done.rc == 0, done.out
        assert "cannot reach this machine, which reaches n1: process 1 dials workers" in done.out
        assert f"{extra} port" in done.out
        done = cli("doctor", "--run")
        assert done.rc == 0, done.out
        assert f"reaches this machine at {address} port" in done.out
        assert "and not everywhere" in done.out
    finally:
        slurm.root("ip", "addr", "del", f"{extra}/32", "dev", "br0")
        for i in (1, 2, 3):
            slurm.root("ip", "route", "del", "blackhole", f"{extra}/32", on=f"n{i}")


def test_doctor_with_accounting(accounted_slurm: Slurm) -> None:
    slurm = accounted_slurm
    done = slurm.login(slurm.python, "-m", "hpcdist", "doctor")
    assert done.rc == 0, done.out + done.err
    assert "✓ accounting (sacct) is on" in done.out
