"""`renew=True`: workers that die are replaced, a world of MPI as a whole."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    ClusterManager,
    ElasticManager,
    LaunchError,
    LocalManager,
    MPIManager,
    launch,
    myid,
    pmap,
    remotecall,
    remotecall_fetch,
    rmprocs,
    spmd,
    workers,
)
from hpcdist._cluster.world import World
from hpcdist._runtime.node import here
from tests.helpers import eventually, kill9

LONG = 45.0


@pytest.fixture(autouse=True)
def _alone_afterwards() -> Iterator[None]:
    yield
    hpcdist.shutdown()
    assert workers() == [1]


def kill(*pids: int) -> None:
    """Kill workers, and wait until their deaths are known."""
    for os_pid in [row.os_pid for row in hpcdist.status() if row.pid in pids]:
        kill9(os_pid)
    eventually(lambda: not set(pids) & set(workers()))


def size_of_section() -> int:
    return int(hpcdist.comm().size)


def raise_beside_a_barrier() -> None:
    if hpcdist.comm().rank == 1:
        raise ValueError("no data for rank 1")
    hpcdist.comm().Barrier()


def wait_for(path: str) -> int:
    """Be busy until a file is there."""
    while not os.path.exists(path):
        time.sleep(0.01)
    return myid()


def slow(x: int) -> int:
    time.sleep(0.01)
    return x


def pid_of(_: int) -> int:
    return myid()


def test_a_single_worker_is_replaced_by_another(capfd: pytest.CaptureFixture[str]) -> None:
    started = launch(LocalManager(2, affinity="compact"), isolation="process", renew=True)
    first, second = started.wait(timeout=LONG)
    core = remotecall_fetch(os.sched_getaffinity, second, 0)
    kill(second)
    both = started.wait(timeout=LONG)
    assert both == started.pids == workers() == [first, second + 1]
    assert remotecall_fetch(os.sched_getaffinity, second + 1, 0) == core
    said = ""

    def is_told() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return f"worker {second + 1} is there" in said

    eventually(is_told)
    assert f"lost worker {second} (killed by SIGKILL): 1 new worker is on the way" in said


def test_whom_the_user_removes_stays_away() -> None:
    started = launch(3, isolation="process", renew=True)
    first, second, third = started.wait(timeout=LONG)
    rmprocs(first)
    assert started.pids == [second, third]
    kill(second)  # this one comes back, and nobody in place of the first
    assert started.wait(timeout=LONG) == workers() == [third, third + 1]
    rmprocs(workers())
    assert started.wait(timeout=LONG) == []


@pytest.mark.parametrize("manager", [LocalManager(3), MPIManager(3)], ids=["local", "mpiexec"])
def test_a_world_that_lost_a_rank_is_replaced_as_a_whole(manager: ClusterManager) -> None:
    started = launch(manager, renew=True)
    old = started.wait(timeout=LONG)
    kill(old[1])
    new = started.wait(timeout=LONG)
    assert len(new) == 3
    assert not set(new) & set(old)
    assert new == workers()
    assert spmd(size_of_section) == [3, 3, 3]
    kill(new[0])  # and once more
    assert not set(started.wait(timeout=LONG)) & {*old, *new}
    assert spmd(size_of_section) == [3, 3, 3]


def test_what_the_others_run_is_finished(tmp_path: Path) -> None:
    """They leave once all of them are idle; what is called there meanwhile runs."""
    started = launch(3, renew=True)
    first, second, third = started.wait(timeout=LONG)
    gate = str(tmp_path / "gate")
    running, waiting = remotecall(wait_for, first, gate), remotecall(wait_for, first, gate)
    kill(third)
    assert not {first, second, third} & set(started.wait(timeout=LONG))
    if waiting.error is not None:  # Open MPI's launcher now and then ends all of its world
        return
    assert remotecall_fetch(remotecall_fetch, second, myid, second) == second
    Path(gate).touch()
    assert [running.fetch(timeout=LONG), waiting.fetch(timeout=LONG)] == [first, first]
    eventually(lambda: {first, second} <= set(here.node.members.gone))


def test_a_failed_section_gets_a_full_world_back() -> None:
    started = launch(3, renew=True)
    started.wait(timeout=LONG)
    with pytest.raises(ValueError, match="no data"):
        spmd(raise_beside_a_barrier, grace=0.3)
    # Open MPI frees its members, MPICH's are killed.
    eventually(lambda: len(started.wait(timeout=LONG)) == 3 and spmd(size_of_section) == [3] * 3)


def test_the_message_of_a_failed_section(script: Callable[..., Any]) -> None:
    text = """
        import hpcdist
        from hpcdist import launch, spmd
        started = launch(3, renew=True)
        old = started.wait()
        def careless():
            if hpcdist.comm().rank == 1: raise ValueError("no data for rank 1")
            hpcdist.comm().Barrier()
        try: spmd(careless, grace=0.3)
        except ValueError as error: print(error.pid)
        new = started.wait()
        print(len(new), bool(set(new) & set(old)))
    """
    done = script(dedent(text))
    assert done.rc == 0, done.err
    assert done.out.splitlines()[0] == "3"
    if "cost" in done.err:  # else all were freed
        assert "it is being replaced as a whole (renew=True)" in done.err
        assert "3 new workers are on the way" in done.err


@pytest.mark.parametrize("isolation", ["auto", "process"])
@pytest.mark.parametrize("victims", [1, 2])
def test_a_map_goes_on_and_has_every_item_once(isolation: str, victims: int) -> None:
    """Also when no worker is left for a while."""
    started = launch(2, isolation=isolation, renew=True)
    old = started.wait(timeout=LONG)
    results: list[int] = []
    mapping = threading.Thread(target=lambda: results.extend(pmap(slow, range(400))))
    mapping.start()
    eventually(lambda: any(row.running for row in hpcdist.status()))
    kill(*old[:victims])
    mapping.join(LONG)
    assert results == list(range(400))
    assert len(started.wait(timeout=LONG)) == 2


def test_what_begins_while_nobody_is_there_waits() -> None:
    started = launch(1, isolation="process", renew=True)
    (old,) = started.wait(timeout=LONG)
    kill(old)
    assert pmap(pid_of, [0]) == [old + 1]
    kill(old + 1)
    assert remotecall_fetch(myid, "any") == old + 2
    kill(old + 2)
    assert remotecall_fetch(myid, hpcdist.default_worker_pool()) == old + 3
    with hpcdist.Executor() as executor:
        kill(old + 3)
        assert executor.submit(myid).result(LONG) == old + 4


def test_three_starts_in_vain_are_enough(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    started = launch(2, isolation="process", renew=True, python=str(python))
    first, second = started.wait(timeout=LONG)
    python.unlink()
    kill(second)
    with pytest.raises(LaunchError, match="3 starts in a row") as caught:
        started.wait(timeout=LONG)
    assert str(python) in str(caught.value)
    assert started.error is caught.value
    assert repr(started) == "<Launch FAILED: 1 of 2 workers>"
    said = ""

    def is_told() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "nothing is started any more" in said

    eventually(is_told)
    assert said.count("3 starts in a row") == said.count("is on the way") == 1
    assert workers() == started.pids == [first]
    kill(first)
    assert workers() == [1]
    with pytest.raises(hpcdist.ProcessExitedException):  # nobody waits for others any more
        pmap(slow, [1])


@pytest.mark.parametrize("isolation", ["auto", "process"])
@pytest.mark.parametrize("how", ["cancel", "shutdown", "block"])
def test_the_end_ends_what_is_on_its_way(how: str, isolation: str) -> None:
    """No folder, process or shared memory is left: the module's fixture sees to that."""
    if how == "block":
        with hpcdist.cluster(2, isolation=isolation, renew=True) as pids:
            assert pids is not None
            kill(pids[0])
        assert not set(pids) & set(workers())
    else:
        started = launch(2, isolation=isolation, renew=True)
        kill(started.wait(timeout=LONG)[0])
        started.cancel() if how == "cancel" else hpcdist.shutdown()
        assert str(started.state) == "CANCELLED"
        eventually(started.ended)
    eventually(lambda: workers() == [1])


