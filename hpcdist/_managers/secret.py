"""The cluster's cookie: one secret, which whoever joins has to know. It never travels itself."""

from __future__ import annotations

import threading

LENGTH = 16

_lock = threading.Lock()  # guards both below
_cookie: str | None = None
_in_use = False


def cookie() -> str:
    """Return the cookie, made up at the first question."""
    global _cookie
    with _lock:
        if _cookie is None:
            _cookie = _make()
        return _cookie


def choose(text: str) -> str:
    """Take a cookie of the user's own, before the first worker.

    Raises:
        ValueError: It is longer than 16 characters, or not ASCII.
        RuntimeError: Workers have been started with another one.
    """
    global _cookie
    padded = pad(text)
    with _lock:
        if _in_use and padded != _cookie:
            raise RuntimeError("the cookie can be set only before the first worker is started")
        _cookie = padded
    return padded


def use() -> bytes:
    """Return the cookie for a launch; from now on it stays as it is."""
    global _in_use
    text = cookie()
    with _lock:
        _in_use = True
    return text.encode("ascii")


def adopt(data: bytes) -> None:
    """Take over the cookie of the cluster that this process has become a part of."""
    global _cookie, _in_use
    with _lock:
        _cookie, _in_use = data.decode("ascii"), True


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
