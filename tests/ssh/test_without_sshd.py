"""The same on this host alone, where nothing can be set up: a script of ours stands for ssh."""

import operator
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hpcdist
from hpcdist import remotecall_fetch
from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi


@pytest.fixture
def ssh(tmp_path: Path) -> str:
    """What takes ssh's arguments, and runs the last of them, the command, here."""
    script = tmp_path / "ssh"
    script.write_text('#!/bin/sh\nfor last; do :; done\necho welcome\nexec sh -c "$last"\n')
    script.chmod(0o755)
    return str(script)


def test_a_list_is_hosts_for_ssh(fresh: Callable[..., list[int]], ssh: str) -> None:
    one, two, three = fresh(["a", ("b", 2)], ssh=ssh)
    assert remotecall_fetch(lambda: remotecall_fetch(hpcdist.myid, two), one) == two
    assert hpcdist.spmd(lambda: hpcdist.comm().size, pids=[two, three]) == [2, 2]
    assert hpcdist.reduce(operator.add, hpcdist.myid) == one + two + three
    hpcdist.rmprocs(one)
    assert hpcdist.workers() == [two, three]


def test_another_python_is_told_of_before_it_can_do_harm(ssh: str) -> None:
    hello = '{"ev": "hello", "python": "3.10.1", "hpcdist": "0", "executable": "/x/python"}'
    said = rf"\0hpcdist keeper\0\{len(hello):03o}\0\0\0{hello}"
    Path(ssh).write_text(f"#!/bin/sh\nprintf '{said}'\nexec cat\n")
    with pytest.raises(hpcdist.LaunchError) as caught:
        hpcdist.addprocs(["node1"], ssh=ssh)
    assert "node1: /x/python has Python 3.10, this process has 3." in str(caught.value)
    assert "python=" in caught.value.fix


def test_a_launch_that_is_cancelled(ssh: str) -> None:
    started = hpcdist.launch(["a", "b", "c"], ssh="sh -c 'exec cat'", max_parallel=2)
    assert started.pids == []
    started.cancel()
    with pytest.raises(hpcdist.LaunchError, match="cancelled"):
        started.wait(timeout=60)
    eventually(started.ended, timeout=30)


def test_a_launch_shows_how_far_it_is(ssh: str) -> None:
    gate = Path(ssh).with_name("gate")
    Path(ssh).write_text(
        f'#!/bin/sh\nfor last; do :; done\ncase "$*" in *"-- late "*)\n'
        f'until [ -e {gate} ]; do sleep 0.05; done;; esac\nexec sh -c "$last"\n'
    )
    started = hpcdist.launch(["late", ("early", 2)], ssh=ssh)
    assert len(started.wait(2, timeout=90)) == 2
    assert str(started.state) == "PENDING"
    assert remotecall_fetch(time.time, started.pids[0]) > 0
    gate.touch()
    assert len(started.wait(timeout=90)) == 3
    assert str(started.state) == "RUNNING"
    hpcdist.rmprocs(started.pids)
