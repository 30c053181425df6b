"""Messages for whose buffers this process had no memory: the waiter gets a MemoryError."""

from __future__ import annotations

import os
import sys

from hpcdist import _errors
from hpcdist._remote import object_owners
from hpcdist._remote.answers import Answers
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._runtime.references import References
from hpcdist._transport.router import Peer
from hpcdist._wire.frames import CALL, DEFINES, FAILED, REFS, RESULT, Body
from hpcdist._wire.messages import INVOKE, NUMBERS, PUT_ITEM, Operate, SetFuture, Unlearn

# Requests whose senders take a failure for an answer.
_ANSWERED = {PUT_ITEM, INVOKE, NUMBERS[Operate], NUMBERS[SetFuture]}


class NoRoom(Service):
    """What this process does with messages for whose buffers it had no memory."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._references = node.service(References)
        self._answers = node.service(Answers)
        node.on_no_room = self._on_no_room

    def _on_no_room(
        self, peer: Peer, kind: int, flags: int, ident: int, aux: int, body: Body, nbytes: int
    ) -> None:
        error = MemoryError(f"no memory for {nbytes:,} bytes that came from process {peer.pid}")
        if kind == RESULT:
            self.node.deliver(
                peer, RESULT, FAILED, ident, 0, _errors.encode_error(error, self.node.me), ()
            )
        elif kind == CALL:
            self._refuse(peer, flags, ident, aux, body, error)
        elif aux == INVOKE and len(body):
            self._refuse_method(peer, ident, body, error)
        elif aux in _ANSWERED:
            self.node.reply(peer, ident, FAILED, _errors.encode_error(error, self.node.me))
        else:
            self._end(error)

    def _refuse(
        self, peer: Peer, flags: int, ident: int, aux: int, body: Body, error: MemoryError
    ) -> None:
        """Answer a call whose arguments are lost, and maybe its function."""
        if len(body) and flags & DEFINES:
            body = memoryview(body)[4 + int.from_bytes(body[:4], "little") :]
        if len(body) and flags & REFS:
            self._references.arrive(body)  # and lets go of them again
        peer.send(Unlearn(aux))
        self._answers.refuse(peer, flags, ident, error)

    def _refuse_method(self, peer: Peer, ident: int, body: Body, error: MemoryError) -> None:
        """Answer a call of a remote object's method, whose arguments are lost."""
        _, flags, _, rest = object_owners.taken_apart(body)
        if flags & REFS:
            self._references.arrive(rest)  # and lets go of them again
        self._answers.refuse(peer, flags, ident, error)

    @on(Unlearn)
    def _on_unlearn(self, said: Unlearn, mail: Mail) -> None:
        mail.peer.known.discard(said.function)
        mail.peer.bound.clear()

    def _end(self, error: MemoryError) -> None:
        """End this process: others wait for what it cannot take in, and nothing would tell them."""
        if self.node.me == 1:
            raise error
        if sys.__stderr__ is not None:
            print(f"hpcdist: worker {self.node.me} ends: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)
