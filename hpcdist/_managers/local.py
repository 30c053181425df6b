"""Workers on this machine: `addprocs(4)`."""

from __future__ import annotations

from typing import Any

from hpcdist._managers import roster
from hpcdist._managers.affinity import MODES, places
from hpcdist._managers.base import KeptManager
from hpcdist._managers.keepers import Keeper
from hpcdist._managers.launch import Launch
from hpcdist._managers.launching import find_mpi, launch_op, scrubbed
from hpcdist._managers.world import World


class LocalManager(KeptManager):
    """Starts workers on this machine, as one MPI world in which one death stays one death.

    Args:
        n: How many.
        affinity: "compact" or "balanced": each worker stays on a core of its own, near to the
            others or far from them, and sees its share of the GPUs, if there are any. Only cores
            that this process may use count; more workers than cores share them in turn.

    Example:
        >>> import hpcdist, os
        >>> with hpcdist.cluster(hpcdist.LocalManager(1, affinity="compact")) as (pid,):
        ...     len(hpcdist.remotecall_fetch(os.sched_getaffinity, pid, 0))
        1
    """

    def __init__(self, n: int, affinity: str | None = None) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"the number of workers is an int of 0 or more, not {n!r}")
        if affinity is not None and affinity not in MODES:
            known = ", ".join(map(repr, MODES))
            raise ValueError(f"affinity is one of {known} or None, not {affinity!r}")
        self.n = n
        self.affinity = affinity

    def __repr__(self) -> str:
        if self.affinity is None:
            return f"LocalManager({self.n})"
        return f"LocalManager({self.n}, affinity={self.affinity!r})"

    def start(self, launch: Launch) -> None:
        """Start the workers under a keeper."""
        settings = launch.settings
        if self.affinity is not None:
            launch.worlds[0].join["places"] = places(self.n, self.affinity)
        how: Any = "plain"
        mpi = None
        if settings.isolation != "process":
            mpi = find_mpi(settings.python)
            how = mpi.how or ("mpirun" if settings.isolation == "world" else "plain")
        start_keeper(launch.worlds[0], how, self.n, mpi)


def start_keeper(world: World, how: Any, size: int, mpi: Any, command: Any = ()) -> None:
    """Start a keeper with the ranks of one world."""
    import os

    settings = world.settings
    world.expected = size
    world.first = roster.reserve(size)
    world.save_join(how=how, size=size, mpi=how != "plain")
    if how == "mpirun" and settings.exeflags and not command:
        command = [settings.python, *settings.exeflags]
        command += ["-m", "hpcdist", "worker", "--join", world.join_file]
    op = launch_op(
        how,
        size,
        join=world.join_file,
        directory=world.folder,
        mpi=mpi,
        python=settings.python,
        command=command,
        env=world.env,
        path=world.join["path"],
        cwd=settings.dir,
    )
    if how == "mpirun" and mpi.family != "openmpi":
        op["argv"] = command  # the options above are Open MPI's
    environ = {**scrubbed(os.environ), **world.env}
    keeper = Keeper(settings.python, flags=settings.exeflags, environ=environ)
    world.command = " ".join(op["argv"]) or " ".join(map(str, keeper.process.args))  # type: ignore[arg-type]
    world.watch(keeper)
    keeper.send(op)
