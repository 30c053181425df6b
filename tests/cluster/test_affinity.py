"""Workers that stay on their cores, and see their share of the GPUs."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from hpcdist import LocalManager, remotecall_fetch

Fresh = Callable[..., list[int]]


def cores_of_all_threads() -> set[int]:
    """Return where the threads of this process may run: MPI's own and ours too."""
    threads = [int(name) for name in os.listdir("/proc/self/task")]
    return {cpu for thread in threads for cpu in os.sched_getaffinity(thread)}


def cores_of_a_child() -> set[int]:
    import subprocess
    import sys

    code = "import os; print(*os.sched_getaffinity(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(map(int, done.stdout.split()))


def world_size() -> int:
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.size)


@pytest.mark.parametrize("affinity", ["balanced", "compact"])
@pytest.mark.parametrize("isolation", ["auto", "process"])
def test_each_worker_has_a_core(affinity: str, isolation: str, fresh: Fresh) -> None:
    allowed = os.sched_getaffinity(0)
    n = min(3, len(allowed))
    new = fresh(LocalManager(n, affinity), isolation=isolation)
    cores = [remotecall_fetch(cores_of_all_threads, pid) for pid in new]
    assert all(len(those) == 1 for those in cores)
    assert len(set.union(*cores)) == n
    assert set.union(*cores) <= allowed
    assert [remotecall_fetch(cores_of_a_child, pid) for pid in new] == cores
    if isolation == "auto":
        assert remotecall_fetch(world_size, new[0]) == n


def test_more_workers_than_cores_share_them(fresh: Fresh) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) > 4:
        pytest.skip("that would be many workers")
    n = len(allowed) + 1
    new = fresh(LocalManager(n, affinity="compact"))
    cores = [remotecall_fetch(os.sched_getaffinity, pid, 0) for pid in new]
    assert set.union(*cores) == allowed
    assert cores[-1] == cores[0]


def test_without_affinity_all_cores_are_everybodys(fresh: Fresh) -> None:
    (pid,) = fresh(LocalManager(1))
    assert remotecall_fetch(os.sched_getaffinity, pid, 0) == os.sched_getaffinity(0)


HAS_ONE_CORE = """
import os
import hpcdist

own = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {own})  # as a cgroup, a scheduler or taskset would
pids = hpcdist.addprocs(hpcdist.LocalManager(2, affinity="balanced"))
print([hpcdist.remotecall_fetch(os.sched_getaffinity, pid, 0) == {own} for pid in pids])
"""


def test_only_cores_that_process_1_was_given(script: Callable[..., Any]) -> None:
    done = script(HAS_ONE_CORE)
    assert done.rc == 0, done.err
    assert done.out == "[True, True]\n"


def test_gpus_are_dealt(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-5,7")
    name = "CUDA_VISIBLE_DEVICES"
    new = fresh(LocalManager(2, affinity="balanced"))
    assert [remotecall_fetch(os.getenv, pid, name) for pid in new] == ["0,7", "GPU-5"]
    told = fresh(LocalManager(1, affinity="balanced"), env={name: "9"})
    assert remotecall_fetch(os.getenv, told[0], name) == "9"
    free = fresh(LocalManager(1))
    assert remotecall_fetch(os.getenv, free[0], name) == "0,GPU-5,7"


def test_interpreter_with_flags_too(fresh: Fresh) -> None:
    new = fresh(LocalManager(2, affinity="compact"), exeflags="-X dev")
    assert all(len(remotecall_fetch(cores_of_all_threads, pid)) == 1 for pid in new)
