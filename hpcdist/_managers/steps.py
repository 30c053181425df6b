"""A launcher whose ranks are on other hosts: what its lines say, and how its ranks are reached.

Like the keeper it imports only what is quick to import.
"""

from __future__ import annotations

import os
import re
import signal

from hpcdist._managers.processes import parse_launcher, signal_number

# `srun --label`: "3: text". `mpirun --output tag` (PRRTE 3): "[1,3]<stdout>: text".
# `mpiexec -prepend-rank` (hydra): "[3] text".
_LABELS = {
    "srun": re.compile(r"^ *(\d+): ?"),
    "mpirun": re.compile(r"^\[\d+,(\d+)\]<std\w+>: ?"),
    "hydra": re.compile(r"^\[(\d+)\] ?"),
}

# srun's own words on its tasks (src/srun/libsrun, 22.05 and 24.11):
# "srun: error: n1: task 3: Killed", "srun: error: n1: tasks 0-2,5: Exited with exit code 7".
_END = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+)$")
# What a rank's shell says where the launcher is not to know (see `launchers.separate`).
_TOLD = re.compile(r"^hpcdist: rank (\d+) ended with (\d+)\n?", re.MULTILINE)
_EXITED = re.compile(r"Exited with exit code (\d+)")


def split_labels(how: str, text: str) -> list[tuple[int | None, str]]:
    """Split a launcher's output by rank; what it says itself has None.

    >>> split_labels("srun", "0: a\\n0: b\\n 1: c\\nsrun: error\\n")
    [(0, 'a\\nb\\n'), (1, 'c\\n'), (None, 'srun: error\\n')]
    """
    label = _LABELS.get(how)
    parts: list[tuple[int | None, str]] = []
    for line in text.splitlines(keepends=True):
        match = label.match(line) if label is not None else None
        rank = int(match[1]) if match else None
        rest = line[match.end() :] if match else line
        if parts and parts[-1][0] == rank:
            parts[-1] = (rank, parts[-1][1] + rest)
        else:
            parts.append((rank, rest))
    return parts


def parse_ends(how: str, text: str) -> tuple[str, list[tuple[int, int]]]:
    """Split a launcher's stderr into what is meant for people and the ranks' ends it reports.

    >>> parse_ends("srun", "srun: error: n1: tasks 0-1,4: Exited with exit code 3\\n")[1]
    [(0, 3), (1, 3), (4, 3)]
    >>> parse_ends("srun", "srun: error: n1: task 2: Killed\\n")[1]
    [(2, -9)]
    """
    if how != "srun":
        return parse_launcher(text)
    deaths: list[tuple[int, int]] = []
    for line in text.splitlines():
        match = _END.match(line)
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
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def spawn(argv: list[str], **values: object) -> int | None:
    """Run a command with its `{names}` filled in, and do not wait; None if it cannot be run."""
    filled = [word.format(**values) for word in argv]
    try:
        return os.posix_spawnp(filled[0], filled, os.environ, setpgroup=0)
    except OSError:
        return None
