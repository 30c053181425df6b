"""What was probably meant: keywords one slip away, and names that other libraries have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

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
    """A class that answers for names which its like has in other libraries."""

    __slots__ = ()
    _elsewhere: ClassVar[Mapping[str, str]] = {}  # such a name, and what is to be written here

    if not TYPE_CHECKING:  # to a type checker, names that are missing stay missing

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property that failed: its own error says why
                return object.__getattribute__(self, name)
            raise missing(self, name, self._elsewhere)


def missing(owner: object, name: str, elsewhere: Mapping[str, str]) -> AttributeError:
    """Return the error for a name that an object does not have."""
    what = type(owner).__name__
    said = f"{what!r} object has no attribute {name!r}"
    hint = elsewhere.get(name)
    if hint is not None:
        said += f": {hint}"
    return AttributeError(said, name=name, obj=owner)
