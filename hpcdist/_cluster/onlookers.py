"""Onlookers: those who look into this driver, from outside as `hpcdist top`, or by its dashboard.

As long as nobody looks, nothing is gathered: the driver has a window, three descriptors, from its
first worker on. A question at it has everything gathered once a second for some seconds.
"""

from __future__ import annotations

import json
import os
import re
import select
from collections.abc import Callable

from hpcdist._cluster.snapshots import Snapshots
from hpcdist._errors import ProcessExitedException
from hpcdist._events.windows import FolderWindow, Window
from hpcdist._monitor.stacks import Stacks
from hpcdist._numbers import whole
from hpcdist._runtime.node import Node, Service
from hpcdist._transport.contracts import Waitable
from hpcdist._wire.messages import AskStacks

_EVERY = 1.0  # seconds between two pictures
_SOON = 0.25  # until the second one: the first knows no rates
_WATCHED_FOR = 5.0  # seconds for which a question holds
_LOOK_EVERY = 2.0  # seconds between looks into the run's folder, in a job
_FOLDER = "HPCDIST_RUN"


class _Stacks(Waitable):
    """The stacks of a worker, which somebody wants to see."""

    def __init__(self, pid: int, shown: dict[str, str]) -> None:
        self.where = pid
        self._shown = shown

    def arrived(self) -> None:
        if self.error is None:
            self._shown[str(self.where)] = bytes(self.value[1]).decode()


class Onlookers(Service):
    """Shows those who look from outside what the cluster is doing."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._snapshots = node.service(Snapshots)
        self._window: Window | None = None
        self._opening = node.machine.lock()  # workers may join on several threads at once
        self._in_folder: FolderWindow | None = None
        self._asked_at = self._asked_there_at = float("-inf")
        self._watchers: list[Callable[[bytes], None]] = []  # in this very process
        self._under_way = False
        self._stacks: dict[str, str] = {}  # those that somebody wants to see, by pid
        node.on_join.append(self._open)

    def _open(self, pid: int) -> None:
        """Have a window from the first worker on: a driver without any is a plain program."""
        if not self.node.machine.shares_memory or self.node.me != 1:
            return
        with self._opening:
            if self._window is not None:
                return
            self._window = window = Window()
        self.node.progress.start()
        self.node.progress.register(window.asked, self._on_question, select.EPOLLIN)
        folder = os.environ.pop(_FOLDER, "")  # drivers that this one starts are no run of their own
        if folder and os.path.isdir(folder):
            self._in_folder = FolderWindow(folder)
            self._look_into_folder()

    def _on_question(self, events: int) -> None:
        assert self._window is not None
        if questions := self._window.questions():
            self._asked_at = self.node.machine.now()
            self._hear(questions)

    def _look_into_folder(self) -> None:
        assert self._in_folder is not None
        if questions := self._in_folder.questions():
            self._asked_there_at = self.node.machine.now()
            self._hear(questions)
        self.node.progress.call_later(_LOOK_EVERY, self._look_into_folder)

    def _hear(self, questions: bytes) -> None:
        """Do what is asked: have things shown, and stacks among them."""
        wanted = {whole(word.decode()) for word in re.findall(rb"stacks (\d+)", questions)}
        for pid in wanted & {self.node.me, *self.node.members.living}:
            self._ask_stacks(pid or 0)
        self._begin()

    def _ask_stacks(self, pid: int) -> None:
        node = self.node
        if pid == node.me:
            self._stacks[str(pid)] = node.service(Stacks).text()
            return
        self._stacks.setdefault(str(pid), "no answer: it may be stopped, or in C\n")
        ident = next(node.ids)
        node.pending[ident] = _Stacks(pid, self._stacks)
        try:
            node.peer(pid).send(AskStacks(), ident)
        except (ProcessExitedException, ValueError):  # it died this moment
            node.pending.pop(ident, None)
        node.progress.soon()

    @property
    def is_busy(self) -> bool:
        """Whether pictures are taken."""
        return self._under_way

    def watch(self, see: Callable[[bytes], None]) -> Callable[[], None]:
        """Have the driver call `see` with each picture; return what ends that."""
        self._watchers.append(see)
        self.node.progress.call_later(0.0, self._begin)
        return lambda: self._watchers.remove(see)

    def _begin(self) -> None:
        if not self._under_way:
            self._under_way = True
            self._snapshots.gather(lambda: self._show(_SOON))

    def _show(self, pause: float) -> None:
        """Show what was gathered, and go on if somebody still looks."""
        text = json.dumps({**self._snapshots.facts(), "stacks": self._stacks}).encode()
        since = self.node.machine.now() - _WATCHED_FOR
        here, there = self._asked_at > since, self._asked_there_at > since
        if here and self._window is not None:
            self._window.show(text)
        if there and self._in_folder is not None:
            self._in_folder.show(text)
        for see in list(self._watchers):
            see(text)
        if here or there or self._watchers:
            self.node.progress.call_later(pause, self._again)
        else:
            self._under_way = False
            self._snapshots.forget()
            self._stacks.clear()

    def _again(self) -> None:
        self._snapshots.gather(lambda: self._show(_EVERY))
