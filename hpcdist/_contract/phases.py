"""How far the start of a world has come, in the words of `LaunchError`."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """How far the start of a world has come. It only ever moves on, to one further below."""

    PREPARING = "preparing"
    WAITING = "waiting for its turn to connect"
    CONNECTING = "connecting by ssh"
    FINDING_MPI = "finding an MPI"
    STARTING_LAUNCHER = "starting the launcher"
    LAUNCHING = "launching"  # by a manager of the user's own
    OPEN = "waiting for workers to come"
    STARTING_WORKERS = "starting the workers"
    AWAITING = "waiting for the workers"
    INITIALISING_MPI = "MPI's initialisation"

    def __str__(self) -> str:
        return str(self.value)
