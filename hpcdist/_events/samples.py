"""Samples: what a process is doing, said when it is asked.

Nothing is recorded for it as calls come and go, but two numbers that are kept anyway: when a call
has started, and how much was sent to each process. The rest is read off what the process has.
"""

from __future__ import annotations

import os
import sys
import time
from types import FrameType

from hpcdist._monitor import output
from hpcdist._remote.answers import Answers
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.running import Runners
from hpcdist._runtime.turns import Call
from hpcdist._wire import messages
from hpcdist._wire.frames import OK
from hpcdist._wire.messages import AskSample, Sample

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_CALLS_MOST = 16  # the oldest: a process with hundreds that wait need not name them all


class Sampler(Service):
    """Says what this process is doing."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._functions = node.service(Answers).functions
        self._runners = node.service(Runners)

    @on(AskSample)
    def _on_ask(self, said: AskSample, mail: Mail) -> None:
        self.node.reply(mail.peer, mail.ident, OK, messages.encode(self.take()))
        self.node.progress.soon()

    def take(self) -> Sample:
        """Say what this process is doing now."""
        node, now = self.node, self.node.machine.now()
        running, queued = self._runners.counts
        frames = sys._current_frames()
        started = sorted(node.turns.calls.copy().items(), key=lambda item: item[1].began)
        calls = [
            (self._name(call, frames.get(thread)), max(0.0, now - call.began), call.waits)
            for thread, call in started[:_CALLS_MOST]
        ]
        return Sample(
            now,
            calls,
            running,
            queued,
            output.rss(),
            time.process_time(),
            {pid: peer.sent for pid, peer in list(node.peers.items()) if peer.sent},
        )

    def _name(self, call: Call, frame: FrameType | None) -> str:
        """Name the user's function that a call, a batch of a map or a loop is in."""
        found = ""
        while frame is not None:
            code = frame.f_code
            if code.co_filename == _RUNNING:
                break
            ours = code.co_filename.startswith((_PACKAGE, "<frozen "))
            if not ours and code.co_name != "<module>":
                found = code.co_qualname
            frame = frame.f_back
        return found or self._called(call) or "(being loaded)"

    def _called(self, call: Call) -> str:
        """Name a function that has no frame: it is written in C."""
        if call.peer is None:  # a call of this process to itself
            return getattr(call.body[0], "__qualname__", "")
        return self._functions.name_of(call.aux)


_RUNNING = Runners.of.__code__.co_filename  # what lies outside of its frames is ours
