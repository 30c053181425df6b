"""A launcher whose ranks are on other hosts: what its lines say, and how its ranks are reached.

Like the keeper it imports only what is quick to import.
"""

from __future__ import annotations

import os
import re
import signal

from hpcdist._keeper.processes import parse_launcher, signal_number
from hpcdist._numbers import whole

# What a rank's shell says where the launcher is not to know (see `launchers.separate`).
_TOLD = re.compile(r"^hpcdist: rank ([0-9]{1,9}) ended with ([0-9]{1,9})\n?", re.MULTILINE)
_MOST_RANKS = 1 << 20  # more is no list of a launcher's
_EXITED = re.compile(r"Exited with exit code ([0-9]{1,9})\b")


def split_labels(label: str, text: str) -> list[tuple[int | None, str]]:
    """Split a launcher's output by rank; what it says itself has None.

    Args:
        label: The expression by which it names the ranks; "": it does not.

    >>> split_labels("^ *([0-9]+): ?", "0: a\\n0: b\\n 1: c\\nsrun: error\\n")
    [(0, 'a\\nb\\n'), (1, 'c\\n'), (None, 'srun: error\\n')]
    """
    begin = re.compile(label) if label else None
    parts: list[tuple[int | None, str]] = []
    for line in text.splitlines(keepends=True):
        match = begin.match(line) if begin is not None else None
        rank = whole(match[1]) if match else None
        rest = line[match.end() :] if match and rank is not None else line
        if parts and parts[-1][0] == rank:
            parts[-1] = (rank, parts[-1][1] + rest)
        else:
            parts.append((rank, rest))
    return parts


def parse_ends(text: str, told: str = "", *, mpi: bool = True) -> tuple[str, list[tuple[int, int]]]:
    """Split a launcher's stderr into what is meant for people and the ranks' ends it reports.

    Where ranks are no MPI world (`mpi`), it sees the good ends of their shells alone: how a rank
    has ended, its shell has told, in words that may arrive later.

    Args:
        told: The expression for a line that tells how ranks have ended; "": as Open MPI's does.

    >>> told = "^srun: error: .*: tasks? ([0-9,-]+): (.+)"
    >>> parse_ends("srun: error: n1: tasks 0-1,4: Exited with exit code 3\\n", told)[1]
    [(0, 3), (1, 3), (4, 3)]
    >>> parse_ends("srun: error: n1: task 2: Killed\\n", told)[1]
    [(2, -9)]
    """
    if not told:
        kept, ends = parse_launcher(text)
        return kept, [(rank, status) for rank, status in ends if mpi or status]
    deaths: list[tuple[int, int]] = []
    for line in text.splitlines():
        match = re.match(told, line)
        if match:
            deaths += [(rank, _status(match[2])) for rank in _numbers(match[1])]
    return text, deaths


def parse_told(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Split a rank's stderr into what is meant for people and what its shell says of its end.

    >>> parse_told("oh\\nhpcdist: rank 2 ended with 137\\n")
    ('oh\\n', [(2, -9)])
    """
    ends = [(int(rank), int(code)) for rank, code in _TOLD.findall(text)]
    return _TOLD.sub("", text), [(r, 128 - code if code > 128 else code) for r, code in ends]


def _status(words: str) -> int:
    match = _EXITED.search(words)
    if match:
        return int(match[1])
    if "Out Of Memory" in words:
        return -int(signal.SIGKILL)
    return -signal_number(words.removesuffix(" (core dumped)").strip())


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        first, last = whole(low), whole(high or low)
        if first is not None and last is not None and last - first + len(found) < _MOST_RANKS:
            found += range(first, last + 1)
    return found


def spawn(argv: list[str], **values: object) -> int | None:
    """Run a command with its `{names}` filled in, and do not wait; None if it cannot be run."""
    filled = [word.format(**values) for word in argv]
    try:
        return os.posix_spawnp(filled[0], filled, os.environ, setpgroup=0)
    except OSError:
        return None
