"""Workers that stay on their cores, and see their share of the GPUs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcdist import LocalManager, MPIManager, addprocs, remotecall_fetch
from tests import helpers

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


def visible() -> tuple[str | None, str | None]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("ROCR_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("manager", "isolation"),
    [(LocalManager(3), "auto"), (LocalManager(3), "process"), (MPIManager(3), "auto")],
    ids=["world", "process", "mpiexec"],
)
def test_workers_of_this_machine_share_its_gpus(
    manager: Any, isolation: str, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0,1,2,3,4,5")
    new = fresh(manager, isolation=isolation, gpus="auto")
    seen = [remotecall_fetch(visible, pid) for pid in new]
    assert seen == [("2", "0,3"), ("3", "1,4"), ("2", "2,5")]
    assert all(len(remotecall_fetch(os.sched_getaffinity, pid, 0)) > 0 for pid in new)


def test_gpus_is_auto_or_nothing() -> None:
    with pytest.raises(ValueError, match=r"gpus= is 'auto' or None, not 4"):
        addprocs(2, gpus=4)


def test_ranks_of_a_submitted_program_share_too(tmp_path: Path) -> None:
    """As in a job of `hpcdist submit --gpus auto`: its script sets the first variable."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, hpcdist\n"
        "hpcdist.init()\n"
        "names = ('CUDA_VISIBLE_DEVICES', 'HPCDIST_GPUS')\n"
        "found = hpcdist.everywhere.call(lambda: [os.getenv(name) for name in names])\n"
        "print(sorted(found.items()))\n"
    )
    done = subprocess.run(
        [*helpers.mpiexec(2), sys.executable, str(driver)],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            **helpers.mpi_environment(),
            "HPCDIST_GPUS": "auto",
            "CUDA_VISIBLE_DEVICES": "0,1",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "[(1, ['0', None]), (2, ['1', None])]" in done.stdout
