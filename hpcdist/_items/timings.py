"""What an item of a function took in earlier maps, so that the next map need not feel its way.

Only for items that are small beyond doubt, and for functions that capture nothing and whose results
were small: a batch of many is pickled before its size is known. And whether the parts of a loop
were small: a few of these are combined where they are wanted, without a way up a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import BuiltinFunctionType, CodeType, ModuleType
from typing import Any

from hpcdist._runtime.node import Node, Service

_KEPT_MOST = 256
_SMALL = 64  # bytes
_LIGHT = 1024  # bytes
_NUMBERS = {int, float, complex, bool, type(None)}


class Timings(Service):
    """What functions took in this process's earlier maps and loops."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.rlock()  # guards the two; re-entrant: a finaliser may end a map
        self._seconds: dict[Any, float] = {}
        self._light: dict[Any, bool] = {}

    def learned(self, f: object) -> float | None:
        """Return how long an item of a function took the last time; None: not known."""
        key = _key_of(f)
        return None if key is None else self._seconds.get(key)

    def learn(self, f: object, seconds: float | None) -> None:
        """Keep what an item of a function took; None: forget it."""
        self._keep(self._seconds, _key_of(f), seconds)

    def are_light(self, f: object) -> bool:
        """Tell whether the parts of a function's loop were small the last time."""
        return self._light.get(_key_of(f), False)

    def weigh(self, f: object, nbytes: int) -> None:
        """Keep whether the parts of a function's loop were small."""
        self._keep(self._light, _key_of(f), nbytes <= _LIGHT)

    def _keep(self, where: dict[Any, Any], key: object, value: object) -> None:
        if key is None or (key in where and where[key] == value):
            return
        with self._lock:
            where.pop(key, None)
            if len(where) >= _KEPT_MOST:
                del where[next(iter(where))]
            if value is not None:
                where[key] = value


def _key_of(f: Any) -> Any:
    """Return the key of a function's timings; None if captured values change how long it takes."""
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
