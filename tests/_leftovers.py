"""What a test run must not leave behind: processes, open descriptors, files.

A process belongs to the run when its environment carries the run's mark, which every child
inherits. The temporary folder is the run's own, and as root /dev/shm is, too (see `_own_shm`).
Otherwise /dev/shm is everybody's: a file there counts when it is new, ours by name, and no living
process holds it for some time, since it may be another run's.
"""

import gc
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MARK", "Leftovers", "Process"]

# Environment variable that carries the marks of the run, and of the runs around it.
MARK = "HPCDIST_TEST_RUN"
_FILE_PATTERNS = ("hpcdist-*", "mpich_shm_*", "sm_segment.*", "ompi.*", "prte.*")
_SHM = Path("/dev/shm")
# Helpers of the standard library that live until the interpreter ends.
_STANDARD_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@dataclass(frozen=True)
class Process:
    """A process of the run, as /proc shows it."""

    os_pid: int
    state: str
    command: str

    def __str__(self) -> str:
        return f"process {self.os_pid} ({self.state}): {self.command}"

    @classmethod
    def read(cls, os_pid: int) -> "Process | None":
        """Look at a process; None when it has gone."""
        try:
            status = Path(f"/proc/{os_pid}/status").read_text()
            words = Path(f"/proc/{os_pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        state = re.search(r"^State:\s*(.*)$", status, re.MULTILINE)
        name = re.search(r"^Name:\s*(.*)$", status, re.MULTILINE)
        command = b" ".join(words).decode(errors="replace").strip()
        return cls(
            os_pid,
            state[1] if state else "?",
            (command or f"[{name[1] if name else '?'}]")[:300],
        )


def _holding(path: Path) -> str:
    """Say what is in a folder: that tells who made it, and how far they came."""
    try:
        names = sorted(
            f"{each.name} ({each.stat().st_mtime - path.stat().st_ctime:+.3f} s)"
            for each in path.iterdir()
        )
    except OSError:
        return ""
    return f", a folder with {', '.join(names) or 'nothing in it'}"


class Leftovers:
    """Knows what was there at the start, and tells what has come since."""

    def __init__(self, mark: str, temporary: Path) -> None:
        self._mark = mark.encode()
        self._folders = (_SHM, temporary)
        self._known_files = set(self._matching_files())

    def processes(self) -> list[Process]:
        """Return the living and the unreaped processes of this run, this one not among them."""
        found = []
        for os_pid in _process_ids():
            if os_pid == os.getpid() or not self._is_ours(os_pid):
                continue
            process = Process.read(os_pid)
            if process and not any(helper in process.command for helper in _STANDARD_HELPERS):
                found.append(process)
        return found

    def files(self) -> list[str]:
        """Return the files of ours that are new since the start and that nobody uses."""
        new = [path for path in self._matching_files() if path not in self._known_files]
        if not new:
            return []
        used = _paths_in_use(_SHM)
        return sorted(str(path) for path in new if path.parent != _SHM or str(path) not in used)

    def wait_processes(self, timeout: float = 5.0) -> list[str]:
        """Give processes time to end; return what is left then, after having killed it."""
        left = _settle(self.processes, timeout)
        for process in left:
            try:
                os.kill(process.os_pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return [str(process) for process in left]

    def wait_files(self, timeout: float = 5.0) -> list[str]:
        """Give files time to go; return what is left then, reported no second time."""
        left = self.files()
        deadline = time.monotonic() + timeout
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            # At every look: another run's files lie unused between a death and their removal.
            left = sorted(set(left) & set(self.files()))
        self._known_files.update(Path(name) for name in left)
        return [f"file {name}{_holding(Path(name))}" for name in left]

    def wait_descriptors(self, before: Counter[str], slack: int, timeout: float = 5.0) -> list[str]:
        """Give descriptors time to be closed; return how many of which kind are left then."""

        def grown() -> Counter[str]:
            more = descriptors() - before
            if more[_MEMORY]:
                more -= _WINDOW
            return more if more.total() > slack else Counter()

        if grown():
            gc.collect()
        left = _settle(grown, timeout)
        return [f"{count} more open: {kind}" for kind, count in sorted(left.items())]

    def _is_ours(self, os_pid: int) -> bool:
        try:
            environment = Path(f"/proc/{os_pid}/environ").read_bytes()
        except OSError:
            return False
        for setting in environment.split(b"\0"):
            name, _, value = setting.partition(b"=")
            if name == MARK.encode():
                return self._mark in value.split(b":")
        # A process that has ended has no environment left, but somebody ought to reap it.
        return not environment and _is_unreaped_child(os_pid)

    def _matching_files(self) -> Iterator[Path]:
        for folder in self._folders:
            for pattern in _FILE_PATTERNS:
                for path in folder.glob(pattern):
                    try:
                        if path.lstat().st_uid == os.geteuid():
                            yield path
                    except OSError:
                        continue


# What a driver keeps for life from its first worker on, so that `hpcdist top` can look into it.
_MEMORY = "/memfd:hpcdist-driver (deleted)"
_WINDOW = Counter({_MEMORY: 1, "pipe": 2})


def descriptors() -> Counter[str]:
    """Count the open descriptors of this process by what they refer to."""
    kinds: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue  # the descriptor of the listing itself
        # The number of a socket or pipe says nothing, and a new one is not more than an old one.
        kinds[re.sub(r":\[\d+\]$", "", target)] += 1
    return kinds


def _settle(look: Callable[[], "list | Counter"], timeout: float) -> "list | Counter":
    deadline = time.monotonic() + timeout
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_unreaped_child(os_pid: int) -> bool:
    try:
        stat = Path(f"/proc/{os_pid}/stat").read_text()
    except OSError:
        return False
    # The name is in parentheses and may hold any character; state and parent follow it.
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state == "Z" and int(parent) == os.getpid()


def _paths_in_use(folder: Path) -> set[str]:
    prefix = f"{folder}/"
    used = set()
    for os_pid in _process_ids():
        try:
            with open(f"/proc/{os_pid}/maps") as maps:
                for line in maps:
                    _, _, path = line.partition(prefix)
                    if path:
                        used.add(prefix + path.rstrip("\n"))
            with os.scandir(f"/proc/{os_pid}/fd") as entries:
                for entry in entries:
                    target = os.readlink(entry.path)
                    if target.startswith(prefix):
                        used.add(target)
        except OSError:
            continue
    return used