@pytest.mark.parametrize("how", ["cancel", "shutdown", "block"])
def test_the_end_hangs_up_on_those_that_wait_for_the_rest_of_their_world(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have greeted, and are not registered before all of a world of MPI have."""
    greeted: list[Any] = []
    over = threading.Event()
    admitted = World._admitted

    def admit_one(self: World, sock: Any, hello: Any) -> Any:
        if self.launch.worlds[0] is not self:  # the one that takes the place of the first
            greeted.append(sock)
            if len(greeted) > 1:
                over.wait(LONG)
        return admitted(self, sock, hello)

    monkeypatch.setattr(World, "_admitted", admit_one)
    try:
        if how == "block":
            with hpcdist.cluster(2, renew=True) as pids:
                assert pids is not None
                kill(pids[0])
                eventually(lambda: len(greeted) == 2)
        else:
            started = launch(2, renew=True)
            kill(started.wait(timeout=LONG)[0])
            eventually(lambda: len(greeted) == 2)
            started.cancel() if how == "cancel" else hpcdist.shutdown()
        eventually(lambda: greeted[0].fileno() == -1)
    finally:
        over.set()
    eventually(lambda: greeted[1].fileno() == -1)


@pytest.mark.parametrize(
    "manager",
    [ElasticManager(), ClusterManager()],
    ids=lambda manager: type(manager).__name__,
)
def test_managers_that_cannot_renew_say_so(manager: Any) -> None:
    with pytest.raises(
        ValueError, match="renew=True is for workers that a manager of hpcdist starts"
    ):
        launch(manager, renew=True)
    with pytest.raises(ValueError, match="renew is True or False"):
        launch(1, renew="always")
