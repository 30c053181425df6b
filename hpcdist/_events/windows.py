"""Windows: how `hpcdist top` sees into a driver, which it is no process of.

A driver has a window of its own: a piece of memory that holds what is to be seen, and a pipe by
which it is asked to look after it. Both are descriptors without a name. Another process of the
same user on the same host opens them below /proc/PID/fd; the kernel lets nobody else (proc(5)).
They end with the driver, however that ends.

A driver that was submitted as a job may run on a host that one cannot log in to. It has a second
window: two files in its run's folder, which is private and on a file system that hosts share.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

PROTOCOL = 1  # of what is seen
_NAME = "hpcdist-driver"
_MARK = b"hpcdist\0"
# The mark, the protocol, the driver's process, the pipe, a count that is odd while it is being
# written, and how long the text is.
_HEAD = struct.Struct("<8sIIIQQ")
_ASK, _SEEN = "top.ask", "top.json"


class Window:
    """A driver's window for the processes of its host."""

    def __init__(self) -> None:
        self._memory = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        self.asked, self._ask = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._count = 0
        self._write_head(0)

    def show(self, text: bytes) -> None:
        """Let this be seen."""
        self._count += 1
        self._write_head(0)
        os.pwrite(self._memory, text, _HEAD.size)
        self._count += 1
        self._write_head(len(text))

    def _write_head(self, length: int) -> None:
        head = _HEAD.pack(_MARK, PROTOCOL, os.getpid(), self._ask, self._count, length)
        os.pwrite(self._memory, head, 0)

    def questions(self) -> bytes:
        """Return what was asked since the last time."""
        with suppress(BlockingIOError):
            return os.read(self.asked, 65536)
        return b""

    def close(self) -> None:
        """Let nobody see any more."""
        for fd in (self._memory, self.asked, self._ask):
            os.close(fd)


class FolderWindow:
    """The window of a driver that runs as a job: files in its run's folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._last = self._asked_at()

    def _asked_at(self) -> int:
        try:
            return (self._folder / _ASK).stat().st_mtime_ns
        except OSError:
            return 0

    def questions(self) -> bytes:
        """Return what was asked since the last time."""
        last, self._last = self._last, self._asked_at()
        if self._last in (0, last):
            return b""
        with suppress(OSError):
            return (self._folder / _ASK).read_bytes()
        return b""

    def show(self, text: bytes) -> None:
        """Let this be seen."""
        with suppress(OSError):  # a full disk: whoever looks sees that nothing comes
            fresh = self._folder / (_SEEN + ".new")
            fresh.write_bytes(text)
            fresh.replace(self._folder / _SEEN)


class Closed(Exception):
    """The driver is gone."""


class View:
    """What another process sees through a driver's window.

    Args:
        os_pid: The driver's process.
        memory: Where its memory is.
    """

    def __init__(self, os_pid: int, memory: Path) -> None:
        self.os_pid = os_pid
        self._memory = memory
        self._began = _start_of(os_pid)

    def protocol(self) -> int:
        """Return in which version of the protocol the driver speaks."""
        return self._head()[1]

    def ask(self, stacks_of: int = 0) -> None:
        """Have the driver look after what is seen, for some seconds.

        Args:
            stacks_of: The process whose stacks are to be seen, too.

        Raises:
            Closed: It is gone.
        """
        pipe = self._head()[3]
        try:
            way = os.open(f"/proc/{self.os_pid}/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            raise Closed from None
        try:
            with suppress(BlockingIOError):  # it has not answered for long: it knows
                os.write(way, _question(stacks_of))
        except OSError:
            raise Closed from None
        finally:
            os.close(way)

    def read(self) -> bytes | None:
        """Return what is seen; None: nothing yet.

        Raises:
            Closed: The driver is gone.
        """
        try:
            data = self._memory.read_bytes()
        except OSError:
            raise Closed from None
        *_, count, length = _HEAD.unpack_from(data)
        if count % 2 or not length or self._head()[4] != count:
            return None
        return data[_HEAD.size : _HEAD.size + length]

    def _head(self) -> tuple[bytes, int, int, int, int, int]:
        if _start_of(self.os_pid) != self._began:
            raise Closed
        try:
            with self._memory.open("rb") as file:
                mark, protocol, os_pid, pipe, count, length = _HEAD.unpack(file.read(_HEAD.size))
        except (OSError, struct.error):
            raise Closed from None
        return mark, protocol, os_pid, pipe, count, length

    @classmethod
    def of(cls, os_pid: int) -> View | None:
        """Find the window of a process; None: it is no driver with workers, or not this user's."""
        try:
            with os.scandir(f"/proc/{os_pid}/fd") as entries:
                paths = [entry.path for entry in entries if _leads_to_memory(entry.path)]
        except OSError:
            return None
        for path in paths:
            view = cls(os_pid, Path(path))
            with suppress(Closed):
                mark, _, owner, *_ = view._head()
                if mark == _MARK and owner == os_pid:  # else a fork of a driver has inherited it
                    return view
        return None


class FolderView:
    """What is seen through the window of a driver that runs as a job."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._old = self._stamp()

    def _stamp(self) -> int:
        try:
            return (self._folder / _SEEN).stat().st_mtime_ns
        except OSError:
            return 0

    def ask(self, stacks_of: int = 0) -> None:
        """Have the driver look after what is seen, for some seconds: see `View.ask`.

        Raises:
            Closed: Its folder is gone, or cannot be written.
        """
        try:
            (self._folder / _ASK).write_bytes(_question(stacks_of))
        except OSError:
            raise Closed from None

    def read(self) -> bytes | None:
        """Return what is seen; None: nothing since the first question.

        Raises:
            Closed: The driver's job has ended.
        """
        if (self._folder / "exit").exists():
            raise Closed
        if self._stamp() == self._old:
            return None
        try:
            return (self._folder / _SEEN).read_bytes()
        except OSError:
            return None


def views() -> list[View]:
    """Find the windows of all drivers of this user on this host."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if os.stat(f"/proc/{name}").st_uid != os.geteuid():
                continue
        except OSError:
            continue
        view = View.of(int(name))
        if view is not None:
            found.append(view)
    return sorted(found, key=lambda view: view.os_pid)


def _question(stacks_of: int) -> bytes:
    return b"stacks %d\n" % stacks_of if stacks_of else b"look\n"


def _leads_to_memory(path: str) -> bool:
    try:
        return os.readlink(path).startswith(f"/memfd:{_NAME}")
    except OSError:
        return False


def _start_of(os_pid: int) -> str:
    """Return when a process has started: its number alone may be another's by now."""
    try:
        return Path(f"/proc/{os_pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
