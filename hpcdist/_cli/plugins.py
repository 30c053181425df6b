"""Managers that other packages bring along: the entry points `hpcdist.managers`.

They are read only where a scheduler is meant that is none of ours: reading takes longer than most
commands do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from hpcdist._managers.batch.base import BatchManager

GROUP = "hpcdist.managers"


class Unusable(Exception):
    """A manager that cannot be had; the text says whose it is, and why."""


def entries() -> dict[str, EntryPoint]:
    """Return what is installed, by the names of the schedulers. Nothing is imported."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load(entry: EntryPoint) -> type[BatchManager]:
    """Import a manager.

    Raises:
        Unusable: It cannot be imported, or is none.
    """
    from hpcdist._managers.batch.base import BatchManager

    whose = f"the manager of {entry.name!r}, {entry.value}"
    if entry.dist is not None:
        whose += f" of {entry.dist.name}"
    try:
        found = entry.load()
    except Exception as exc:  # somebody else's code
        raise Unusable(f"{whose}, cannot be loaded: {type(exc).__name__}: {exc}") from exc
    if not (isinstance(found, type) and issubclass(found, BatchManager)):
        raise Unusable(f"{whose}, is no BatchManager")
    return found
