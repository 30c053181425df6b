"""The functions that work on any reference: futures, channels, remote channels."""

from __future__ import annotations

from typing import Any

from hpcdist._remote.channels import Channel
from hpcdist._remote.futures import Future
from hpcdist._remote.remote_channels import RemoteChannel

_REFERENCES = (Future, RemoteChannel, Channel)


def fetch(x: Any, /, *key: Any, timeout: float | None = None) -> Any:
    """Return a future's value or a channel's next item; anything else is returned as it is.

    Example:
        >>> import hpcdist
        >>> hpcdist.fetch(42)
        42
    """
    if not isinstance(x, _REFERENCES):
        return x
    return x.fetch(*key, **_limit(timeout))


def wait(x: Any, /, *key: Any, timeout: float | None = None) -> Any:
    """Wait until a future is done or a channel has an item; return it."""
    if isinstance(x, _REFERENCES) or hasattr(x, "wait"):
        x.wait(*key, **_limit(timeout))
    return x


def isready(x: Any, /, *key: Any) -> bool:
    """Tell whether a future is done or a channel has an item."""
    return bool(x.isready(*key))


def put(x: Any, value: Any, /, *key: Any, timeout: float | None = None) -> None:
    """Put a value into a channel, or into a future that is still empty."""
    x.put(value, *key, **_limit(timeout))


def take(x: Any, /, *key: Any, timeout: float | None = None) -> Any:
    """Take the next item out of a channel."""
    return x.take(*key, **_limit(timeout))


def close(x: Any, /) -> None:
    """Close a channel."""
    x.close()


def isopen(x: Any, /) -> bool:
    """Tell whether a channel is open."""
    return bool(x.isopen())


def _limit(timeout: float | None) -> dict[str, float]:
    return {} if timeout is None else {"timeout": timeout}
