"""What a process is doing: the stacks of its threads."""

from __future__ import annotations

import sys
import threading
import traceback
from types import FrameType

from hpcdist._runtime.node import Mail, Service, on
from hpcdist._wire.frames import OK
from hpcdist._wire.messages import AskStacks

_WAITING = "hpcdist/_transport/progress.py"
_OURS = "hpcdist-"  # names of threads of ours begin so


class Stacks(Service):
    """Tells others, and this process, where its threads are."""

    @on(AskStacks)
    def _on_ask(self, said: AskStacks, mail: Mail) -> None:
        self.node.reply(mail.peer, mail.ident, OK, self.text().encode())
        self.node.progress.soon()

    def text(self) -> str:
        """Return the stacks of all threads but idle ones of ours, the main thread first."""
        frames = sys._current_frames()
        main = threading.main_thread()
        threads = sorted(threading.enumerate(), key=lambda thread: thread is not main)
        calls = self.node.turns.calls
        parts = []
        for thread in threads:
            frame = frames.get(thread.ident or 0)
            idle = thread.name.startswith(_OURS) and thread.ident not in calls
            if frame is None or idle:
                continue
            runs = ", runs a call" if thread.ident in calls else ""
            lines = "".join(traceback.format_list(_of_interest(frame)))
            parts.append(f"Thread {thread.name}{runs}:\n{lines}")
        return "\n".join(parts)


def _of_interest(frame: FrameType) -> traceback.StackSummary:
    """Return a thread's stack down to where it waits, or answers this very question."""
    stack = traceback.extract_stack(frame)
    for depth, entry in enumerate(stack):
        if _WAITING in entry.filename or entry.filename == __file__:
            return traceback.StackSummary.from_list(stack[: depth + 1])
    return stack
