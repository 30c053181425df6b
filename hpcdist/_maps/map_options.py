"""The keywords of maps, for type checkers: so that overloads need not repeat them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any, TypedDict

from hpcdist._maps.pools import AbstractWorkerPool


class MapOptions(TypedDict, total=False):
    """What `pmap`, `imap` and `imap_unordered` take by keyword: see `pmap`."""

    pool: AbstractWorkerPool | str | None
    distributed: bool
    batch_size: int | str
    on_error: Callable[[Exception], object] | None
    retry_delays: Iterable[float]
    retry_check: Callable[[BaseException], object] | None
    on_exit: str
    progress: bool
    seed: int | None
    checkpoint: str | PathLike[str] | None
    key: Callable[[Any], object] | None
    duration: float | None
    ranks: int | None
