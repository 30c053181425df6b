"""Other projects' own tests, run on us: CPython's of executors and pools, joblib's, mpi4py's.

They are taken from where they are installed; mpi4py's, which it does not install, from the folder
that MPI4PY_SOURCE names, or from the source that pip downloads. What is expected to fail stands
here, with the reason; anything else that fails is a fault of ours, and what no longer fails is to
be taken off the list. What Julia's tests ask for is written anew, in `test_julia.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(1500)

_OWN_PROGRAM = "it starts a program that imports the executor from concurrent.futures by its name"
CPYTHON = {
    "test_shutdown.ExecutorShutdownTest.test_hang_gh83386": _OWN_PROGRAM,
    "test_shutdown.ExecutorShutdownTest.test_interpreter_shutdown": _OWN_PROGRAM,
    "test_shutdown.ExecutorShutdownTest.test_submit_after_interpreter_shutdown": _OWN_PROGRAM,
}

_OWN_PROCESSES = "it looks at the pool's own processes, and ours has none"
_CASES = "tests.judges.pool_cases."
POOLS = {
    _CASES + "Pool.test_make_pool": _OWN_PROCESSES,
    _CASES + "Pool.test_resource_warning": _OWN_PROCESSES + ", so nothing is left open",
    _CASES + "PoolWorkerLifetime.test_pool_worker_lifetime": _OWN_PROCESSES,
    _CASES + "PoolWorkerErrors.test_unpickleable_result": "a lambda can travel here",
}

_RUNS_ON = "a task that runs is not ended with its Parallel, and the next one waits for its worker"
_NO_MEMMAP = "arrays travel as they are, not as files that are mapped"
JOBLIB = {
    "test_multiple_generator_call_separated_gc": _RUNS_ON + "; loky's error is loky's own",
    "test_auto_memmap_on_arrays_from_generator": _NO_MEMMAP,
    "test_memmapping_leaks": _NO_MEMMAP,
}

# What waits 10 s for workers that are busy for 10 s: either way is right.
_LEVEL = {"test_parallel_timeout_fail_with_generator": _RUNS_ON}

_STARTS = "it chooses how MPI processes are started; addprocs starts ours, with options of its own"
_INSIDES = "it looks at the thread and the queue inside its own pool"
_UNORDERED = "results as they come: hpcdist.imap_unordered, or as_completed"
_INIT = "test_futures.ProcessPoolInitTest."
_SHUTDOWN = "test_futures.ProcessPoolShutdownTest."
_EXECUTOR = "test_futures.ProcessPoolExecutorTest."
MPI4PY = {
    _INIT + "test_init_kwargs": _STARTS,
    _INIT + "test_init_pyargs": _STARTS,
    _INIT + "test_init_sys_flags": _STARTS,
    _INIT + "test_init_globals": _STARTS,
    _INIT + "test_use_pkl5_kwarg": _STARTS,
    _INIT + "test_use_pkl5_environ": _STARTS,
    _INIT + "test_max_workers_environ": _STARTS + "; the variable is mpi4py's",
    _INIT
    + "test_max_workers": "what it limits are processes that it starts; ours keeps the figure",
    _INIT + "test_run_name": "it asks for the name under which mpi4py's workers import __main__",
    _INIT + "test_get_comm_workers": "a task is alone here; comm() has a meaning in spmd",
    _SHUTDOWN + "test_shutdown": _INSIDES,
    _SHUTDOWN + "test_shutdown_cancel": _INSIDES,
    _SHUTDOWN + "test_init_bootup_shutdown": _INSIDES,
    _SHUTDOWN + "test_context_manager_shutdown": _INSIDES,
    _SHUTDOWN + "test_del_shutdown": _INSIDES,
    _EXECUTOR + "test_map_buffersize": _UNORDERED + "; its ordered part passes",
    _EXECUTOR + "test_map_unordered": _UNORDERED,
    _EXECUTOR + "test_map_unordered_chunksize": _UNORDERED,
    _EXECUTOR + "test_map_unordered_exception": _UNORDERED,
    _EXECUTOR + "test_map_unordered_timeout": _UNORDERED,
    _EXECUTOR + "test_map_unordered_timeout_one": _UNORDERED,
    "test_futures.ProcessPoolPickleTest.test_exc_unpickle": "the cause has our class, not theirs",
}


def judge(command: list[str], folder: Path, results: Path) -> dict[str, str]:
    """Run the tests of others; return how each of them went."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUDGEMENT": str(results)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1400,
        check=False,
    )
    print(done.stdout[-30_000:])
    assert results.exists(), "they came to no end"
    found: dict[str, str] = json.loads(results.read_text())
    return found


