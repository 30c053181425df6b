"""One host of an ssh launch: connect to it, meet the keeper over there, have it start the ranks."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._cluster.roster import Roster
from hpcdist._contract.kept_managers import LaunchView, WorldView
from hpcdist._contract.managers import Settings
from hpcdist._contract.phases import Phase
from hpcdist._errors import LaunchError
from hpcdist._keeper.installed_mpi import How, Mpi, launch_op
from hpcdist._keeper.keeper_link import checkout
from hpcdist._keeper.processes import Op
from hpcdist._managers.ssh_link import (
    Options,
    SSHConnection,
    command,
    keeper_command,
    own_path,
    unlike,
    words,
)
from hpcdist._managers.ssh_machines import Machine
from hpcdist._transport.network import Address
from hpcdist._wire.greeting import Hello
from hpcdist._worker import MODULE


def side_by_side(launch: LaunchView, tasks: Sequence[Callable[[], None]], limit: int) -> None:
    """Do all of something for a launch in the background, so many at a time."""
    waiting = deque(tasks)

    def do_some() -> None:
        while waiting:
            try:
                task = waiting.popleft()
            except IndexError:  # another thread was quicker
                return
            task()

    for _ in range(min(limit, len(waiting))):
        launch.background(do_some)


class Host:
    """One host of a launch, until its world is on its way."""

    def __init__(self, world: WorldView, machine: Machine) -> None:
        self.world = world
        self.machine = machine
        self._settings = world.settings
        self._options = options_of(world.settings)

    def bring_up(self) -> None:
        """Connect, and have the keeper over there start the ranks. Never raises."""
        world = self.world
        try:
            if not world.closed:
                self._start_own_world()
        except Exception as exc:  # the edge of a thread: the waiters get it
            world.launch.fail(exc, world=world)

    def _start_own_world(self) -> None:
        world = self.world
        connection = self.connect()
        world.set_clock()
        on_its_way = False
        try:
            if world.take(connection):
                self._launch(connection, self.meet(connection))
                on_its_way = True
        finally:
            if not on_its_way:
                world.keeper = None
                connection.drop()

    def connect(self) -> SSHConnection:
        """Start an ssh to this host."""
        world, settings = self.world, self._settings
        world.reach(Phase.CONNECTING)
        remote = keeper_command(settings.python, settings.exeflags, checkout(), settings.allocator)
        argv = command(self.machine, self._options, remote, self._door())
        world.command = shlex.join(argv[:-1])
        try:
            return SSHConnection(world.launch.node, self.machine, self._options, argv)
        except OSError as exc:
            fix = "install an ssh client here, or name one by ssh="
            raise self.error(f"{argv[0]} cannot be run: {exc.strerror}", fix) from exc

    def meet(self, connection: SSHConnection) -> Hello:
        """Wait for the keeper over there, and return what it says of the host.

        Raises:
            LaunchError: There will be none, or its interpreter is not like ours.
        """
        hello = connection.meet()
        self._check(hello)
        return hello

    def _door(self) -> Address | None:
        """Return where a port over there is to lead; None if there is to be none."""
        if not self._options.tunnel:
            return None
        first: Address = self.world.join["addresses"][0]
        return first

    def _launch(self, connection: SSHConnection, hello: Hello) -> None:
        world = self.world
        size = self.count(hello)
        if world.expected is None:
            world.expected, world.first = size, world.launch.node.service(Roster).reserve(size)
        how, mpi = self._how(hello)
        told: dict[str, Any] = {"how": how, "size": size, "mpi": how != "plain"}
        if connection.port is not None:
            told["addresses"] = [("127.0.0.1", connection.port)]
        world.save_join(**told, dir=hello["folder"])
        op = self.op(hello, how, size, mpi)
        connection.follow()
        world.watch(connection)
        with contextlib.suppress(OSError):  # its end tells
            connection.send(op)

    def count(self, hello: Hello) -> int:
        """Return how many workers this host is to have."""
        return self.machine.count or int(hello["cores"])

    def op(self, hello: Hello, how: How, size: int, mpi: Mpi | None) -> Op:
        """Write what its keeper is to do; the world's join file is as for its other hosts."""
        world, settings = self.world, self._settings
        folder, path = hello["folder"], own_path(world.join["path"])
        ours = [hello["executable"], *settings.exeflags, "-m", "hpcdist", "worker", "--join"]
        op = launch_op(
            how,
            size,
            join=f"{folder}/join",
            directory=folder,
            worker=MODULE,
            mpi=mpi,
            command=[*ours, f"{folder}/join"] if how == "mpirun" else (),
            env=world.env,
            path=path,
            cwd=settings.dir,
        )
        told = {"path": path, "interface": self.machine.bind}
        # The driver's own folder is a default, which another host need not have.
        return op | {"told": world.join | told, "home_will_do": settings.dir == os.getcwd()}

    def _check(self, hello: Hello) -> None:
        """Refuse an interpreter whose functions, or whose hpcdist, are not ours."""
        if wrong := unlike(hello):
            raise self.error(wrong, "choose its interpreter with python=")

    def _how(self, hello: Hello) -> tuple[How, Mpi | None]:
        if self._settings.isolation == "process":
            return "plain", None
        if "mpi" not in hello:
            raise self.error(hello["no_mpi"], "isolation='process' needs no MPI")
        family, version, mpiexec = hello["mpi"]
        mpi = Mpi(family, tuple(version), mpiexec)
        return mpi.how or ("mpirun" if self._settings.isolation == "world" else "plain"), mpi

    def error(self, text: str, fix: str) -> LaunchError:
        world = self.world
        return LaunchError(
            f"{self.machine}: {text}", phase=str(world.phase), command=world.command, fix=fix
        )


def options_of(settings: Settings) -> Options:
    extra = settings.extra
    if "ssh_flags" in extra and "sshflags" in extra:
        raise ValueError("ssh_flags= and sshflags= are one option: give one of them")
    flags = extra.get("ssh_flags", extra.get("sshflags"))
    program = words(extra.get("ssh") or "ssh")
    tunnel = extra.get("tunnel", False)
    if not isinstance(tunnel, bool):
        raise ValueError(f"tunnel is True or False, not {tunnel!r}")
    return Options(program, words(flags or ()), tunnel, settings.timeout)
