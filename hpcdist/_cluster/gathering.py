"""Acts that are done for many at once, where their causes come close together."""

from __future__ import annotations

from collections.abc import Callable

from hpcdist._runtime.node import Node

_PAUSE, _PAUSE_EACH, _PAUSE_MOST = 0.01, 0.0001, 0.25  # seconds


class Gathering:
    """Has something done at once, and what is wanted soon after that in one go.

    An act tells every worker something. The pause between two acts grows with the workers, so
    that process 1 spends a small part of its time on them, however much happens.

    Args:
        node: Process 1.
        act: Does what is to be done by now, for all together; there may be nothing.
        hearers: Tells how many workers an act tells something.
        beside: Whether the act, where it comes later, takes a thread of its own: it may block.
    """

    def __init__(
        self,
        node: Node,
        act: Callable[[], None],
        hearers: Callable[[], int],
        *,
        beside: bool = False,
    ) -> None:
        self._node = node
        self._act = act
        self._hearers = hearers
        self._beside = beside
        self._lock = node.machine.lock()  # guards the two below
        self._rests_until = 0.0
        self._is_due = False  # a timer will have it done

    def soon(self) -> None:
        """Do it now, or after the pause since the last time."""
        with self._lock:
            if self._is_due:
                return
            wait = self._rests_until - self._node.machine.now()
            self._is_due = wait > 0
        if wait > 0:
            self._node.progress.call_later(wait, self._on_timer)
        else:
            self.now()

    def now(self) -> None:
        """Do it now."""
        pause = min(_PAUSE + _PAUSE_EACH * self._hearers(), _PAUSE_MOST)
        with self._lock:
            self._rests_until = self._node.machine.now() + pause
        self._act()

    def _on_timer(self) -> None:
        with self._lock:
            self._is_due = False
        if self._beside:
            self._node.turns.background(self.now)
        else:
            self.now()
