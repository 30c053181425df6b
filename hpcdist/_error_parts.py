"""The parts of an exception, as it travels.

Exceptions pickle as "class, args" and are rebuilt by calling the class, which fails for each one
whose __init__ takes something else than its args. Hence those without a pickling of their own
travel as their parts, and their __init__ is not called again.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    # Its class, args, __dict__, and the members that live in C or slots.
    Parts: TypeAlias = tuple[type[BaseException], tuple[Any, ...], dict[str, Any], dict[str, Any]]

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE, Include/object.h: set on every class made at run time


def pickles_by_default(kind: type[BaseException]) -> bool:
    import copyreg

    return (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is static_base(kind).__reduce__
        and getattr(kind, "__setstate__", None) is getattr(BaseException, "__setstate__", None)
        and kind not in copyreg.dispatch_table
        and not issubclass(kind, BaseExceptionGroup)  # Its members live where only __new__ writes.
    )


def parts(cause: BaseException) -> Parts:
    return type(cause), args_of(cause), dict(vars(cause)), members(cause)


def from_parts(
    kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any], members: dict[str, Any]
) -> BaseException:
    kind = main_class(kind)
    made = static_base(kind).__new__(kind)
    set_parts(made, state, members)
    BaseException.args.__set__(made, args)  # type: ignore[attr-defined]
    return made


def main_class(kind: type[BaseException]) -> type[BaseException]:
    """Return this process' own `__main__` class of that name, which `except` clauses here mean."""
    if kind.__module__ != "__main__":
        return kind
    found: object = sys.modules.get("__main__")
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else kind


def set_parts(made: BaseException, state: dict[str, Any], members: dict[str, Any]) -> None:
    vars(made).update(state)
    for name, value in members.items():
        BaseException.__setattr__(made, name, value)


# What C members, C properties and slots are called from.
_DESCRIPTORS = tuple(type(vars(OSError)[name]) for name in ("errno", "characters_written"))


def members(exc: BaseException) -> dict[str, Any]:
    """Return what an exception holds outside its `__dict__` and args: errno, slots and the like."""
    found: dict[str, Any] = {}
    for kind in type(exc).__mro__:
        if kind in (Exception, BaseException, object):
            continue
        for name, descriptor in vars(kind).items():
            if not isinstance(descriptor, _DESCRIPTORS) or name.startswith("__"):
                continue
            if kind is AttributeError and name == "obj":  # Of any size, and of no use elsewhere.
                continue
            try:
                value = descriptor.__get__(exc)
            except (AttributeError, TypeError):  # Never set.
                continue
            if value is not None:
                found.setdefault(name, value)
    return found


def args_of(exc: BaseException) -> tuple[Any, ...]:
    args: tuple[Any, ...] = BaseException.args.__get__(exc)  # type: ignore[attr-defined]
    return args


def static_base(kind: type[BaseException]) -> type[BaseException]:
    """Return the built-in class that `kind` is laid out as; its `__new__` runs no user code."""
    # Along __base__, not the MRO: this is the line that Python itself checks a __new__ against.
    base: Any = kind
    while base.__flags__ & _HEAP_TYPE:
        base = base.__base__
    return base  # type: ignore[no-any-return]
