"""Workers on other hosts, by ssh: `addprocs([("ada@node1", 3), "node2:2222", ("node3", "auto")])`.

Each host is a world of its own: one ssh, a keeper at its other end, and ranks that dial process 1.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import sysconfig
from collections import deque
from collections.abc import Sequence
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

    def sizes(self, settings: Settings) -> Sequence[int | None]:
        """Return how many workers each host is to have."""
        return [machine.count for machine in self.machines]

    def interface(self, settings: Settings) -> str | None:
        """Return by which interface of this host others are to reach it; None: by any."""
        name: str | None = settings.extra.get("interface")
        return name

    def start(self, launch: Launch) -> None:
        """Connect to all hosts, in the background, so many at a time."""
        waiting = deque(
            _Host(world, machine)
            for world, machine in zip(launch.worlds, self.machines, strict=True)
        )

        def connect_some() -> None:
            while waiting:
                try:
                    host = waiting.popleft()
                except IndexError:  # another thread was quicker
                    return
                host.bring_up()

        limit = launch.settings.extra.get("max_parallel", _MAX_PARALLEL)
        for _ in range(min(limit, len(waiting))):
            node.turns.background(connect_some)


class _Host:
    """One host of a launch, until its world is on its way."""

    def __init__(self, world: World, machine: Machine) -> None:
        self._world = world
        self._machine = machine
        self._settings = world.settings
        self._options = _options(world.settings)
        world.label = str(machine)
        world.phase = "waiting for its turn to connect"

    def bring_up(self) -> None:
        """Connect, and have the keeper over there start the ranks. Never raises."""
        world = self._world
        try:
            if not world.closed:
                self._connect()
        except Exception as exc:  # the edge of a thread: whoever waits has to hear of it
            world.launch.fail(exc, world=world)

    def _connect(self) -> None:
        world, settings = self._world, self._settings
        world.phase = "connecting by ssh"
        remote = keeper_command(settings.python, settings.exeflags, checkout())
        argv = command(self._machine, self._options, remote, self._door())
        world.command = shlex.join(argv[:-1])
        try:
            connection = SSHConnection(self._machine, self._options, argv)
        except OSError as exc:
            fix = "install an ssh client here, or name one by ssh="
            raise self._error(f"{argv[0]} cannot be run: {exc.strerror}", fix) from exc
        world.set_clock()
        on_its_way = False
        try:
            if world.take(connection):
                self._launch(connection, connection.meet())
                on_its_way = True
        finally:
            if not on_its_way:
                world.keeper = None
                connection.kill()
                connection.wait()
                connection.close()

    def _door(self) -> Address | None:
        """Return where a port over there is to lead; None if there is to be none."""
        if not self._options.tunnel:
            return None
        first: Address = self._world.join["addresses"][0]
        return first

    def _launch(self, connection: SSHConnection, hello: dict[str, Any]) -> None:
        world, settings = self._world, self._settings
        self._check(hello)
        size = self._machine.count or int(hello["cores"])
        if world.expected is None:
            world.expected, world.first = size, roster.reserve(size)
        how, mpi = self._how(hello)
        folder = hello["folder"]
        told: dict[str, Any] = {"how": how, "size": size, "mpi": how != "plain", "dir": folder}
        told |= {"path": _own_path(world.join["path"]), "interface": self._machine.bind}
        if connection.port is not None:
            told["addresses"] = [("127.0.0.1", connection.port)]
        world.save_join(**told)
        ours = [hello["executable"], *settings.exeflags, "-m", "hpcdist", "worker", "--join"]
        op = launch_op(
            how,
            size,
            join=f"{folder}/join",
            directory=folder,
            mpi=mpi,
            command=[*ours, f"{folder}/join"] if how == "mpirun" else (),
            env=world.env,
            path=world.join["path"],
            cwd=settings.dir,
        )
        # The driver's own folder is a default, which another host need not have.
        op |= {"told": world.join, "home_will_do": settings.dir == os.getcwd()}
        connection.follow()
        world.watch(connection)
        with contextlib.suppress(OSError):  # its end tells
            connection.send(op)

    def _check(self, hello: dict[str, Any]) -> None:
        """Refuse an interpreter whose functions, or whose hpcdist, are not ours."""
        ours = greeting.about()
        for what, theirs, mine in (
            ("Python", _minor(hello["python"]), _minor(ours["python"])),
            ("hpcdist", hello["hpcdist"], ours["hpcdist"]),
        ):
            if theirs != mine:
                raise self._error(
                    f"{hello['executable']} has {what} {theirs}, this process has {mine}",
                    "choose its interpreter with python=",
                )

    def _how(self, hello: dict[str, Any]) -> tuple[Any, Mpi | None]:
        if self._settings.isolation == "process":
            return "plain", None
        if "mpi" not in hello:
            raise self._error(hello["no_mpi"], "isolation='process' needs no MPI")
        family, version, mpiexec = hello["mpi"]
        mpi = Mpi(family, tuple(version), mpiexec)
        return mpi.how or ("mpirun" if self._settings.isolation == "world" else "plain"), mpi

    def _error(self, text: str, fix: str) -> LaunchError:
        world = self._world
        return LaunchError(
            f"{world.label}: {text}", phase=world.phase, command=world.command, fix=fix
        )


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
