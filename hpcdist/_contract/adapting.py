"""What `adapt=`, `max_queued=` and `idle=` of a launch say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MAX_QUEUED, _IDLE = 20, 60.0
_LONGEST = 1e9  # seconds


@dataclass(frozen=True)
class Adapt:
    """How many jobs a launch may have.

    Attributes:
        lo: The fewest.
        hi: The most.
        max_queued: How many of them may wait in the queue.
        idle: After how many seconds without work a job is given back.
    """

    lo: int
    hi: int
    max_queued: int = _MAX_QUEUED
    idle: float = _IDLE


def read(given: Mapping[str, Any]) -> Adapt | None:
    """Read them; None: the launch has a fixed number of workers.

    >>> read({"adapt": (0, 8), "idle": 30})
    Adapt(lo=0, hi=8, max_queued=20, idle=30.0)
    """
    adapt, max_queued, idle = (given.get(name) for name in ("adapt", "max_queued", "idle"))
    if adapt is None:
        for name, value in (("max_queued", max_queued), ("idle", idle)):
            if value is not None:
                raise ValueError(f"{name}={value!r} is of use with adapt=(lo, hi) only")
        return None
    lo, hi = _range(adapt)
    if max_queued is None:
        max_queued = _MAX_QUEUED
    if not _is_whole(max_queued) or max_queued < 1:
        raise ValueError(f"max_queued is how many jobs may wait, 1 or more, not {max_queued!r}")
    if idle is None:
        idle = _IDLE
    if isinstance(idle, bool) or not isinstance(idle, int | float) or not 0 <= idle < _LONGEST:
        raise ValueError(
            "idle is the seconds without work after which a job is given back, 0 or more, not "
            f"{idle!r}"
        )
    return Adapt(lo, hi, max_queued, float(idle))


def _range(adapt: object) -> tuple[int, int]:
    said = "adapt=(lo, hi) says how many jobs there may be, the fewest and the most"
    if not isinstance(adapt, tuple | list) or len(adapt) != 2 or not all(map(_is_whole, adapt)):
        raise ValueError(f"{said}, as two whole numbers, not {adapt!r}")
    lo, hi = adapt
    if lo < 0 or hi < 1:
        raise ValueError(f"{said}: at least (0, 1), not {adapt!r}")
    if lo > hi:
        raise ValueError(f"{said}: {lo} is more than {hi}; did you mean ({hi}, {lo})?")
    return lo, hi


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
