"""What every process knows of a worker."""

from __future__ import annotations

from typing import Any, NamedTuple


class JobEnd(NamedTuple):
    """When the job of a worker ends at the latest."""

    at: float  # in Unix time
    walltime: float | None  # for how many seconds it may run, if that is known


class Member:
    """What everyone knows of a worker."""

    __slots__ = (
        "address",
        "connect",
        "host",
        "ident",
        "manager",
        "os_pid",
        "rank",
        "tags",
        "world",
    )

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
        tags: tuple[str, ...] = (),
    ) -> None:
        self.host = host
        self.os_pid = os_pid
        self.world = world
        self.rank = rank
        self.address = address  # where it listens for links of other workers
        self.manager = manager
        self.ident = ident
        self.connect = connect
        self.tags = tags  # by which it may be named

    def __reduce__(self) -> Any:
        return _member, tuple(getattr(self, name) for name in self.__slots__)


def _member(*values: object) -> Member:
    member = Member.__new__(Member)
    for name, value in zip(Member.__slots__, values, strict=True):
        setattr(member, name, value)
    return member
