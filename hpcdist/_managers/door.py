"""Where a world's members dial: a socket of this host, or ports of it under TLS."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any

from hpcdist._managers.reaching import Unproven, listen
from hpcdist._runtime.node import node

_PATIENCE = 30.0  # 64 workers that start on two cores take their time
_unproven = Unproven()


class Door:
    """Accepts connections; each is greeted on a thread of its own.

    Args:
        listeners: Sockets that listen.
        greet: Called with each connection that has come.
        told: What a join file says of the way here.
    """

    def __init__(
        self, listeners: list[socket.socket], greet: Callable[[Any], None], told: dict[str, Any]
    ) -> None:
        self.told = told
        self._greet = greet
        self._secure = "tls" in told
        self._listeners = listeners
        for listener in listeners:
            node.progress.register(listener.fileno(), functools.partial(self._knock, listener), 1)

    @classmethod
    def on_host(cls, path: str, greet: Callable[[Any], None]) -> Door:
        """Open a Unix socket in a private folder."""
        return cls([listen(path)], greet, {"socket": path})

    @classmethod
    def on_network(cls, interface: str | None, greet: Callable[[Any], None], port: int = 0) -> Door:
        """Open a port on each routable address of this host, or on those of one interface."""
        from hpcdist._transport import network, tls

        pem = tls.certificate()
        listeners = network.listen(interface, port)
        targets = [listener.getsockname()[:2] for listener in listeners]
        return cls(listeners, greet, {"addresses": targets, "tls": pem})

    def _knock(self, listener: socket.socket, events: int) -> None:
        try:
            sock, _address = listener.accept()
        except OSError:
            return
        if self._secure:
            number = _unproven.enter(sock)
            node.turns.background(lambda: self._prove(sock, number))
        else:
            node.turns.background(lambda: self._greet(sock))

    def _prove(self, sock: socket.socket, number: int) -> None:
        import ssl

        from hpcdist._transport import tls

        try:
            secure = tls.accept(sock, _PATIENCE)
        except (ConnectionResetError, ssl.SSLEOFError):  # one that got in by another of our ports
            sock.close()
            return
        except OSError as exc:
            _unproven.refuse(exc)
            sock.close()
            return
        finally:
            _unproven.leave(number)
        self._greet(secure)

    def close(self) -> None:
        """Accept nobody any more."""
        for listener in self._listeners:
            node.progress.unregister(listener.fileno())
            listener.close()
        self._listeners = []
