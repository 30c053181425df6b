"""Workers have no terminal: input() and breakpoint() fail at once, and say what to do instead."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import hpcdist
from tests.helpers import eventually


def asks() -> str:
    return input("your name? ")


def stops() -> None:
    breakpoint()


def standard_input() -> tuple[str, bytes]:
    return sys.stdin.read(), os.read(0, 1)


def check(pid: int) -> None:
    with pytest.raises(hpcdist.RemoteException, match="read on process 1") as caught:
        hpcdist.remotecall_fetch(asks, pid)
    assert isinstance(caught.value.__cause__, EOFError)
    with pytest.raises(hpcdist.RemoteException, match="call the function on process 1"):
        hpcdist.remotecall_fetch(stops, pid)
    assert hpcdist.remotecall_fetch(standard_input, pid) == ("", b"")


class Popens(hpcdist.ClusterManager):
    """A manager that leaves its workers its own standard input, which stays open."""

    def launch(self, params: dict[str, Any]) -> Any:
        reader, self.writer = os.pipe()
        process = subprocess.Popen(self.worker_command(params), stdin=reader)
        os.close(reader)
        yield hpcdist.WorkerConfig(process=process)


@pytest.mark.parametrize(
    ("manager", "isolation"),
    [
        (hpcdist.LocalManager(1), "auto"),
        (hpcdist.LocalManager(1), "process"),
        (hpcdist.MPIManager(1), "auto"),
        (Popens(), "auto"),
    ],
    ids=["world", "process", "mpiexec", "own"],
)
def test_workers_have_none(manager: Any, isolation: str) -> None:
    with hpcdist.cluster(manager, isolation=isolation) as pids:
        assert pids
        check(pids[0])
    if isinstance(manager, Popens):
        os.close(manager.writer)


def test_elastic_workers_have_none() -> None:
    manager = hpcdist.ElasticManager(addr="127.0.0.1")
    hpcdist.addprocs(manager)
    come = subprocess.Popen(f"exec {manager.command}", shell=True, stdin=subprocess.PIPE)
    (pid,) = hpcdist.launch(manager).wait(1, timeout=40)
    check(pid)
    hpcdist.shutdown()
    come.communicate()
    eventually(lambda: come.poll() is not None)


RANKS = """
import os, sys
import hpcdist
from hpcdist import RemoteException, remotecall_fetch

hook = sys.breakpointhook
with hpcdist.cluster(hpcdist.MPIManager()) as pids:
    if pids is not None:
        for f in (lambda: input(), lambda: breakpoint()):
            try:
                remotecall_fetch(f, 2)
            except RemoteException as exc:
                print(type(exc.__cause__).__name__, flush=True)
assert sys.breakpointhook is hook, "the terminal is not given back"
assert type(sys.stdin).__name__ != "_NoInput"
print("after", flush=True)
"""


def test_ranks_of_mpiexec_have_none_while_they_serve(script: Callable[..., Any]) -> None:
    done = script(RANKS, ranks=2)
    assert done.rc == 0, done.err
    assert sorted(done.out.split()) == ["EOFError", "RuntimeError", "after", "after"]


def test_a_debugger_of_the_user_s_choice_is_used() -> None:
    with hpcdist.cluster(1, env={"PYTHONBREAKPOINT": "builtins.print"}) as pids:
        assert pids
        hpcdist.remotecall_fetch(stops, pids[0])
