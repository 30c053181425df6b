"""The cells of a notebook, and what belongs to which: workers' prints, and calls.

Each call gets a number, greater than the one before. So the first number that is given out while a
cell runs tells of every other whether that cell, a later or an earlier one has made the call.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from typing import Any

from hpcdist._collective.everywhere import CodeForAll
from hpcdist._monitor.output import WorkersOutput
from hpcdist._runtime.node import Node, Service
from hpcdist._wire.messages import InterruptSince

_MOST = 10_000  # cells that are remembered


class NotebookCells(Service):
    """The cells that have been run."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._output = node.service(WorkersOutput)
        self.code = node.service(CodeForAll)
        self._begins: list[int] = []  # the first number of each cell
        self._parents: list[Any] = []  # what a message has to name to belong to it
        self._kernel: Any = None

    def watch(self, shell: Any) -> None:
        """Hear of the cells of a shell that begin and end."""
        self._kernel = getattr(shell, "kernel", None)
        self._begin()
        shell.events.register("pre_run_cell", self._on_begin)
        shell.events.register("post_run_cell", self._on_end)
        if self._kernel is not None:
            self._output.place = self._place

    def forget(self, shell: Any) -> None:
        """Hear of them no more."""
        shell.events.unregister("pre_run_cell", self._on_begin)
        shell.events.unregister("post_run_cell", self._on_end)
        self._output.place = None

    def _on_begin(self, info: Any) -> None:
        self._begin()

    def _begin(self) -> None:
        self._begins.append(next(self.node.ids))
        self._parents.append(self._kernel and self._kernel.get_parent("shell"))
        if len(self._begins) > _MOST:
            del self._begins[0], self._parents[0]

    def _on_end(self, result: Any) -> None:
        """Interrupt the calls of a cell that was stopped."""
        if isinstance(result.error_in_exec, KeyboardInterrupt):
            for pid in list(self.node.members.living):
                self.node.send(pid, InterruptSince(self._begins[-1]))
            self.node.progress.nudge()

    def _place(self, fd: int, text: str, ident: int) -> bool:
        """Put what a worker has printed under the cell that caused it. Called by the driver."""
        k = max(bisect_right(self._begins, ident) - 1, 0) if ident else -1
        stream: Any = sys.stdout if fd == 1 else sys.stderr
        thread, session = getattr(stream, "pub_thread", None), getattr(stream, "session", None)
        if thread is None or session is None:  # the user has put something else in its place
            return False
        content = {"name": "stdout" if fd == 1 else "stderr", "text": text}
        parent, topic = self._parents[k], getattr(stream, "topic", None)
        session.send(thread, "stream", content=content, parent=parent, ident=topic)
        return True
