"""Schedulers, and managers, that other packages bring along: the entry points `hpcdist.managers`.

They are read only where a scheduler is meant that is none of ours: reading takes longer than most
commands do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcdist._config import PLUGINS

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from hpcdist._schedulers.batch_manager import BatchManager
    from hpcdist._schedulers.scheduler import Scheduler


class Unusable(Exception):
    """A scheduler that cannot be had; the text says whose it is, and why."""

    def __init__(self, entry: EntryPoint, why: str) -> None:
        whose = f"the manager of {entry.name!r}, {entry.value}"
        if entry.dist is not None:
            whose += f" of {entry.dist.name}"
        super().__init__(f"{whose}, {why}")


def entries() -> dict[str, EntryPoint]:
    """Return what is installed, by the names of the schedulers. Nothing is imported."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=PLUGINS)}


def load(entry: EntryPoint) -> type[Scheduler] | type[BatchManager]:
    """Import a scheduler, or a manager.

    Raises:
        Unusable: It cannot be imported, or is neither, or misses what a scheduler has to have.
    """
    from hpcdist._schedulers.batch_manager import BatchManager
    from hpcdist._schedulers.scheduler import Scheduler

    try:
        found = entry.load()
    except Exception as exc:  # somebody else's code
        raise Unusable(entry, f"cannot be loaded: {type(exc).__name__}: {exc}") from exc
    if not (isinstance(found, type) and issubclass(found, Scheduler | BatchManager)):
        raise Unusable(entry, "is neither a Scheduler nor a BatchManager")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise Unusable(entry, f"is abstract: it has no {', '.join(missing)}")
    return found