def agrees(found: dict[str, str], expected: dict[str, str], least: int) -> None:
    """Check that what failed was expected to, and the other way round."""
    failed = {name for name, how in found.items() if how == "failed"}
    passed = {name for name, how in found.items() if how == "passed"}
    print(f"{len(passed)} passed, {len(failed)} failed")
    for name in sorted(failed):
        print("failed:", name, "--", expected.get(name.partition("[")[0], "not expected"))
    kinds = {name.partition("[")[0] for name in failed} - _LEVEL.keys()
    assert kinds - expected.keys() == set(), "these are not expected to fail"
    assert expected.keys() - kinds == set(), "these pass now: take them off the list"
    assert len(passed) >= least, "fewer tests than there were"


def cpythons_tests() -> Path | None:
    """Find the `test` folder of CPython 3.13 or newer: of this Python, or of one beside it."""
    own = Path(sysconfig.get_path("stdlib"))
    beside = sorted(own.parents[2].glob("*/lib/python3.*"), reverse=True)
    for folder in (own / "test", *(lib / "test" for lib in beside)):
        minor = folder.parent.name.removeprefix("python3.")
        if minor.isdigit() and int(minor) >= 13 and (folder / "test_concurrent_futures").is_dir():
            return folder
    return None


def mpi4pys_source(folder: Path) -> Path:
    """Return mpi4py's source: the folder we are told, or the installed release's, downloaded."""
    if told := os.environ.get("MPI4PY_SOURCE"):
        return Path(told).resolve()
    what = f"mpi4py=={version('mpi4py')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "mpi4py", "--dest", str(folder), what]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
    )
    archives = list(folder.glob("mpi4py-*.tar.gz"))
    if not archives:
        print(done.stderr)
        pytest.skip(f"no source of {what}: pip cannot download it, MPI4PY_SOURCE names no folder")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / archives[0].name.removesuffix(".tar.gz")


def test_cpythons_tests_of_executors(tmp_path: Path) -> None:
    folder = cpythons_tests()
    if folder is None or find_spec("test.support") is None:
        pytest.skip("the tests of CPython 3.13 are not installed")
    results = tmp_path / "results.json"
    command = ["-m", "tests.judges.cpython", "executors", str(results), str(folder)]
    agrees(judge(command, tmp_path, results), CPYTHON, 27)


def test_cpythons_tests_of_pools(tmp_path: Path) -> None:
    if find_spec("test._test_multiprocessing") is None:
        pytest.skip("the tests of CPython are not installed")
    results = tmp_path / "results.json"
    command = ["-m", "tests.judges.cpython", "pools", str(results)]
    agrees(judge(command, tmp_path, results), POOLS, 25)


def test_joblibs_tests_of_backends(tmp_path: Path) -> None:
    if find_spec("joblib.test.test_parallel") is None:
        pytest.skip("joblib's tests are not installed")
    command = ["-m", "pytest", "-p", "tests.judges.joblib_plugin", "-c", os.devnull, "-q"]
    command += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--pyargs", "joblib.test.test_parallel"]
    results = tmp_path / "results.json"
    agrees(judge(command, tmp_path, results), JOBLIB, 105)


def test_mpi4pys_tests_of_executors(tmp_path: Path) -> None:
    if find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    source = mpi4pys_source(tmp_path)
    if not (source / "demo" / "futures" / "test_futures.py").exists():
        pytest.skip(f"there are no tests of mpi4py.futures in {source}")
    results = tmp_path / "results.json"
    command = ["-m", "tests.judges.mpi4py_futures", str(results), str(source)]
    agrees(judge(command, tmp_path, results), MPI4PY, 38)
