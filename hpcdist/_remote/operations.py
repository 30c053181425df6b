"""The functions that work on any reference: futures, channels, remote channels."""

from __future__ import annotations

from types import GeneratorType
from typing import Any, Protocol, TypeVar, overload

from hpcdist._frames import brief, cut
from hpcdist._public import public
from hpcdist._remote.channels import Channel
from hpcdist._remote.futures import Future
from hpcdist._remote.remote_channels import RemoteChannel
from hpcdist._runtime.node import here
from hpcdist._runtime.references import Reference

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Fetchable(Protocol[T_co]):
    """A future, a remote channel or value: what `fetch` gives the value of."""

    def fetch(self) -> T_co: ...


_REFERENCES = (Future, RemoteChannel, Channel)


@overload
def fetch(x: Fetchable[T], /, *key: Any, timeout: float | None = None) -> T: ...
@overload
def fetch(x: T, /, *key: Any, timeout: float | None = None) -> T: ...
@public
@brief
def fetch(x: Any, /, *key: Any, timeout: float | None = None) -> Any:
    """Return a future's value or a channel's next item; anything else is returned as it is.

    Raises:
        TypeError: It is a list of references, or the like: `gather` fetches several.

    Example:
        >>> import hpcdist
        >>> hpcdist.fetch(42)
        42
    """
    _refuse_several("fetch", x)
    if not isinstance(x, _REFERENCES):
        return x
    return x.fetch(*key, **_limit(timeout))


@public
@brief
def wait(x: T, /, *key: object, timeout: float | None = None) -> T:
    """Wait until a future is done or a channel has an item; return it."""
    _refuse_several("wait", x)
    if isinstance(x, _REFERENCES) or hasattr(x, "wait"):
        x.wait(*key, **_limit(timeout))
    return x


@public
def isready(x: Any, /, *key: Any) -> bool:
    """Tell whether a future is done or a channel has an item."""
    _refuse_several("isready", x)
    return bool(x.isready(*key))


@public
def put(x: Any, value: Any, /, *key: Any, timeout: float | None = None) -> None:
    """Put a value into a channel, or into a future that is still empty."""
    here.node.admit()
    try:  # as in `take`: it would look as if nothing was put
        if key:
            x.put(value, *key, **_limit(timeout))
        elif timeout is None:
            x.put(value)
        else:
            x.put(value, timeout=timeout)
    except BaseException as exc:
        cut(exc)
        raise


@overload
def take(x: RemoteChannel[T], /, *key: Any, timeout: float | None = None) -> T: ...
@overload
def take(x: Any, /, *key: Any, timeout: float | None = None) -> Any: ...
@public
def take(x: Any, /, *key: Any, timeout: float | None = None) -> Any:
    """Take the next item out of a channel."""
    _refuse_several("take", x)
    # CPython 3.11 looks for signals after a call with `*` or `**`: the item would be lost.
    try:
        if key:
            return x.take(*key, **_limit(timeout))
        return x.take() if timeout is None else x.take(timeout=timeout)
    except BaseException as exc:
        cut(exc)
        raise


@public
def close(x: Any, /) -> None:
    """Close a channel."""
    here.node.admit()
    x.close()


@public
def isopen(x: Any, /) -> bool:
    """Tell whether a channel is open."""
    here.node.admit()
    return bool(x.isopen())


def _limit(timeout: float | None) -> dict[str, float]:
    return {} if timeout is None else {"timeout": timeout}


def _refuse_several(name: str, x: object) -> None:
    """Raise for a collection of references: one by one they would do, and `gather` does that."""
    here.node.admit()
    if isinstance(x, dict):
        refers = any(isinstance(item, _ANY) for pair in x.items() for item in pair)
    elif isinstance(x, list | tuple | set | frozenset):
        refers = any(isinstance(item, _ANY) for item in x)
    else:
        refers = isinstance(x, GeneratorType)  # what it holds, it alone knows
    if refers:
        raise TypeError(
            f"{name} takes one future or channel, not a {type(x).__name__} of them; "
            "gather([...]) returns the values of several futures"
        )


_ANY = (Reference, Channel)
