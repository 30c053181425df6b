"""Where a world's members dial: a socket of this host, or ports of it under TLS."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from hpcdist._runtime.node import Node
from hpcdist._transport.network import Address
from hpcdist._worker.dialling import listen
from hpcdist._worker.strangers import Entrance, Welcome

_CALLING = 10.0


class Listener:
    """Lets in those who know the cookie.

    Args:
        node: Whose it is.
        listeners: Sockets that listen.
        cookie: What they have to know.
        welcome: See `Entrance`.
        told: What a join file says of the way here.
    """

    def __init__(
        self,
        node: Node,
        listeners: list[socket.socket],
        cookie: bytes,
        welcome: Welcome,
        told: dict[str, Any],
    ) -> None:
        self.told = told
        secure = "tls" in told
        self._entrances = [
            Entrance(node, each, cookie, welcome, secure=secure) for each in listeners
        ]

    @classmethod
    def on_host(cls, node: Node, path: str, cookie: bytes, welcome: Welcome) -> Listener:
        """Open a Unix socket in a private folder."""
        return cls(node, [listen(path)], cookie, welcome, {"socket": path})

    @classmethod
    def on_network(
        cls, node: Node, interface: str | None, cookie: bytes, welcome: Welcome, port: int = 0
    ) -> Listener:
        """Open a port on each routable address of this host, or on those of one interface."""
        from hpcdist._transport import network, tls

        pem = tls.certificate()
        listeners = network.listen(interface, port)
        targets = [listener.getsockname()[:2] for listener in listeners]
        return cls(node, listeners, cookie, welcome, {"addresses": targets, "tls": pem})

    def call(self, targets: Sequence[Address]) -> None:
        """Dial one that cannot dial us, and greet it as if it had.

        Raises:
            ConnectionError: It cannot be reached either.
        """
        from hpcdist._transport import network

        if not self._entrances:
            return
        entrance = self._entrances[0]

        def admit(sock: socket.socket, _: float) -> bool:
            entrance.admit(sock, targets[0][0])
            return True

        network.dial(targets, admit, _CALLING)

    def close(self) -> None:
        """Accept no more connections."""
        for entrance in self._entrances:
            entrance.close()
        self._entrances = []
