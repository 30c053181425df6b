"""The cells: what happens, when, and to which kind of workers."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

# The first six are also tried in jobs. What stands behind each is in `victim` and `stage`.
CAUSES = (
    "SIGKILL",
    "SIGSEGV",
    "SIGTERM",
    "os._exit",
    "memory",
    "MPI_Abort",
    "SIGSTOP",
    "import",
    "keeper",
    "disk",
)
IN_JOBS = CAUSES[:6]
# The victim ends, by its own doing or by a signal, and nobody has to remove it.
DEADLY = frozenset({"SIGKILL", "SIGSEGV", "SIGTERM", "os._exit", "MPI_Abort", "keeper"})
# The victim lives, and what it was doing fails with an error of this kind.
ERRORS: dict[str, type[Exception]] = {"memory": MemoryError, "import": ImportError, "disk": OSError}

MOMENTS = (
    "idle",
    "receiving",
    "unpickling",
    "python",
    "c",
    "pickling",
    "sending",
    "channel",
    "bcast",
    "scatter",
    "gather",
    "reduce",
    "spmd",
    "greeting",
    "launching",
    "rmprocs",
    "called",
)
AT_START = ("launching", "greeting")

WAYS = ("mpi", "process", "slurm")


@dataclass(frozen=True)
class Cell:
    """One cause at one moment, among one kind of workers."""

    way: str
    cause: str
    moment: str

    def __str__(self) -> str:
        return f"{self.way}/{self.cause}/{self.moment}"

    @classmethod
    def named(cls, name: str) -> "Cell":
        """Read what `str` has written."""
        return cls(*name.split("/"))


def _exists(cell: Cell) -> bool:
    """Tell whether there is such a thing."""
    if cell.way == "slurm":
        return cell.cause in IN_JOBS
    if cell.way == "process":  # workers that have MPI only once a function has imported it
        return cell.moment != "spmd" and (cell.cause != "MPI_Abort" or cell.moment not in AT_START)
    return True


def cells(ways: Sequence[str]) -> list[Cell]:
    """Return all cells of these ways."""
    every = itertools.product(ways, MOMENTS, CAUSES)
    made = [Cell(way, cause, moment) for way, moment, cause in every]
    return [cell for cell in made if _exists(cell)]


def drawn(all_cells: Sequence[Cell], count: int, date: str) -> list[Cell]:
    """Draw cells by a date: the same on a day, others on the next."""
    return random.Random(date).sample(list(all_cells), min(count, len(all_cells)))
