"""The way round: workers that no link can join talk to each other by way of process 1.

Message by message, each in a control of its own: all that comes this way stays in order. A worker
goes round once both have tried to dial, and then for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcdist import _log
from hpcdist._runtime.node import Node, Service, on_raw
from hpcdist._transport.contracts import Item
from hpcdist._transport.link import Link
from hpcdist._transport.router import Peer
from hpcdist._wire.frames import BODY_APART, CONTROL, HEAD, HEAD_SIZE, Body, Buffer, pack
from hpcdist._wire.messages import VIA


class Detour(Link):
    """Stands where the link to a worker would."""

    def __init__(self, node: Node, peer: Peer) -> None:
        self._node = node
        self.peer = peer
        self.open = False  # there is no socket to be closed, or to be known by

    def send(self, items: Sequence[Item]) -> None:
        """Send messages with their buffers to process 1, for the worker."""
        for item in items:
            data, buffers, end = item if isinstance(item, tuple) else (item, (), None)
            self._node.peers[1].post(*_via(self.peer.pid, data, buffers), end)


class Relay(Service):
    """Messages that go round: this process's, and on process 1 those of others."""

    def take(self, peer: Peer) -> None:
        """Go round to a worker from now on, and have it do so too."""
        if peer.link is None:
            _log.log("info", f"process 1 relays messages to worker {peer.pid}")
            peer.link = Detour(self.node, peer)
            self.node.progress.dirty.append(peer)
        if isinstance(peer.link, Detour):
            self.node.peers[1].post(*_via(peer.pid))
        self.node.progress.nudge()

    @on_raw(VIA)
    def _on_via(self, peer: Peer, ident: int, body: Body, buffers: Sequence[Buffer]) -> None:
        other = self.node.peers.get(
            ident
        )  # to whom it shall go; once it is there, from whom it comes
        if other is None or not other.alive:
            return
        if self.node.me == 1:
            other.post(*_via(peer.pid, bytes(body), buffers))
            self.node.progress.soon()
            return
        if other.link is None:
            other.link = Detour(self.node, other)
            self.node.progress.dirty.append(other)
        if len(body):
            self._deliver(other, body, buffers)

    def _deliver(self, peer: Peer, message: Any, buffers: Sequence[Buffer]) -> None:
        kind, flags, count, length, ident, aux = HEAD.unpack_from(message)
        body = message[HEAD_SIZE + 8 * count : HEAD_SIZE + length]
        if flags & BODY_APART:
            body, buffers = buffers[0], buffers[1:]
        self.node.deliver(peer, kind, flags, ident, aux, body, buffers)


def _via(
    pid: int, data: bytes = b"", buffers: Sequence[Buffer] = ()
) -> tuple[bytes, Sequence[Buffer]]:
    return pack(CONTROL, 0, pid, VIA, data, buffers)
