"""What a cell must leave as it was: processes, files, descriptors, memory."""

import gc
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import hpcdist
from benchmarks.crashes import victim
from tests._leftovers import Leftovers, descriptors

_MEMORY_SLACK = 60_000_000
_DESCRIPTOR_SLACK = 3
_PATIENCE = 40.0
_OURS = ("Peer", "Link", "Record", "World", "Launch", "LocalManager")


@dataclass(frozen=True)
class Measured:
    """What there is of everything."""

    processes: frozenset[int]
    files: frozenset[str]
    descriptors: "Counter[str]"
    objects: "Counter[str]"
    memory: int
    far: tuple[int, int]


class Trace:
    """Knows how it was before, and what has come since."""

    def __init__(self, leftovers: Leftovers | None, folder: Path, far: int) -> None:
        self._leftovers = leftovers
        self._folder = folder
        self._far = far
        self._before = self._measure()

    def left(self) -> list[str]:
        """Return what is more than before, when it has had time to go."""
        end = time.monotonic() + _PATIENCE
        pause = 0.02
        while (found := self._more()) and time.monotonic() < end:
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        return found

    def _more(self) -> list[str]:
        gc.collect()
        before, now = self._before, self._measure()
        found = []
        for os_pid in now.processes - before.processes:
            found.append(f"a process more: {os_pid} {_command(os_pid)}")
        found += [f"a file more: {name}" for name in sorted(now.files - before.files)]
        more = now.descriptors - before.descriptors
        if more.total() > _DESCRIPTOR_SLACK:
            found.append(f"descriptors more: {dict(more)}")
        kinds = now.objects - before.objects
        # What has ended is forgotten at the next launch, so one launch's may be there.
        if any(count > 4 for count in kinds.values()):
            found.append(f"objects more: {dict(kinds)}")
        if now.memory > before.memory + _MEMORY_SLACK:
            found.append(f"memory: {(now.memory - before.memory) / 1e6:.0f} MB more")
        if now.far[0] > before.far[0] + _MEMORY_SLACK:
            found.append(f"memory of another: {(now.far[0] - before.far[0]) / 1e6:.0f} MB more")
        if now.far[1] > before.far[1] + _DESCRIPTOR_SLACK:
            found.append(f"descriptors of another: {now.far[1] - before.far[1]} more")
        return found

    def _measure(self) -> Measured:
        ours = () if self._leftovers is None else self._leftovers.processes()
        return Measured(
            processes=frozenset(p.os_pid for p in ours),
            files=frozenset(_files(self._folder)),
            descriptors=descriptors(),
            objects=Counter(
                name for name in (type(o).__name__ for o in gc.get_objects()) if name in _OURS
            ),
            memory=victim.resident(os.getpid()),
            far=hpcdist.remotecall_fetch(victim.numbers, self._far),
        )


def _files(folder: Path) -> list[str]:
    found = []
    for top in (Path("/dev/shm"), folder):
        for path, _, names in os.walk(top):
            found += [os.path.join(path, name) for name in names]
    return found


def _command(os_pid: int) -> str:
    try:
        return Path(f"/proc/{os_pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return "(gone)"
