"""The way round: workers that no link can join talk to each other by way of process 1.

Message by message, each in a control of its own: all that comes this way stays in order. A worker
goes round once both have tried to dial, and then for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcdist import _log
from hpcdist._runtime.controls import VIA
from hpcdist._runtime.node import node
from hpcdist._transport.link import Link
from hpcdist._transport.mpi import Item
from hpcdist._transport.router import Peer
from hpcdist._wire.frames import BODY_APART, CONTROL, HEAD, HEAD_SIZE, Buffer, pack


class Detour(Link):
    """Stands where the link to a worker would."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.open = False  # there is no socket to be closed, or to be known by

    def send(self, items: Sequence[Item]) -> None:
        """Send messages with their buffers to process 1, for the worker."""
        for item in items:
            data, buffers, end = item if isinstance(item, tuple) else (item, (), None)
            node.peers[1].post(*pack(CONTROL, 0, self.peer.pid, VIA, data, buffers), end)


def take(peer: Peer) -> None:
    """Go round to a worker from now on, and have it do so too."""
    if peer.link is None:
        _log.log("info", f"worker {peer.pid} is reached by way of process 1")
        peer.link = Detour(peer)
        node.progress.dirty.append(peer)
    if isinstance(peer.link, Detour):
        node.peers[1].control(VIA, peer.pid)
    node.progress.nudge()


@node.control(VIA)
def _on_via(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    other = node.peers.get(ident)  # to whom it shall go; once it is there, from whom it comes
    if other is None or not other.alive:
        return
    if node.me == 1:
        other.control(VIA, peer.pid, bytes(body), buffers)
        node.progress.soon()
        return
    if other.link is None:
        other.link = Detour(other)
        node.progress.dirty.append(other)
    if len(body):
        _deliver(other, body, buffers)


def _deliver(peer: Peer, message: Any, buffers: Sequence[Buffer]) -> None:
    kind, flags, count, length, ident, aux = HEAD.unpack_from(message)
    body = message[HEAD_SIZE + 8 * count : HEAD_SIZE + length]
    if flags & BODY_APART:
        body, buffers = buffers[0], buffers[1:]
    node.deliver(peer, kind, flags, ident, aux, body, buffers)
