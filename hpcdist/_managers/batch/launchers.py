"""What starts a world inside a job: the scheduler's own launcher, or the MPI's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpcdist._managers.launching import OPENMPI_ENV, OPENMPI_OPTIONS, Mpi


@dataclass(frozen=True)
class WorldLauncher:
    """What starts a world inside a job.

    Attributes:
        argv: The command, up to what it shall start.
        how: "srun" or "mpirun".
        env: Variables it needs.
        mpi: Whether its ranks are one MPI world.
        apart: Whether ranks may leave one by one, and one death is no other's.
        end: What kills all ranks at once, where the launcher cannot; `{step}` stands for the
            scheduler's name of what it has started.
        kill: What sends a rank on another host a signal: `{host}`, `{pid}`, `{signal}`.
    """

    argv: tuple[str, ...]
    how: str
    env: Mapping[str, str] = field(default_factory=dict)
    mpi: bool = True
    apart: bool = True
    end: tuple[str, ...] = ()
    kill: tuple[str, ...] = ()


def mpiexec(n: int, mpi: Mpi, *, watched: bool) -> WorldLauncher:
    """Take the MPI's own launcher, which finds the job's hosts by itself.

    Args:
        watched: Whether a keeper reads which rank said what, and how each ended.
    """
    if mpi.family != "openmpi":
        return WorldLauncher((mpi.mpiexec, "-n", str(n)), "mpirun", apart=False)
    many: tuple[str, ...] = OPENMPI_OPTIONS
    if mpi.version < (5,):
        many = ("--oversubscribe",)
    else:
        # --leave-session-attached: else the daemons of other hosts do not tell how a rank ended.
        told = ("--output", "tag", "--leave-session-attached")
        many = (*many, *told) if watched else many[: many.index("--prtemca")]
    argv = (mpi.mpiexec, *many, "-n", str(n))
    return WorldLauncher(argv, "mpirun", OPENMPI_ENV, apart=mpi.version >= (5,))
