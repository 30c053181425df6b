"""What an item of a function took in earlier maps, so that the next map need not feel its way.

Only for items that are small beyond doubt, and for functions that capture nothing and whose results
were small: a batch of many is pickled before its size is known.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import BuiltinFunctionType, CodeType, ModuleType
from typing import Any

_KEPT_MOST = 256
_SMALL = 64  # bytes
_NUMBERS = {int, float, complex, bool, type(None)}

_lock = threading.Lock()  # guards what is kept
_seconds: dict[Any, float] = {}


def learned(f: Any) -> float | None:
    """How long an item of a function took the last time; None: not known."""
    key = _key_of(f)
    return None if key is None else _seconds.get(key)


def learn(f: Any, seconds: float | None) -> None:
    """Keep what an item of a function took; None: forget it."""
    key = _key_of(f)
    if key is None:
        return
    with _lock:
        _seconds.pop(key, None)
        if len(_seconds) >= _KEPT_MOST:
            del _seconds[next(iter(_seconds))]
        if seconds is not None:
            _seconds[key] = seconds


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
