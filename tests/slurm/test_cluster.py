"""The cluster itself, and the check that a test leaves nothing in it."""

import signal
import time

import pytest

from tests.helpers import eventually
from tests.slurm.cluster import Slurm

pytestmark = pytest.mark.any_mpi


def test_commands_run_as_the_user_on_machines_of_their_own(slurm: Slurm) -> None:
    assert slurm.login("sh", "-c", "hostname; id -un; pwd").out.split() == [
        "login",
        "hpcuser",
        slurm.work,
    ]
    for i, name in enumerate(slurm.nodes, 1):
        assert slurm.node(i, "hostname").out.strip() == name
    assert slurm.root("id", "-u").out == "0\n"
    hosts = slurm.login("srun", "--nodes=2", "hostname").out.split()
    assert sorted(hosts) == ["n1", "n2"]


def test_the_user_has_the_package_and_cannot_write_to_it(slurm: Slurm) -> None:
    done = slurm.driver("import os, hpcdist; print(os.access(hpcdist.__file__, os.W_OK))")
    assert (done.rc, done.out) == (0, "False\n"), done.err
    done = slurm.login("srun", slurm.python, "-c", "import hpcdist; print(hpcdist.myid())")
    assert (done.rc, done.out) == (0, "1\n"), done.err


def test_a_job_and_its_end(slurm: Slurm) -> None:
    job = slurm.submit("#!/bin/sh\necho hello from $(hostname)\nexit 7\n")
    end = slurm.ended(job)
    assert (end.state, end.rc, end.out) == ("FAILED", 7, "hello from n1\n")


def test_what_is_left_is_told_and_ended(slurm: Slurm) -> None:
    slurm.login("sh", "-c", "touch ~/file; echo x > /tmp/hpcdist-x; mkdir ~/.empty")
    slurm.login("sh", "-c", "nohup sleep 600 >/dev/null 2>&1 &")
    slurm.submit("#!/bin/sh\ntouch /dev/shm/segment\nsleep 600\n", "--nodelist=n2", "--job-name=j")
    eventually(lambda: slurm.jobs() and slurm.jobs()[0].state == "RUNNING")
    with pytest.raises(AssertionError) as caught:
        slurm.drain(patience=1)
    told = str(caught.value)
    for what in ("name='j'", "on login: sleep 600", "login: /tmp/hpcdist-x", "home: file"):
        assert what in told
    assert "n2: /dev/shm/segment" in told
    assert ".empty" not in told
    assert slurm.jobs() == []
    slurm.login("rm", "../file")
    slurm.drain()


def test_a_command_that_a_failed_test_has_left_is_ended_and_reaped(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "patience", 0.5)
    left = [slurm.start("sleep", "600"), slurm.start("sleep", "601", root=True)]
    with pytest.raises(AssertionError, match="on login: sleep 600"):
        slurm.tidy()
    # Not by us: nobody may have to wait for them after this.
    assert [running.process.returncode for running in left] == [-signal.SIGKILL] * 2
    eventually(lambda: "sleep 60" not in slurm.root("ps", "-eo", "args").out)


def test_a_node_that_is_cut_off_or_dead_comes_back(slurm: Slurm) -> None:
    slurm.cut_node(3)
    assert slurm.login("ping", "-c1", "-W1", "n3").rc != 0
    slurm.heal_node(3)
    slurm.kill_node(3)
    assert slurm.processes("n3") == {}
    slurm.heal_node(3)
    assert slurm.login("srun", "--nodelist=n3", "hostname").out == "n3\n"


def test_commands_have_a_time_limit(slurm: Slurm) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)no end within 0.5 s.*sleep 60.*early"):
        slurm.login("sh", "-c", "echo early; exec sleep 60", timeout=0.5)
    assert time.monotonic() - begin < 5


def test_sacct(accounted_slurm: Slurm) -> None:
    job = accounted_slurm.submit("#!/bin/sh\nexit 3\n")
    assert accounted_slurm.ended(job).rc == 3
    ask = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode"]
    eventually(lambda: "FAILED|3:0" in accounted_slurm.login(*ask, f"--jobs={job}").out)
