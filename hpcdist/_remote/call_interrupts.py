"""Interrupts for some calls alone: whoever made them does not want them any more."""

from __future__ import annotations

from hpcdist._runtime.node import Mail, Service, on
from hpcdist._wire.messages import InterruptCall, InterruptSince


class CallInterrupts(Service):
    """Ends calls that have started here, for those who made them."""

    @on(InterruptCall)
    def _on_interrupt_call(self, said: InterruptCall, mail: Mail) -> None:
        turns = self.node.turns
        for thread, call in list(turns.calls.items()):
            caller = self.node.me if call.peer is None else call.peer.pid
            if (caller, call.ident) == said.ref:
                turns.interrupts.interrupt(thread)

    @on(InterruptSince)
    def _on_interrupt_since(self, said: InterruptSince, mail: Mail) -> None:
        turns = self.node.turns
        for thread, call in list(turns.calls.items()):
            if call.peer is mail.peer and call.ident >= said.first:
                turns.interrupts.interrupt(thread)
