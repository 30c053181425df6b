"""How far callers may be ahead of a process: who makes too many calls waits until some have begun.

Calls begin in the order in which they were made. So now and then one that does nothing is among
them, a mark: once it is answered, all before it have begun, and their arguments lie nowhere any
more. Between the newest mark and the oldest that is not answered is what may be outstanding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hpcdist import _config
from hpcdist._errors import ProcessExitedException
from hpcdist._runtime.node import Node
from hpcdist._transport.contracts import Slot
from hpcdist._transport.router import Peer

# Makes a call whose answer fills a slot: the slot, the function, the process, the arguments.
Ask = Callable[[Slot, Callable[[], None], int, tuple[Any, ...]], None]
_MARKS = 8  # that may be outstanding at once
CALL_SIZE = 1024  # bytes that a call takes beside its arguments, here and there


class Pacing:
    """The marks among the calls of one process."""

    def __init__(self, node: Node, ask: Ask) -> None:
        self._node = node
        self._ask = ask
        self._step = 0  # bytes from one to the next
        self._marks: dict[int, deque[Slot]] = {}  # by process, those that are outstanding
        node.on_death.append(self._on_death)

    def keep(self, peer: Peer) -> None:
        """Send a mark behind the call that has just left; wait, if there are too many of them."""
        if not self._step:
            # One step more before the first mark, and one behind the newest.
            self._step = _config.setting("outstanding") // (_MARKS + 2)
        is_first = not peer.next_mark
        peer.next_mark = peer.sent + CALL_SIZE * peer.calls + self._step
        if is_first:
            return
        mark = Slot(peer.pid)
        try:
            self._ask(mark, _begin, peer.pid, ())
        except (ProcessExitedException, ValueError):  # dead: the futures of its calls say so
            return
        mark.called = ""  # it is no call of the user's
        marks = self._marks.setdefault(peer.pid, deque())
        marks.append(mark)
        while len(marks) > _MARKS:
            oldest = marks[0]
            self._node.wait(oldest)
            if marks and marks[0] is oldest:  # else another thread has waited for it, too
                marks.popleft()

    def _on_death(self, pid: int) -> None:
        self._marks.pop(pid, None)


def _begin() -> None:
    """Be a mark."""
