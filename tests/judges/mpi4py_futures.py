"""mpi4py's own tests of its `MPIPoolExecutor`, run on our executor.

Started by `test_judges.py` as `python -m tests.judges.mpi4py_futures RESULTS FOLDER`, where FOLDER
is mpi4py's source. Those of its tests are left out that are not about a pool's executor: those of
promises, of threads, of the start of its processes (`bootup`), of `MPICommExecutor`, and of the
pool that an MPI launch shares.
"""

from __future__ import annotations

import importlib
import sys
import unittest
from types import SimpleNamespace
from typing import Any

import hpcdist
from tests.judges import noting

_WORKERS = 3
_OF_ITS_MPI = ["test_mpi_serialized_support", "test_shared_executors"]
_CASES = [
    "ProcessPoolInitTest",
    "ProcessPoolShutdownTest",
    "ProcessPoolWaitTest",
    "ProcessPoolAsCompletedTest",
    "ProcessPoolExecutorTest",
    "ProcessPoolSubmitTest",
    "ProcessPoolPickleTest",
]


class _Executor(hpcdist.Executor):
    """Ours, with the words of `MPIPoolExecutor` that stand in tests of something else."""

    def __init__(self, max_workers: int | None = None, **options: Any) -> None:
        super().__init__(max_workers=max_workers, **options)

    @property
    def num_workers(self) -> int:
        if self._is_shut_down or self._broken:
            return 0
        return min(self._max_workers or sys.maxsize, hpcdist.nworkers())

    def bootup(self, wait: bool = True) -> _Executor:
        return self  # our workers are there

    def starmap(self, fn: Any, rows: Any, **how: Any) -> Any:
        return self.map(fn, *zip(*rows, strict=True), **how)  # as our hint at its name says


class _Futures(SimpleNamespace):
    """Stands for `mpi4py.futures` in their module: it has our executor."""

    MPIPoolExecutor = _Executor

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("mpi4py.futures"), name)


def _without_mpi(name: str) -> Any:
    """Import their module without a start of MPI here: process 1 is outside of its workers' MPI."""
    mpi4py: Any = importlib.import_module("mpi4py")
    mpi4py.rc.initialize = False
    importlib.import_module("mpi4py.futures")
    real = mpi4py.MPI
    world = SimpleNamespace(Get_size=lambda: 1)
    mpi4py.MPI = SimpleNamespace(COMM_WORLD=world, get_vendor=real.get_vendor)
    try:
        return importlib.import_module(name)
    finally:
        mpi4py.MPI = real


def suite(folder: str) -> unittest.TestSuite:
    """Gather their tests of a pool's executor."""
    sys.path.append(f"{folder}/test")
    support: Any = importlib.import_module("mpitestutil")
    support.disable_mpi_spawn = lambda: False  # whether theirs could start workers does not matter
    theirs: Any = _without_mpi("test_futures")
    theirs.futures = _Futures()
    theirs.ProcessPoolMixin.executor_type = _Executor
    for name in _OF_ITS_MPI:
        setattr(theirs.ProcessPoolSubmitTest, name, None)
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    return unittest.TestSuite(load(getattr(theirs, name)) for name in _CASES)


def main(results: str, folder: str) -> None:
    """Run the tests and write down how they went."""
    sys.path.append(f"{folder}/demo/futures")  # of the workers, too
    hpcdist.addprocs(_WORKERS)
    noting.run(suite(folder), results)
    hpcdist.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
