"""CPython's own tests of `multiprocessing.Pool`, on ours. The workers import them from here."""

from __future__ import annotations

import unittest
from types import SimpleNamespace
from typing import Any

import hpcdist

try:
    from test import _test_multiprocessing as theirs  # type: ignore[import-not-found]
except unittest.SkipTest as exc:  # they find this system wanting
    raise ImportError(str(exc)) from exc


class Judged:
    """What the tests take from the module whose turn it is."""

    TYPE = "processes"
    Pool = staticmethod(hpcdist.Pool)


class Pool(Judged, theirs._TestPool, unittest.TestCase):  # type: ignore[misc]
    """Maps, one after the other and all at once, and their errors."""


class PoolWorkerErrors(Judged, theirs._TestPoolWorkerErrors, unittest.TestCase):  # type: ignore[misc]
    """Errors of tasks."""


class PoolWorkerLifetime(Judged, theirs._TestPoolWorkerLifetime, unittest.TestCase):  # type: ignore[misc]
    """Workers that are replaced."""

    # It starts a program that has `multiprocessing.Pool` by its name: it says nothing of ours.
    test_worker_finalization_via_atexit_handler_of_multiprocessing = None


CASES: list[type[unittest.TestCase]] = [Pool, PoolWorkerErrors, PoolWorkerLifetime]


class _Multiprocessing(SimpleNamespace):
    """Stands for `multiprocessing` in their module: some tests take its Pool by name."""

    Pool = staticmethod(hpcdist.Pool)

    def __getattr__(self, name: str) -> Any:
        import multiprocessing

        return getattr(multiprocessing, name)


def give_them_our_pool() -> None:
    """Let their tests that name `multiprocessing.Pool` have ours."""
    theirs.multiprocessing = _Multiprocessing()
