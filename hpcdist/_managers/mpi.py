"""Workers that are ranks of an MPI launch, or of one that we start with `mpiexec`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hpcdist._contract.kept_managers import KeptManager, LaunchView, Plan, WorldView
from hpcdist._contract.managers import Settings
from hpcdist._managers.local import check_gpus, mpi_of, place, start_keeper
from hpcdist._managers.mpi_launch import MpiLaunch, launched_size
from hpcdist._public import public

if TYPE_CHECKING:
    from hpcdist._managers.ssh import SSHManager


@public
class MPIManager(KeptManager):
    """The other ranks of this MPI launch; or, outside of one, ranks started with `mpiexec`.

    Args:
        n: How many ranks to start; in an MPI launch the launch decides.
        hosts: Where to start them (a list of names); others than this one are reached by ssh, see
            `SSHManager` and its `isolation="world"`.
        comm: In an MPI launch: the communicator whose ranks take part.
    """

    can_renew = True
    own_params = ("gpus",)

    def __init__(
        self, n: int | None = None, hosts: list[str] | None = None, comm: Any = None
    ) -> None:
        self.n = n
        self.hosts = hosts
        self.comm = comm
        self._by_ssh: SSHManager | None = None
        if hosts:
            self._go_by_ssh(hosts)

    def _go_by_ssh(self, hosts: list[str]) -> None:
        """Have hosts other than this one reached by ssh."""
        from hpcdist._managers import ssh_machines
        from hpcdist._managers.ssh import SSHManager

        if all(machine.is_here for machine in ssh_machines.read(hosts)):
            return
        each, more = divmod(self.n or 0, len(hosts))
        shares = [each + (k < more) if self.n else "auto" for k in range(len(hosts))]
        self._by_ssh = SSHManager([(h, m) for h, m in zip(hosts, shares, strict=True) if m])
        self.on_network = self.hosts_apart = True

    @property
    def inside(self) -> bool:
        """Whether this process was started by an MPI launcher."""
        return self.comm is not None or launched_size() > 1

    def enter(self, settings: Settings | None = None) -> None:
        """Make rank 0 process 1; the others serve until it ends, and never return."""
        MpiLaunch.here().enter(self, self.comm, settings.tags if settings is not None else ())

    @contextmanager
    def block(self, settings: Settings) -> Iterator[list[int] | None]:
        """Give rank 0 the workers' pids; the others serve, and get None when it has left."""
        launch = MpiLaunch.here()
        if launch.inside_world():  # they serve already, and go on after the block
            yield sorted(launch.node.members.living)
            return
        pids = launch.enter_block(self, self.comm, settings.tags)
        try:
            yield pids
        finally:
            launch.leave_block()

    def prepare(self, settings: Settings) -> Plan:
        """Plan one world, also of the ranks of several hosts."""
        if settings.extra.get("gpus") is not None and (self._by_ssh is not None or self.inside):
            raise ValueError("gpus= is for workers that are started on this machine, and for jobs")
        check_gpus(settings)
        if self._by_ssh is not None:
            return self._by_ssh.prepare(replace(settings, isolation="world"))
        return Plan(settings, (self.n if self.n is not None else len(os.sched_getaffinity(0)),))

    def start(self, launch: LaunchView) -> None:
        """Start the ranks under a keeper, with the MPI's own launcher; elsewhere, by ssh."""
        if self._by_ssh is not None:
            self._by_ssh.start(launch)
            return
        launch.background(lambda: self.start_world(launch, launch.worlds[0]))

    def start_world(self, launch: LaunchView, world: WorldView) -> None:
        """Start one world with the MPI's own launcher."""
        if self._by_ssh is not None:
            self._by_ssh.start_world(launch, world)
            return
        n, settings = world.expected, world.settings
        assert n is not None
        place(world, n, None)
        mpi = mpi_of(world)
        rank = [*settings.python, *settings.exeflags]
        rank += ["-m", "hpcdist", "worker", "--join", world.join_file]
        if mpi.family == "openmpi":
            where = ["--host", ",".join(f"{h}:{n}" for h in self.hosts)] if self.hosts else []
            start_keeper(world, "mpirun", mpi, [*where, *rank])
            return
        where = ["-hosts", ",".join(self.hosts)] if self.hosts else []
        world.ranks_may_leave = False  # hydra ends the world when a rank leaves early
        start_keeper(world, "mpirun", mpi, [mpi.launcher, *where, "-n", str(n), *rank])
