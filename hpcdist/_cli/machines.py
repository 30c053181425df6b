"""Machine files: where to start workers, one `[count*][user@]host[:port] [bind_addr]` a line."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from hpcdist._managers.ssh_machines import Machine, parse, read

_COUNT = re.compile(r"(?:(?P<count>[0-9]{1,9}|auto)\s*\*\s*)?(?P<rest>[^*]*)")
_FORM = "[count*][user@]host[:port] [bind_addr]"


class MachineFileError(ValueError):
    """A machine file that cannot be followed; the text says where and why."""


def read_file(path: str) -> tuple[int, list[Machine]]:
    """Read a machine file: how many workers it asks for on this machine, and the other machines.

    Raises:
        MachineFileError: It is not readable, or a line is not understood.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.partition("#")[0].strip() for line in file]
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not a text"
        raise MachineFileError(f"{path}: {reason}") from exc
    try:
        found = [_read_line(line) for line in lines if line]
        here = sum(_cores(m) for m in found if m.is_here)
        return here, read(m for m in found if m.count != 0 and not m.is_here)
    except ValueError as exc:
        raise MachineFileError(f"{path}: {exc}") from None


def _read_line(line: str) -> Machine:
    """Read one line.

    >>> _read_line("3*ada@node1:2222").count, _read_line("auto*node1").count
    (3, None)
    """
    match = _COUNT.fullmatch(line)
    try:
        machine = parse(match["rest"] if match is not None else "")
    except ValueError:
        raise ValueError(f"'{line}' is not of the form {_FORM}") from None
    assert match is not None
    count = match["count"] or "1"
    return replace(machine, count=None if count == "auto" else int(count))


def _cores(machine: Machine) -> int:
    return len(os.sched_getaffinity(0)) if machine.count is None else machine.count
