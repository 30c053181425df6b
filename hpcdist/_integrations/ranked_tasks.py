"""Tasks of an executor that several workers run together: process 1 finds the workers."""

from __future__ import annotations

from typing import Any

from hpcdist._collective.spmd import SectionCalls, SectionTerms, checked_ranks
from hpcdist._remote.futures import Future
from hpcdist._runtime.node import Node

SECTIONS = -1  # stands for the worker of such a task


class RankedTasks:
    """Sends the tasks of one executor as sections.

    Args:
        node: The process of the executor.
        ranks: How many workers run a task.
        max_workers: How many workers the executor uses.
    """

    def __init__(self, node: Node, ranks: int, max_workers: int | None) -> None:
        self.ranks = checked_ranks(ranks)
        if max_workers is not None and max_workers < ranks:
            raise ValueError(f"ranks={ranks} needs more workers than max_workers={max_workers}")
        self._pids: list[int] = []
        self._members = node.members
        self._calls = node.service(SectionCalls)

    def has_room(self, flying: int, pids: list[int]) -> bool:
        """Tell whether one more may be sent: as many as can run at once, and one that waits.

        Args:
            flying: Those that are under way.
            pids: The workers to use.
        """
        self._pids = pids
        return flying <= len(pids) // self.ranks

    def remotecall(self, f: Any, where: int, args: Any, kw: Any) -> Future[Any]:
        """Send a task, as one would to a worker: to some of those there are."""
        named = None if self._pids == sorted(self._members.living) else self._pids
        return self._calls.submit(f, args, kw, SectionTerms(named, self.ranks))
