"""Types that several rooms write in their signatures."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

R = TypeVar("R")
Async = Callable[..., Coroutine[Any, Any, R]]  # an `async def`, by what it gives
Pids = int | Iterable[int] | None  # which processes: one, some, or all workers
