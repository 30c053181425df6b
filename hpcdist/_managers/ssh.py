"""Workers on other hosts, by ssh: `addprocs([("ada@node1", 3), "node2:2222", ("node3", "auto")])`.

Each host is a world of its own: one ssh, a keeper at its other end, and ranks that dial process 1.
With `isolation="world"` all hosts are one world, see `ssh_world`.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpcdist._contract.kept_managers import KeptManager, LaunchView, Plan, WorldView
from hpcdist._contract.managers import Settings
from hpcdist._contract.phases import Phase
from hpcdist._managers.ssh_host import Host, options_of, side_by_side
from hpcdist._managers.ssh_machines import read
from hpcdist._managers.ssh_world import OneWorld
from hpcdist._public import public

_MAX_PARALLEL = 10


@public
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
    can_renew = True

    def __init__(self, machines: Sequence[object]) -> None:
        if isinstance(machines, str):
            raise TypeError(f"machines are a list: [{machines!r}]")
        self.machines = read(machines)
        if not self.machines:
            raise ValueError("no machine is named")

    def __repr__(self) -> str:
        named = (f"{machine.count or 'auto'}*{machine}" for machine in self.machines)
        return f"SSHManager({', '.join(named)})"

    def prepare(self, settings: Settings) -> Plan:
        """Refuse what is wrong with the options, before anything is made; plan the worlds."""
        options_of(settings)
        limit = settings.extra.get("max_parallel", _MAX_PARALLEL)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_parallel is an int of 1 or more, not {limit!r}")
        if settings.extra.get("tunnel") and self._is_one_world(settings):
            raise ValueError(
                "isolation='world' over several hosts and tunnel=True exclude each other: MPI goes "
                "from host to host, not over ssh"
            )
        return Plan(settings, self._sizes(settings), settings.extra.get("interface"))

    def _is_one_world(self, settings: Settings) -> bool:
        return settings.isolation == "world" and len(self.machines) > 1

    def _sizes(self, settings: Settings) -> tuple[int | None, ...]:
        counts = tuple(machine.count for machine in self.machines)
        if not self._is_one_world(settings):
            return counts
        known = [count for count in counts if count is not None]
        return (sum(known) if len(known) == len(counts) else None,)

    def start(self, launch: LaunchView) -> None:
        """Connect to all hosts, in the background, so many at a time."""
        limit = launch.settings.extra.get("max_parallel", _MAX_PARALLEL)
        if self._is_one_world(launch.settings):
            (world,) = launch.worlds
            OneWorld(world, [Host(world, machine) for machine in self.machines], limit).begin()
            return
        for world, machine in zip(launch.worlds, self.machines, strict=True):
            world.label = str(machine)
        hosts = [self._host(world) for world in launch.worlds]
        for host in hosts:
            host.world.reach(Phase.WAITING)
        side_by_side(launch, [host.bring_up for host in hosts], limit)

    def start_world(self, launch: LaunchView, world: WorldView) -> None:
        """Start workers on one host, or on all, in the place of those that were lost."""
        if self._is_one_world(launch.settings):
            limit = launch.settings.extra.get("max_parallel", _MAX_PARALLEL)
            OneWorld(world, [Host(world, machine) for machine in self.machines], limit).begin()
        else:
            self._host(world).bring_up()

    def _host(self, world: WorldView) -> Host:
        machine = next(machine for machine in self.machines if str(machine) == world.label)
        return Host(world, machine)
