"""How the manager of a run is made again, in another process: what its manifest tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from hpcdist._schedulers.batch_manager import BatchManager
from hpcdist._schedulers.scheduler import Scheduler


def recipe(manager: BatchManager) -> dict[str, object]:
    """Say how a manager is made: by its own class, or of a scheduler's."""
    own = type(manager) is not BatchManager
    kind: type = type(manager) if own else type(manager.scheduler)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "ranks": manager.n}


def manager_of(facts: Mapping[str, Any]) -> BatchManager:
    """Make the manager again that a run was submitted with."""
    module, _, name = str(facts["class"]).partition(":")
    kind = getattr(import_module(module), name)
    n = int(facts["ranks"])
    if issubclass(kind, BatchManager):
        made: BatchManager = kind(n)
        return made
    scheduler: Scheduler = kind()
    return BatchManager(scheduler, n)
