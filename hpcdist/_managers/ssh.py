"""Workers on other hosts, by ssh: `addprocs([("ada@node1", 3), "node2:2222", ("node3", "auto")])`.

Each host is a world of its own: one ssh, a keeper at its other end, and ranks that dial process 1.
With `isolation="world"` all hosts are one world, see `ssh_world`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._errors import LaunchError
from hpcdist._managers import roster
from hpcdist._managers.base import KeptManager, Settings
from hpcdist._managers.keepers import checkout
from hpcdist._managers.launch import Launch
from hpcdist._managers.launching import Mpi, launch_op
from hpcdist._managers.ssh_link import Options, SSHConnection, command, keeper_command
from hpcdist._managers.ssh_machines import Machine, read
from hpcdist._managers.world import World
from hpcdist._runtime.node import node
from hpcdist._transport.network import Address
from hpcdist._wire import greeting

_MAX_PARALLEL = 10


class SSHManager(KeptManager):
    """Starts workers on other hosts by the system's `ssh`, as the user's configuration says.

    Args:
        machines: A list of `"[user@]host[:port] [bind_addr]"`, and of pairs of such a text and a
            number of workers, or "auto": as many as the cores they may use there.

    Keywords of `addprocs`, beside the common ones: `ssh="ssh"`, `ssh_flags` (Julia's `sshflags`),
    `tunnel=False`, `max_parallel=10`, `interface`.

    Example:
        >>> import hpcdist
        >>> hpcdist.SSHManager([("ada@node1", 3), "node2:2222", ("node3", "auto")])
        SSHManager(3*ada@node1, 1*node2 port 2222, auto*node3)
    """

    own_params = ("ssh", "ssh_flags", "sshflags", "tunnel", "max_parallel", "interface")
    on_network = True
    hosts_apart = True

    def __init__(self, machines: Sequence[Any]) -> None:
        if isinstance(machines, str):
            raise TypeError(f"machines are a list: [{machines!r}]")
        self.machines = read(machines)
        if not self.machines:
            raise ValueError("no machine is named")

    def __repr__(self) -> str:
        named = (f"{machine.count or 'auto'}*{machine}" for machine in self.machines)
        return f"SSHManager({', '.join(named)})"

    def prepare(self, settings: Settings) -> None:
        """Refuse what is wrong with the options, before anything is made."""
        _options(settings)
        limit = settings.extra.get("max_parallel", _MAX_PARALLEL)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_parallel is an int of 1 or more, not {limit!r}")
        if settings.extra.get("tunnel") and self._is_one_world(settings):
            raise ValueError(
                "isolation='world' over several hosts and tunnel=True exclude each other: MPI goes "
                "from host to host, not over ssh"
            )

    def _is_one_world(self, settings: Settings) -> bool:
        return settings.isolation == "world" and len(self.machines) > 1

    def sizes(self, settings: Settings) -> Sequence[int | None]:
        """Return how many workers each world is to have."""
        counts = [machine.count for machine in self.machines]
        if not self._is_one_world(settings):
            return counts
        known = [count for count in counts if count is not None]
        return [sum(known) if len(known) == len(counts) else None]

    def interface(self, settings: Settings) -> str | None:
        """Return by which interface of this host others are to reach it; None: by any."""
        name: str | None = settings.extra.get("interface")
        return name

    def start(self, launch: Launch) -> None:
        """Connect to all hosts, in the background, so many at a time."""
        limit = launch.settings.extra.get("max_parallel", _MAX_PARALLEL)
        if self._is_one_world(launch.settings):
            from hpcdist._managers.ssh_world import OneWorld

            (world,) = launch.worlds
            OneWorld(world, [Host(world, machine) for machine in self.machines], limit).begin()
            return
        hosts = [
            Host(world, machine)
            for world, machine in zip(launch.worlds, self.machines, strict=True)
        ]
        for host in hosts:
            host.world.label = str(host.machine)
            host.world.phase = "waiting for its turn to connect"
        side_by_side([host.bring_up for host in hosts], limit)


def side_by_side(tasks: Sequence[Callable[[], None]], limit: int) -> None:
    """Do all of something in the background, so many at a time."""
    waiting = deque(tasks)

    def do_some() -> None:
        while waiting:
            try:
                task = waiting.popleft()
            except IndexError:  # another thread was quicker
                return
            task()

    for _ in range(min(limit, len(waiting))):
        node.turns.background(do_some)


class Host:
    """One host of a launch, until its world is on its way."""

    def __init__(self, world: World, machine: Machine) -> None:
        self.world = world
        self.machine = machine
        self._settings = world.settings
        self._options = _options(world.settings)

    def bring_up(self) -> None:
        """Connect, and have the keeper over there start the ranks. Never raises."""
        world = self.world
        try:
            if not world.closed:
                self._start_own_world()
        except Exception as exc:  # the edge of a thread: whoever waits has to hear of it
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
                drop(connection)

    def connect(self) -> SSHConnection:
        """Start an ssh to this host."""
        world, settings = self.world, self._settings
        world.phase = "connecting by ssh"
        remote = keeper_command(settings.python, settings.exeflags, checkout(), settings.allocator)
        argv = command(self.machine, self._options, remote, self._door())
        world.command = shlex.join(argv[:-1])
        try:
            return SSHConnection(self.machine, self._options, argv)
        except OSError as exc:
            fix = "install an ssh client here, or name one by ssh="
            raise self.error(f"{argv[0]} cannot be run: {exc.strerror}", fix) from exc

    def meet(self, connection: SSHConnection) -> dict[str, Any]:
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

    def _launch(self, connection: SSHConnection, hello: dict[str, Any]) -> None:
        world = self.world
        size = self.count(hello)
        if world.expected is None:
            world.expected, world.first = size, roster.reserve(size)
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

    def count(self, hello: dict[str, Any]) -> int:
        """Return how many workers this host is to have."""
        return self.machine.count or int(hello["cores"])

    def op(self, hello: dict[str, Any], how: Any, size: int, mpi: Mpi | None) -> dict[str, Any]:
        """Write what its keeper is to do; the world's join file is as for its other hosts."""
        world, settings = self.world, self._settings
        folder, path = hello["folder"], _own_path(world.join["path"])
        ours = [hello["executable"], *settings.exeflags, "-m", "hpcdist", "worker", "--join"]
        op = launch_op(
            how,
            size,
            join=f"{folder}/join",
            directory=folder,
            mpi=mpi,
            command=[*ours, f"{folder}/join"] if how == "mpirun" else (),
            env=world.env,
            path=path,
            cwd=settings.dir,
        )
        told = {"path": path, "interface": self.machine.bind}
        # The driver's own folder is a default, which another host need not have.
        return op | {"told": world.join | told, "home_will_do": settings.dir == os.getcwd()}

    def _check(self, hello: dict[str, Any]) -> None:
        """Refuse an interpreter whose functions, or whose hpcdist, are not ours."""
        ours = greeting.about()
        for what, theirs, mine in (
            ("Python", _minor(hello["python"]), _minor(ours["python"])),
            ("hpcdist", hello["hpcdist"], ours["hpcdist"]),
        ):
            if theirs != mine:
                raise self.error(
                    f"{hello['executable']} has {what} {theirs}, this process has {mine}",
                    "choose its interpreter with python=",
                )

    def _how(self, hello: dict[str, Any]) -> tuple[Any, Mpi | None]:
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
            f"{self.machine}: {text}", phase=world.phase, command=world.command, fix=fix
        )


def drop(connection: SSHConnection) -> None:
    """End a connection that nobody needs."""
    connection.kill()
    connection.wait()
    connection.close()


def _options(settings: Settings) -> Options:
    extra = settings.extra
    if "ssh_flags" in extra and "sshflags" in extra:
        raise ValueError("ssh_flags= and sshflags= are one option: give one of them")
    flags = extra.get("ssh_flags", extra.get("sshflags"))
    program = _words(extra.get("ssh") or "ssh")
    tunnel = extra.get("tunnel", False)
    if not isinstance(tunnel, bool):
        raise ValueError(f"tunnel is True or False, not {tunnel!r}")
    return Options(program, _words(flags or ()), tunnel, settings.timeout)


def _words(given: Any) -> tuple[str, ...]:
    return tuple(shlex.split(given) if isinstance(given, str) else map(str, given))


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _own_path(entries: Sequence[str]) -> list[str]:
    """Return the user's part of sys.path: the interpreter over there has the rest of its own."""
    installed = [
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ]
    libraries = (*installed, os.path.join(sys.base_prefix, "lib", "python"))
    own = [entry for entry in entries if not entry.startswith(libraries)]
    return list(dict.fromkeys([*own, *filter(None, [checkout()])]))
