"""Large values that a function brings along with each call, again and again."""

from __future__ import annotations

import warnings
import zlib
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from hpcdist._wire import codec, object_paths

_LARGE = 1 << 20  # bytes
_TELLS = 3  # the travel at which we warn
_LOOKS_MOST = 8  # a function whose values are others each time is left in peace

_KEPT_MOST = 256
Mark = tuple[int, int]  # the id of a value, and a checksum: it may have been changed in place


class Resending:
    """What functions have brought along with their calls from one process."""

    def __init__(self) -> None:
        self._looks: dict[Any, int] = {}  # by function: how often it was looked at
        # By function: its value, and how often that travelled.
        self._travels: dict[Any, tuple[Mark, int]] = {}

    def note(self, f: Any, payload: codec.Payload) -> None:
        """Take note of what a call brought along; warn once if it is large and the same as before.

        Args:
            f: The function that was called.
            payload: What was sent: its captured values and globals, and its arguments.
        """
        if payload.nbytes < _LARGE:
            return
        key = object_paths.identity_of(f)
        looks = self._looks[key] = self._looks.pop(key, 0) + 1
        if looks > _LOOKS_MOST:
            return
        if len(self._looks) > _KEPT_MOST:
            oldest = next(iter(self._looks))
            self._travels.pop(oldest, None)
            del self._looks[oldest]
        path = object_paths.find(object_paths.parts_of_function(f), _is_large, _is_data)
        if not path:
            return
        name, value = path[-1]
        pickled = codec.dumps(value)
        now = id(value), _checksum(pickled)
        before, times = self._travels.get(key, (now, 0))
        times = times + 1 if before == now else 1
        self._travels[key] = now, times
        if times == _TELLS:
            size = pickled.nbytes / 1e6
            warnings.warn(
                f"{name} ({size:.1f} MB) travels with every call of it, now for the {times}rd "
                "time. hpcdist.bcast() sends it once: pass its result to the calls as an argument. "
                "See docs/coming-from-julia.md",
                stacklevel=object_paths.level_of_user(),
            )


def _checksum(payload: codec.Payload) -> int:
    total = zlib.crc32(payload.body)
    for buffer in payload.buffers:
        total = zlib.crc32(buffer, total)
    return total


def _is_large(value: Any) -> bool:
    try:
        return codec.dumps(value).nbytes >= _LARGE
    except Exception:  # it cannot travel
        return False


def _is_data(value: Any) -> bool:
    return not isinstance(value, FunctionType | MethodType | partial)
