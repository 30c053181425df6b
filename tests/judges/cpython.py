"""CPython's own tests of executors and pools, run on ours.

Started by `test_judges.py` as `python -m tests.judges.cpython executors RESULTS FOLDER`, where
FOLDER is the `test` folder of an installed CPython 3.13 or newer; and as `... pools RESULTS`.
"""

from __future__ import annotations

import importlib
import sys
import unittest
from typing import Any

import hpcdist
from tests.judges import noting

_WORKERS = 5  # as many as these tests' own executors have
_MIXINS = {
    "executor": ["ExecutorTest"],
    "test_wait": ["WaitTests"],
    "test_as_completed": ["AsCompletedTests"],
    "test_shutdown": ["ExecutorShutdownTest"],
    "test_init": ["InitializerMixin"],
}


def find(folder: str) -> None:
    """Let `test.test_concurrent_futures` be found in a folder; `test.support` is our Python's."""
    import test.support  # type: ignore[import-not-found]  # typeshed has none

    test.__path__.append(folder)
    # What an older Python's support has not, or not like this.
    support: Any = test.support
    support.Py_GIL_DISABLED = False
    support.skip_if_sanitizer = lambda *_, **__: lambda tested: tested


class _OnWorkers:
    """Says which executor is judged."""

    executor_type = hpcdist.Executor


def suite() -> unittest.TestSuite:
    """Gather the tests of all mixins."""
    tests = unittest.TestSuite()
    for module, mixins in _MIXINS.items():
        found: Any = importlib.import_module(f"test.test_concurrent_futures.{module}")
        base = importlib.import_module("test.test_concurrent_futures.util").ExecutorMixin
        for name in mixins:
            mixin = getattr(found, name)
            bases = (_OnWorkers, mixin) if issubclass(mixin, base) else (_OnWorkers, mixin, base)
            kind = type(name, (*bases, unittest.TestCase), {"__module__": module})
            tests.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(kind))
    return tests


def suite_of_pools() -> unittest.TestSuite:
    """Gather the tests of pools."""
    cases = importlib.import_module("tests.judges.pool_cases")
    cases.give_them_our_pool()
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    return unittest.TestSuite(load(case) for case in cases.CASES)


def main(what: str, results: str, folder: str = "") -> None:
    """Run the tests and write down how they went."""
    pids = hpcdist.addprocs(_WORKERS)
    if what == "pools":
        tests = suite_of_pools()
    else:
        find(folder)
        for pid in pids:
            hpcdist.remotecall_fetch(find, pid, folder)
        tests = suite()
    noting.run(tests, results)
    hpcdist.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
