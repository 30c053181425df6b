"""How a map is to be run."""

from __future__ import annotations

from typing import NamedTuple


class Terms(NamedTuple):
    """How a map is to be run."""

    unit: int | None = None  # how many items belong together; None: as many as fit
    rerun: bool = True  # whether what a worker ran when it died is run again
    copy: bool = False  # whether arguments may be changed by their owner meanwhile
    in_order: bool = False  # whether items before one that failed are still run: they are wanted
    seed: int = 0  # of the items' random numbers
    patient: bool = False  # whether to wait for workers in the place of all that have died
    duration: float | None = None  # what an item takes, in seconds, if the user says so
    tag: str = ""  # that these have; "": any worker will do
    early: bool = False  # whether results are wanted while the rest of their batch takes long
