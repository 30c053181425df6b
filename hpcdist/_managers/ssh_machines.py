"""Machines as people write them: `[user@]host[:port] [bind_addr]`, and how many workers there."""

from __future__ import annotations

import getpass
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace

from hpcdist._numbers import whole

_SPEC = re.compile(
    r"(?:(?P<user>[^@\s-][^@\s]*)@)?(?P<host>\[[\w:.%]+\]|[^@:\s\[\]*-][^@:\s\[\]*]*)"
    r"(?::(?P<port>[0-9]+))?(?:\s+(?P<bind>\S+))?"
)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_FORM = "[user@]host[:port] [bind_addr]"


@dataclass(frozen=True)
class Machine:
    """A host, and how many workers to start there.

    Attributes:
        bind: The address of that host at which its workers are reached; None: all it has.
        count: How many workers; None: as many as the cores that they may use there.
    """

    host: str
    user: str | None = None
    port: int | None = None
    bind: str | None = None
    count: int | None = 1

    @property
    def target(self) -> str:
        """What `ssh` calls it."""
        return self.host if self.user is None else f"{self.user}@{self.host}"

    @property
    def is_here(self) -> bool:
        """Whether it is this machine. One with a port of ssh's own leads, as a rule, elsewhere."""
        if self.port is not None or self.bind is not None:
            return False
        if self.user is not None and self.user != getpass.getuser():
            return False
        name = socket.gethostname()
        return self.host in _LOOPBACK or self.host in (name, name.partition(".")[0])

    def __str__(self) -> str:
        return self.target if self.port is None else f"{self.target} port {self.port}"


def parse(text: str) -> Machine:
    """Read one machine.

    Raises:
        ValueError: It has another form.

    >>> parse("ada@node1:2222 10.0.0.7")
    Machine(host='node1', user='ada', port=2222, bind='10.0.0.7', count=1)
    >>> parse("[fd00::1]:22").host
    'fd00::1'
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not of the form {_FORM}")
    port = whole(match["port"].lstrip("0") or "0") if match["port"] else None
    bind = match["bind"].strip("[]") if match["bind"] else None
    try:
        ipaddress.ip_address(bind or "::")
    except ValueError:
        raise ValueError(f"{text!r} is not of the form {_FORM}: {bind} is no address") from None
    if match["port"] and (port is None or not 0 < port < 65536):
        raise ValueError(f"{text!r}: there is no port {match['port']}")
    return Machine(match["host"].strip("[]"), match["user"], port, bind)


def read(machines: Iterable[object]) -> list[Machine]:
    """Read what `addprocs` is given: texts, and pairs of a text and a number or "auto".

    A machine that is named several times is one, with as many workers as all say together.

    >>> [(m.host, m.count) for m in read(["a", ("b", "auto"), ("a", 2)])]
    [('a', 3), ('b', None)]
    """
    found: dict[Machine, list[int | None]] = {}
    for item in machines:
        machine = _one(item)
        found.setdefault(replace(machine, count=1), []).append(machine.count)
    return [replace(machine, count=_sum(machine, counts)) for machine, counts in found.items()]


def _one(item: object) -> Machine:
    if isinstance(item, Machine):
        return item
    if isinstance(item, str):
        return parse(item)
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str):
        raise TypeError(f"a machine is a text, or a text and a number or 'auto', not {item!r}")
    text, count = item
    if count == "auto":
        return replace(parse(text), count=None)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{item!r}: the number of workers is an int of 1 or more, or 'auto'")
    return replace(parse(text), count=count)


def _sum(machine: Machine, counts: list[int | None]) -> int | None:
    numbers = [count for count in counts if count is not None]
    if numbers and len(numbers) < len(counts):
        raise ValueError(f"{machine} is listed with a number and with 'auto': which is it?")
    return sum(numbers) if numbers else None
