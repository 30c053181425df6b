"""Machine files: where to start workers, one `[count*][user@]host` a line, as Julia has them."""

from __future__ import annotations

import getpass
import re
import socket

_LINE = re.compile(r"(?:(?P<count>\d+)\s*\*\s*)?(?:(?P<user>[^@\s]+)@)?(?P<host>[^@\s*]+)")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class MachineFileError(ValueError):
    """A machine file that cannot be followed; the text says where and why."""


def local_workers(path: str) -> int:
    """Count the workers that a machine file asks for on this machine.

    Raises:
        MachineFileError: It is not readable, or asks for more than that.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not a text"
        raise MachineFileError(f"{path}: {reason}") from exc
    try:
        counted = [_count(line) for line in lines]
    except MachineFileError as exc:
        raise MachineFileError(f"{path}: {exc}") from None
    return sum(counted)


def _count(line: str) -> int:
    """Read one line.

    >>> _count("3*localhost  # half of the cores"), _count("# a comment")
    (3, 0)
    """
    text = line.partition("#")[0].strip()
    if not text:
        return 0
    match = _LINE.fullmatch(text)
    if match is None:
        raise MachineFileError(f"'{text}' is not of the form [count*][user@]host")
    if not _is_here(match["user"], match["host"]):
        raise MachineFileError(
            f"'{text}' is another machine or user, which is not supported yet; "
            f"localhost and {socket.gethostname()} are"
        )
    return int(match["count"] or 1)


def _is_here(user: str | None, host: str) -> bool:
    if user is not None and user != getpass.getuser():
        return False
    name = socket.gethostname()
    return host in _LOOPBACK or host in (name, name.partition(".")[0])
