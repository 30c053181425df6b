"""Who is in the cluster, as this process knows it: ids, whereabouts, deaths."""

from __future__ import annotations

import socket
from typing import Any

from hpcdist._errors import ProcessExitedException


class Member:
    """What everyone knows of a worker."""

    __slots__ = ("address", "connect", "host", "ident", "manager", "os_pid", "rank", "world")

    def __init__(
        self,
        host: str,
        os_pid: int,
        world: int,
        rank: int,
        *,
        address: str = "",
        manager: str = "",
        ident: Any = None,
        connect: Any = (),
    ) -> None:
        self.host = host
        self.os_pid = os_pid
        self.world = world
        self.rank = rank
        self.address = address  # where it listens for links of other workers
        self.manager = manager
        self.ident = ident
        self.connect = connect

    def __reduce__(self) -> Any:
        return _member, tuple(getattr(self, name) for name in self.__slots__)


def _member(*values: Any) -> Member:
    member = Member.__new__(Member)
    for name, value in zip(Member.__slots__, values, strict=True):
        setattr(member, name, value)
    return member


class Death(ProcessExitedException):
    """A worker's death, kept to be raised anew for each who asks."""

    def copy(self) -> ProcessExitedException:
        """Make the exception for one waiter."""
        return ProcessExitedException(self.pid, self.why, self.host, self.stderr)


class Members:
    """The processes of the cluster."""

    def __init__(self) -> None:
        self.living: dict[int, Member] = {}  # workers that count, in the order they joined
        self.gone: dict[int, Death] = {}
        self._host = socket.gethostname()
        self._turn = 0

    def add(self, pid: int, member: Member) -> None:
        """Count a worker in."""
        self.living[pid] = member

    @property
    def here(self) -> int:
        """How many workers are on this host."""
        return sum(member.host == self._host for member in list(self.living.values()))

    def remove(self, pid: int, death: ProcessExitedException) -> None:
        """Count a worker out for good."""
        self.living.pop(pid, None)
        self.gone[pid] = Death(pid, death.why, death.host, death.stderr)

    def death(self, pid: int) -> ProcessExitedException:
        """Make the error for one who waits for a dead process."""
        gone = self.gone.get(pid)
        return gone.copy() if gone is not None else ProcessExitedException(pid)

    def workers(self) -> list[int]:
        """List the workers, or pid 1 if it is alone."""
        return sorted(self.living) or [1]

    def procs(self) -> list[int]:
        """List all processes."""
        return [1, *sorted(self.living)]

    def next_worker(self) -> int:
        """Pick workers one after the other."""
        pids = self.workers()
        self._turn += 1
        return pids[(self._turn - 1) % len(pids)]
