"""The cluster's cookie: one secret, which every process that joins must know. It never travels."""

from __future__ import annotations

from hpcdist._runtime.node import Node, Service

LENGTH = 16


class Secret(Service):
    """A cluster's cookie as one process knows it."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.lock()  # guards both below
        self._cookie: str | None = None
        self._in_use = False

    def cookie(self) -> str:
        """Return the cookie, made up at the first question."""
        with self._lock:
            if self._cookie is None:
                self._cookie = _make()
            return self._cookie

    def choose(self, text: str) -> str:
        """Take a cookie of the user's own, before the first worker.

        Raises:
            ValueError: It is longer than 16 characters, or not ASCII.
            RuntimeError: Workers have been started with another one.
        """
        padded = pad(text)
        with self._lock:
            if self._in_use and padded != self._cookie:
                raise RuntimeError("the cookie can be set only before the first worker is started")
            self._cookie = padded
        return padded

    def use(self) -> bytes:
        """Return the cookie for a launch; from now on it stays as it is."""
        text = self.cookie()
        with self._lock:
            self._in_use = True
        return text.encode("ascii")

    def adopt(self, data: bytes) -> None:
        """Take over the cookie of the cluster that this process has become a part of."""
        with self._lock:
            self._cookie, self._in_use = data.decode("ascii"), True


def pad(text: str) -> str:
    """Fill a cookie up with blanks.

    >>> pad("ab")
    'ab              '
    """
    if not isinstance(text, str):
        raise TypeError(f"a cookie is a str, not {text!r}")
    if not text.isascii():
        raise ValueError("a cookie consists of ASCII characters")
    if len(text) > LENGTH:
        raise ValueError(f"a cookie has at most {LENGTH} characters, not {len(text)}")
    return text.ljust(LENGTH)


def _make() -> str:
    import secrets
    import string

    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(LENGTH))
