"""One MPI world over several hosts, by ssh: the keepers of its hosts, taken for one.

MPICH's family starts a world by PMI. Each keeper serves it to the ranks of its own host; what they
publish passes from host to host through process 1, whenever all of them wait at a barrier. So it
takes no launcher that could end the others when one dies, and no way by ssh from host to host: only
MPI's own connections go there.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import threading
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist._cluster.roster import Roster
from hpcdist._contract.kept_managers import WorldView
from hpcdist._contract.phases import Phase
from hpcdist._errors import LaunchError
from hpcdist._keeper.keeper_link import RemoteKeeper
from hpcdist._keeper.processes import Op
from hpcdist._managers.ssh_host import Host, side_by_side
from hpcdist._managers.ssh_link import SSHConnection
from hpcdist._runtime.node import Node

_MPICH = ("mpich", "intel")
_LEAVING = 10.0  # seconds for an ssh that is of no more use


class OneWorld:
    """A world of several hosts, until it is on its way.

    Args:
        world: The world.
        hosts: Its hosts, in the order of the ranks.
        limit: How many are connected to at a time.
    """

    def __init__(self, world: WorldView, hosts: Sequence[Host], limit: int) -> None:
        self._world = world
        self._hosts = hosts
        self._limit = limit
        self._keepers = HostKeepers(world.launch.node)
        self._lock = threading.Lock()  # guards the two below
        self._met: dict[int, tuple[SSHConnection, dict[str, Any]]] = {}
        self._missing = len(hosts)

    def begin(self) -> None:
        """Connect to all hosts; when the last one has answered, start the ranks."""
        self._world.label = ", ".join(str(host.machine) for host in self._hosts)
        self._world.take(self._keepers)
        self._world.set_clock()
        tasks = [self._task(number) for number in range(len(self._hosts))]
        side_by_side(self._world.launch, tasks, self._limit)

    def _task(self, number: int) -> Callable[[], None]:
        return lambda: self._bring_up(number)

    def _bring_up(self, number: int) -> None:
        world, host = self._world, self._hosts[number]
        try:
            if not world.closed:
                connection = host.connect()
                self._keepers.add(connection)
                self._met[number] = connection, host.meet(connection)
        except Exception as exc:  # the edge of a thread: the waiters get it
            world.launch.fail(exc, world=world)
        with self._lock:
            self._missing -= 1
            last = not self._missing
        if last:
            self._start_or_drop()

    def _start_or_drop(self) -> None:
        world = self._world
        try:
            if len(self._met) == len(self._hosts) and not world.closed:
                self._start()
        except Exception as exc:  # as above
            world.launch.fail(exc, world=world)
        if not world.has_keeper:
            world.keeper = None
            self._keepers.drop()

    def _start(self) -> None:
        world = self._world
        answers = [self._met[number] for number in range(len(self._hosts))]
        self._check([hello for _, hello in answers])
        counts = [h.count(hello) for h, (_, hello) in zip(self._hosts, answers, strict=True)]
        size = sum(counts)
        if world.expected is None:
            world.expected, world.first = size, world.launch.node.service(Roster).reserve(size)
        world.reach(Phase.STARTING_WORKERS)
        # Its hosts have no folder in common: `dir` is what only they know.
        world.save_join(how="pmi", size=size, mpi=True, dir="")
        name = f"kvs_{secrets.token_hex(8)}"
        network = answers[0][1]["network"]  # one for all, or they would not meet
        ops = []
        for number, (host, (_, hello)) in enumerate(zip(self._hosts, answers, strict=True)):
            op = host.op(hello, "pmi", size, None)
            ops.append(op | {"share": [name, counts, number], "env": network | op["env"]})
        for connection, _ in answers:
            connection.follow()
        self._keepers.share_out([connection for connection, _ in answers], counts)
        world.watch(self._keepers)
        for (connection, _), op in zip(answers, ops, strict=True):
            with contextlib.suppress(OSError):  # its end tells
                connection.send(op)
        if world.closed:  # meanwhile: it did not reach them
            self._keepers.send({"op": "end", "grace": 0.0})

    def _check(self, hellos: Sequence[dict[str, Any]]) -> None:
        """Refuse hosts whose MPIs cannot be one world."""
        first: Any = None
        for host, hello in zip(self._hosts, hellos, strict=True):
            if "mpi" not in hello:
                raise host.error(hello["no_mpi"], "isolation='process' needs no MPI")
            family, version, _ = hello["mpi"]
            if family not in _MPICH:
                raise LaunchError(
                    f"{host.machine} has Open MPI, whose worlds span hosts only by a launcher of "
                    "its own",
                    phase=str(self._world.phase),
                    fix="isolation='auto' makes a world of each host, with links between; "
                    "with MPICH one world is possible",
                )
            first = first or (host, family, version)
            if first[1:] != (family, version):
                raise LaunchError(
                    f"{first[0].machine} and {host.machine} have different MPIs: "
                    f"{_name(*first[1:])} and {_name(family, version)}",
                    phase=str(self._world.phase),
                    fix="choose an interpreter that all hosts have by python=",
                )


def _name(family: str, version: Sequence[int]) -> str:
    return f"{family} {'.'.join(map(str, version))}"


class HostKeepers(RemoteKeeper):
    """The keepers of a world's hosts, taken for one."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.host = ""
        self._epoll = select.epoll()
        self._made: list[SSHConnection] = []
        self._shares: dict[int, _Share] = {}  # by descriptor
        self._at_barrier: dict[int, dict[str, str]] = {}  # the same: what was published there
        self._dropped = False

    def add(self, connection: SSHConnection) -> None:
        """Take in a connection, so that all end together."""
        self._made.append(connection)
        if self._dropped:
            connection.kill()

    def share_out(self, connections: Sequence[SSHConnection], counts: Sequence[int]) -> None:
        """Give the ranks to the keepers, in order."""
        first = 0
        for connection, count in zip(connections, counts, strict=True):
            fd = connection.fileno()
            self._shares[fd] = _Share(connection, range(first, first + count))
            self._epoll.register(fd, select.EPOLLIN)
            first += count

    def drop(self) -> None:
        """End all connections of a world that has not come up."""
        for connection in self._made:
            connection.drop()
        self._epoll.close()

    def fileno(self) -> int:
        """Return a descriptor to wait on; readable means `receive` has something."""
        return self._epoll.fileno()

    def send(self, op: dict[str, Any]) -> None:
        """Send an op to the hosts it concerns. Raises OSError when there are none."""
        if not self._shares:
            self._dropped = True
            for connection in self._made:  # so that waits for their first words end
                connection.kill()
            raise OSError("no host is connected")
        for share in list(self._shares.values()):
            if op["op"] != "kill" or op["rank"] in share.ranks:
                with contextlib.suppress(OSError):  # its end tells
                    share.connection.send(op)

    def receive(self) -> list[dict[str, Any]]:
        """Return every complete event that has arrived, without waiting.

        Raises:
            EOFError: All keepers have ended and everything they said has been returned.
        """
        events: list[dict[str, Any]] = []
        for fd, _ in self._epoll.poll(0):
            share = self._shares[fd]
            try:
                for event in share.connection.receive():
                    self._take_in(fd, share, event, events)
            except EOFError:
                self._lose(fd, share, events)
        if not self._shares and not events:
            raise EOFError("the keepers have ended")
        if not self._shares:
            events.append({"ev": "ended"})
        return events

    def _take_in(self, fd: int, share: _Share, event: Op, events: list[dict[str, Any]]) -> None:
        if event["ev"] == "pmi":
            self._at_barrier[fd] = event["values"]
            self._meet()
        elif event["ev"] == "ended":
            share.has_ended = True  # its connection ends next
        else:
            if event["ev"] == "exit":
                share.living.discard(event["rank"])
            if event["ev"] == "failed":
                event["text"] = f"{share.connection.machine}: {event['text']}"
            events.append(event)

    def _meet(self) -> None:
        """Send all ranks what was published, once those of all hosts wait for it."""
        if self._at_barrier.keys() < self._shares.keys():
            return
        values = {name: value for each in self._at_barrier.values() for name, value in each.items()}
        self._at_barrier.clear()
        self.send({"op": "pmi", "values": values})

    def _lose(self, fd: int, share: _Share, events: list[dict[str, Any]]) -> None:
        self._let_go(fd, share)
        self._node.turns.background(share.reap)
        if share.living or not share.has_ended:
            ranks, why = sorted(share.living), share.connection.gone
            events.append({"ev": "lost", "ranks": ranks, "why": why})
        if self._shares and self._at_barrier:
            self._meet()

    def _let_go(self, fd: int, share: _Share) -> None:
        del self._shares[fd]
        self._at_barrier.pop(fd, None)
        self._epoll.unregister(fd)
        share.connection.close()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for all of ssh to leave."""
        return max([connection.wait(timeout) for connection in self._made], default=0)

    def close(self) -> None:
        """Drop all connections. A world that is still up ends."""
        for fd, share in list(self._shares.items()):
            self._let_go(fd, share)
        self._epoll.close()


class _Share:
    """The ranks of one host."""

    def __init__(self, connection: SSHConnection, ranks: range) -> None:
        self.connection = connection
        self.ranks = ranks
        self.living = set(ranks)
        self.has_ended = False

    def reap(self) -> None:
        """Wait for its ssh, so that it leaves nothing behind."""
        self.connection.wait(_LEAVING)
