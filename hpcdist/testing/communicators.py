"""Communicators of simulated processes: what `comm()` gives in a simulation.

A collective operation is one meeting: each member brings something, and when the last has come, all
go on with what everyone has brought. So they all wait for each other, as MPI allows. A member that
never comes is waited for until the communicator is revoked, as Open MPI can.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hpcdist._transport.contracts import Slot
from hpcdist._wire import codec
from hpcdist._wire.codec import Payload
from hpcdist.testing.network import Network, Pipe
from hpcdist.testing.simulated_loop import SimLoop

Operator = Callable[[Any, Any], Any]


class SimMpiError(Exception):
    """An operation failed in a simulated communicator."""


class _Gathering:
    """One collective operation: those that have come."""

    def __init__(self) -> None:
        self.brought: dict[int, Payload] = {}  # by rank
        self.waiting: list[tuple[SimComm, Slot]] = []


class Meetings:
    """What the members of one communicator share."""

    def __init__(self, network: Network, pids: Sequence[int]) -> None:
        self.pids = tuple(pids)
        self.is_revoked = False
        self._network = network
        self._gatherings: dict[int, _Gathering] = {}  # by the number of the operation

    def meet(self, who: SimComm, number: int, brought: Payload) -> list[Payload]:
        """Bring something to an operation; return what all have brought, once they have."""
        gathering = self._gatherings.setdefault(number, _Gathering())
        gathering.brought[who.rank] = brought
        if len(gathering.brought) == len(self.pids):
            del self._gatherings[number]
            self._call_in(who, gathering)
        else:
            slot = Slot()
            gathering.waiting.append((who, slot))
            who.loop.wait(slot)
        if self.is_revoked:
            raise SimMpiError("the communicator was revoked")
        return [brought for _, brought in sorted(gathering.brought.items())]

    def _call_in(self, who: SimComm, gathering: _Gathering) -> None:
        """Let those go on that wait: word of it takes as long as any message."""
        for other, slot in gathering.waiting:
            pipe = Pipe(self._network, who.pid, other.pid)
            pipe.put(lambda o=other, s=slot: o.loop.arrive(lambda: o.loop.complete(s)))  # type: ignore[misc]

    def revoke(self, who: SimComm) -> None:
        """Fail what goes on, and all that follows."""
        self.is_revoked = True
        for gathering in self._gatherings.values():
            self._call_in(who, gathering)
        self._gatherings.clear()


class SimComm:
    """One member's side of a communicator: the operations of mpi4py that simulations have.

    Objects and, where the name begins with a capital, arrays. No point-to-point messages.
    """

    def __init__(self, meetings: Meetings, pid: int, loop: SimLoop) -> None:
        self.pid = pid
        self.loop = loop
        self.rank = meetings.pids.index(pid)
        self.size = len(meetings.pids)
        self._meetings = meetings
        self._operations = 0
        self._is_freed = False

    def __bool__(self) -> bool:
        return not self._is_freed

    def __getattr__(self, name: str) -> NoReturn:
        there = ", ".join(sorted(name for name in dir(type(self)) if not name.startswith("_")))
        raise AttributeError(f"a simulated communicator has no {name!r}; it has {there}")

    def __repr__(self) -> str:
        return f"<simulated communicator of {list(self._meetings.pids)}>"

    def Get_rank(self) -> int:
        """Return this member's rank."""
        return self.rank

    def Get_size(self) -> int:
        """Return how many members there are."""
        return self.size

    def Free(self) -> None:
        """Let go of it."""
        self._is_freed = True

    def Revoke(self) -> None:
        """Fail all operations, on every member."""
        self._meetings.revoke(self)

    # Collective operations

    def _exchange(self, value: object) -> list[Any]:
        if self._is_freed:
            raise SimMpiError("the communicator was freed")
        self._operations += 1
        brought = codec.dumps(value).own()
        payloads = self._meetings.meet(self, self._operations, brought)
        return [codec.loads(payload.body, payload.buffers) for payload in payloads]

    def barrier(self) -> None:
        """Wait for all members."""
        self._exchange(None)

    def bcast(self, obj: Any = None, root: int = 0) -> Any:
        """Give all members what one has."""
        return self._exchange(obj if self.rank == root else None)[root]

    def scatter(self, sendobj: Sequence[Any] | None = None, root: int = 0) -> Any:
        """Give each member its part of what one has."""
        return self._exchange(sendobj if self.rank == root else None)[root][self.rank]

    def allgather(self, sendobj: Any) -> list[Any]:
        """Give all members what each has."""
        return self._exchange(sendobj)

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """Give one member what each has."""
        found = self._exchange(sendobj)
        return found if self.rank == root else None

    def alltoall(self, sendobj: Sequence[Any]) -> list[Any]:
        """Give each member its part of what each has."""
        return [parts[self.rank] for parts in self._exchange(sendobj)]

    def allreduce(self, sendobj: Any, op: Operator = operator.add) -> Any:
        """Give all members what the operator makes of what each has."""
        first, *others = self._exchange(sendobj)
        for other in others:
            first = op(first, other)
        return first

    def reduce(self, sendobj: Any, op: Operator = operator.add, root: int = 0) -> Any:
        """Give one member what the operator makes of what each has."""
        found = self.allreduce(sendobj, op)
        return found if self.rank == root else None

    # Of arrays

    def Barrier(self) -> None:
        """Wait for all members."""
        self.barrier()

    def Bcast(self, buf: Any, root: int = 0) -> None:
        """Fill every member's array with that of one."""
        buf[...] = self.bcast(buf, root)

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Operator = operator.add) -> None:
        """Fill every member's array with what the operator makes of all."""
        recvbuf[...] = self.allreduce(sendbuf, op)
