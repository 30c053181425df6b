"""What was probably meant: keywords one slip away, and names that other libraries have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, ParamSpec, TypeVar

from hpcdist._config import nearest

P = ParamSpec("P")
R = TypeVar("R")

# Keywords of others' maps and pools, and ours.
_ELSEWHERE = {
    **dict.fromkeys(("chunksize", "chunk_size", "batch", "chunks"), "batch_size"),
    **dict.fromkeys(("pid", "workers", "worker_pool", "executor"), "pool"),
    **dict.fromkeys(("retries", "retry", "retry_delay"), "retry_delays"),
    **dict.fromkeys(("processes", "nprocs", "n_jobs", "max_worker"), "max_workers"),
    **dict.fromkeys(("error_callback", "onerror"), "on_error"),
}


def suggesting(f: Callable[P, R]) -> Callable[P, R]:
    """Have a function name the nearest of its keywords where it gets one that it does not know.

    >>> @suggesting
    ... def pmap(f, *collections, batch_size=1): ...
    >>> pmap(abs, [1], batchsize=3)
    Traceback (most recent call last):
    TypeError: pmap has no keyword 'batchsize'; did you mean 'batch_size'?
    """
    signature = inspect.signature(f)
    known = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and name != "self"
    ]
    takes_function = any(name in signature.parameters for name in ("f", "fn"))

    @functools.wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            raise _unknown_keyword(f, unknown, known, takes_function)
        return f(*args, **kwargs)

    return call


def _unknown_keyword(
    f: Callable[..., object], name: str, known: list[str], takes_function: bool
) -> TypeError:
    what = f.__qualname__.removesuffix(".__init__")
    if what.endswith(".__call__"):  # an object that is used as a function
        what = what.removesuffix(".__call__").lower()
    meant = _ELSEWHERE.get(name)
    if meant not in known:
        meant = nearest(name, known)
    hint = f"did you mean {meant!r}?" if meant else f"known are {', '.join(known)}"
    if takes_function and not meant:
        hint += f"; one for the function itself goes by functools.partial(f, {name}=…)"
    return TypeError(f"{what} has no keyword {name!r}; {hint}")


class Hinting:
    """A class that answers for names which its like has in other libraries.

    It has them, as attributes that raise: with `__getattr__`, CPython 3.11 looks for each attribute
    of such an object in its slow way, and a call with a future takes a tenth longer.
    """

    __slots__ = ()
    _elsewhere: ClassVar[Mapping[str, str]] = {}  # such a name, and what is to be written here

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls).get("_elsewhere", ()):
            if not any(name in vars(base) for base in cls.__mro__):
                setattr(cls, name, _Missing(name))

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in self._elsewhere]


class _Missing:
    """An attribute that its class does not have, but others' classes of the kind do."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: Hinting | None, kind: type[Hinting]) -> Any:
        raise missing(kind if owner is None else owner, self._name, kind._elsewhere)


def missing(owner: object, name: str, elsewhere: Mapping[str, str]) -> AttributeError:
    """Return the error for a name that an object does not have."""
    if isinstance(owner, type):
        said = f"type object {owner.__name__!r} has no attribute {name!r}"
    else:
        said = f"{type(owner).__name__!r} object has no attribute {name!r}"
    hint = elsewhere.get(name)
    if hint is not None:
        said += f": {hint}"
    return AttributeError(said, name=name, obj=owner)
