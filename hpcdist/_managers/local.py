"""Workers on this machine: `addprocs(4)`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from hpcdist import _log
from hpcdist._contract.kept_managers import KeptManager, LaunchView, Plan, WorldView
from hpcdist._contract.managers import Settings
from hpcdist._contract.phases import Phase
from hpcdist._keeper import folders
from hpcdist._keeper.installed_mpi import How, Mpi, find_mpi, launch_op, scrubbed
from hpcdist._keeper.keeper_link import KeeperLink
from hpcdist._public import public
from hpcdist._worker import MODULE
from hpcdist._worker.affinity import MODES, places

_MANY = 16  # workers a core; with more, a word about it


@public
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

    can_renew = True
    own_params = ("gpus",)

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

    def prepare(self, settings: Settings) -> Plan:
        """Plan one world."""
        check_gpus(settings)
        return Plan(settings, (self.n,))

    def start(self, launch: LaunchView) -> None:
        """Start the workers under a keeper."""
        cores = len(os.sched_getaffinity(0))
        if self.n > _MANY * cores:
            text = f"starting {self.n} workers on {cores} cores takes a while; Ctrl-C ends it"
            _log.log("warning", text)
        launch.background(lambda: self.start_world(launch, launch.worlds[0]))

    def start_world(self, launch: LaunchView, world: WorldView) -> None:
        """Start one world, as `isolation` says."""
        settings = world.settings
        place(world, self.n, self.affinity)
        how: How = "plain"
        mpi = None
        if settings.isolation != "process":
            mpi = mpi_of(world)
            how = mpi.how or ("mpirun" if settings.isolation == "world" else "plain")
        start_keeper(world, how, mpi)


def place(world: WorldView, n: int, affinity: str | None) -> None:
    """Tell the workers of one world where to run, and which GPUs they see, if that matters."""
    if affinity is None and not world.settings.extra.get("gpus"):
        return
    of_all = places(n, affinity)
    world.join["places"] = [of_all[seat] for seat in world.seats]


def check_gpus(settings: Settings) -> None:
    """Refuse what `gpus=` cannot be."""
    given = settings.extra.get("gpus")
    if given not in (None, "auto"):
        raise ValueError(f"gpus= is 'auto' or None, not {given!r}")


def mpi_of(world: WorldView) -> Mpi:
    """Find the MPI that the interpreter of a world's workers loads. May take a while."""
    world.reach(Phase.FINDING_MPI)
    found = find_mpi(world.settings.python)
    world.reach(Phase.STARTING_LAUNCHER)
    return found


def start_keeper(world: WorldView, how: How, mpi: Mpi | None, command: Sequence[str] = ()) -> None:
    """Start a keeper with the ranks of one world, unless the launch has been cancelled."""
    settings, size = world.settings, world.expected
    assert size is not None
    world.save_join(how=how, size=size, mpi=how != "plain")
    if how == "mpirun" and settings.exeflags and not command:
        command = [*settings.python, *settings.exeflags]
        command += ["-m", "hpcdist", "worker", "--join", world.join_file]
    op = launch_op(
        how,
        size,
        join=world.join_file,
        directory=world.folder,
        worker=MODULE,
        mpi=mpi,
        python=settings.python,
        command=command,
        env={**(mpi.on_host if mpi is not None else {}), **world.env},
        path=world.join["path"],
        cwd=settings.dir,
    )
    if how == "mpirun" and mpi is not None and mpi.family != "openmpi":
        op["argv"] = command  # the options above are Open MPI's
    environ = {**scrubbed(os.environ), **world.env}
    # A launcher is started by our own interpreter: the command is for the ranks, and it may well be
    # that of a container, in which there is no launcher.
    python = settings.python if how != "mpirun" else settings.keeper
    keeper = KeeperLink(python, flags=settings.exeflags, environ=environ)
    world.command = " ".join(op["argv"]) or " ".join(map(str, keeper.process.args))  # type: ignore[arg-type]
    if not world.take(keeper):
        keeper.drop()
        folders.remove(world.folder)  # it may have been filled again
        return
    world.watch(keeper)
    with contextlib.suppress(OSError):  # its end tells
        keeper.send(op)
