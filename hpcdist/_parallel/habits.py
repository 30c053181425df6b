"""What an item of a function took in earlier maps, so that the next map need not feel its way.

Only for items that are small beyond doubt, and for functions that capture nothing and whose results
were small: a batch of many is pickled before its size is known. And whether the parts of a loop
were small: a few of these are combined where they are wanted, without a way up a tree.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import BuiltinFunctionType, CodeType, ModuleType
from typing import Any

_KEPT_MOST = 256
_SMALL = 64  # bytes
_LIGHT = 1024  # bytes
_NUMBERS = {int, float, complex, bool, type(None)}

_lock = threading.RLock()  # guards what is kept; re-entrant, as a finaliser may end a map
_seconds: dict[Any, float] = {}
_light: dict[Any, bool] = {}


def learned(f: Any) -> float | None:
    """How long an item of a function took the last time; None: not known."""
    key = _key_of(f)
    return None if key is None else _seconds.get(key)


def learn(f: Any, seconds: float | None) -> None:
    """Keep what an item of a function took; None: forget it."""
    _keep(_seconds, _key_of(f), seconds)


def are_light(f: Any) -> bool:
    """Tell whether the parts of a function's loop were small the last time."""
    return _light.get(_key_of(f), False)


def weigh(f: Any, nbytes: int) -> None:
    """Keep whether the parts of a function's loop were small."""
    _keep(_light, _key_of(f), nbytes <= _LIGHT)


def _keep(where: dict[Any, Any], key: Any, value: Any) -> None:
    if key is None or (key in where and where[key] == value):
        return
    with _lock:
        where.pop(key, None)
        if len(where) >= _KEPT_MOST:
            del where[next(iter(where))]
        if value is not None:
            where[key] = value


def _key_of(f: Any) -> Any:
    """What tells a function from others; None where captured values make it another one."""
    if type(f) is BuiltinFunctionType:
        return f if type(f.__self__) is ModuleType else None
    code = getattr(f, "__code__", None)
    return code if type(code) is CodeType and not f.__closure__ else None


def are_small(columns: Sequence[Any]) -> bool:
    """Tell whether these collections hold nothing but small numbers, as far as a look shows."""
    return bool(columns) and all(len(column) and _is_small(column) for column in columns)


def _is_small(column: Any) -> bool:
    if type(column) is range:
        return True
    if type(column) in (list, tuple):
        ends = (column[0], column[len(column) // 2], column[-1])
        return all(type(item) in _NUMBERS for item in ends)
    nbytes, dtype = getattr(column, "nbytes", None), getattr(column, "dtype", None)
    if type(nbytes) is not int or getattr(dtype, "hasobject", True):
        return False
    return nbytes <= _SMALL * len(column)
