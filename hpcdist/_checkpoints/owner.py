"""Who writes a checkpoint: one driver at a time, on file systems with and without locks.

The head of the file names its owner: host, pid, and a beat that goes up every two seconds. On the
owner's own host its pid tells whether it lives. From another host the beat does: an owner whose
beat stands still for a while is gone. A lock of the kernel, where there is one, decides between
drivers that begin at the same moment. It is not enough by itself: on NFS and Lustre it may not
exist, or hold on one host only, and a child that the owner forked keeps it.

Where locks cannot be trusted, a driver writes its name, waits, and opens the file again: the one
whose name stands there then is the owner. Each beat looks again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from zlib import crc32

from hpcdist._checkpoints.belonging import CheckpointMismatch
from hpcdist._checkpoints.records import HEAD, MAGIC, write
from hpcdist._errors import HpcdistError

BEAT_EVERY = 2.0  # seconds
_STILL = 4 * BEAT_EVERY  # an owner elsewhere whose beat stands still for so long is gone
_LONG_AGO = 600.0  # so is one whose last beat is so old, whatever the hosts' clocks differ by
_SETTLE = 0.5  # seconds in which drivers that begin at the same moment have all written their names
_LOOK_EVERY = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)
# File systems of one host, whose locks all who write there see. Names as in /proc/mounts.
_OF_ONE_HOST = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


class CheckpointInUse(HpcdistError):
    """Another driver writes this checkpoint.

    Attributes:
        path: The file.
        host: Where the other runs.
        pid: The other's process id there.
    """

    def __init__(self, message: str, path: str = "", host: str = "", pid: int = 0) -> None:
        super().__init__(message)
        self.path = path
        self.host = host
        self.pid = pid

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.path, self.host, self.pid)


@dataclass(frozen=True)
class Owner:
    """A driver, as the head of a file names it.

    Attributes:
        place: The boot and the container it runs in: within the same one its pid means something.
        started: When its process began, in the kernel's ticks: a pid may be used again.
        token: Of this one use of the file.
        beat: Goes up while it lives.
        time: When it wrote this, by its own clock.
    """

    host: str
    pid: int
    place: str
    started: int
    token: str
    beat: int = 0
    time: float = 0.0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Owner:
    """Describe this process, for one use of a file."""
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, _place(), _started(pid) or 0, os.urandom(8).hex())


def _place() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {os.urandom(8).hex()}"  # nobody's: others watch the beat


def _started(pid: int) -> int | None:
    """Tell when a process of this host began; None if it is no more."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # after the name, which may hold any
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


# The head


def open_file(path: str, *, make: bool = False) -> int:
    """Open a checkpoint for reading and writing.

    Raises:
        OSError: There is none, or it cannot be written.
        CheckpointMismatch: It is no checkpoint.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT if make else 0)
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as exc:
        exc.add_note(f"{path} is to be the checkpoint of a map: it has to be a file to write to")
        raise
    try:
        refuse_foreign(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_foreign(fd: int, path: str) -> None:
    """Refuse a file that is no checkpoint; one that was cut off in its head is an empty one.

    Raises:
        CheckpointMismatch: It is something else.
    """
    regular = stat.S_ISREG(os.fstat(fd).st_mode)
    begin = os.pread(fd, len(MAGIC), 0) if regular else b""
    if regular and begin == MAGIC[: len(begin)]:
        return
    what = f"it begins with {begin!r}" if regular else "it is no regular file"
    raise CheckpointMismatch(
        f"{path} is no checkpoint of this version of hpcdist: {what}. Nothing was changed in it",
        path,
        what,
        "a checkpoint",
    )


def read_owner(fd: int) -> Owner | None:
    """Read who owns a file; None if nobody does, or it is just being written.

    Raises:
        CheckpointMismatch: It says so in the words of another version.
    """
    line = os.pread(fd, HEAD, 0)[len(MAGIC) :].rstrip(b" \n")
    text, _, checksum = line.rpartition(b" ")
    if not text or f"{crc32(text):08x}".encode() != checksum:
        return None
    try:
        facts = json.loads(text)
        return Owner(**facts) if facts else None
    except (ValueError, TypeError, RecursionError) as exc:
        raise CheckpointMismatch(
            f"the checkpoint is of another version of hpcdist: it belongs to {text[:80]!r}"
        ) from exc


def write_owner(fd: int, owner: Owner | None) -> None:
    """Write who owns a file, or that nobody does."""
    facts = asdict(replace(owner, host=owner.host[:200])) if owner is not None else {}
    text = json.dumps(facts).encode()
    line = b"%s %08x" % (text, crc32(text))
    write(fd, MAGIC + line.ljust(HEAD - len(MAGIC) - 1) + b"\n", 0)


# Claiming a file


def claim(
    fd: int,
    path: str,
    me: Owner,
    *,
    say: Callable[[str], None],
    lock: Callable[[int], bool | None] | None = None,
    trusted: bool | None = None,
) -> None:
    """Become the owner of a file.

    Args:
        fd: The open file.
        path: Where it is.
        me: This process.
        say: Tells the user what takes long.
        lock: Locks the file: `kernel_lock`, unless a test has another.
        trusted: Whether a lock holds against all others; by default the file system tells.

    Raises:
        CheckpointInUse: Another driver is.
    """
    locked = (lock or kernel_lock)(fd)
    refuse_living(path, read_owner(fd), me, say=say)
    if locked is False:  # held by one that is about to write its name, or by a dead owner's child
        deadline = time.monotonic() + _SETTLE
        while time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY)
            refuse_living(path, _read_anew(path), me, say=say)
    began = time.monotonic()
    write_owner(fd, replace(me, time=time.time()))
    trusted = is_of_one_host(path) if trusted is None else trusted
    if not (locked and trusted):
        os.fsync(fd)
        time.sleep(max(_SETTLE, 2 * (time.monotonic() - began)))
        refuse_other(path, _read_anew(path), me)


def kernel_lock(fd: int) -> bool | None:
    """Lock a file; False: another has; None: there are no locks here."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno in _NO_LOCKS:
            return None
        raise
    return True


def refuse_living(
    path: str,
    other: Owner | None,
    me: Owner,
    *,
    say: Callable[[str], None],
    read: Callable[[], Owner | None] | None = None,
) -> None:
    """Refuse if the owner that a file names still lives.

    Raises:
        CheckpointInUse: It does.
    """
    if other is None or other.token == me.token:
        return
    if other.place == me.place:
        if _started(other.pid) == other.started:
            _refuse(path, other, me)
        return
    if abs(time.time() - other.time) > _LONG_AGO:
        return
    say(f"hpcdist: {path} was last written by {other}: waiting to see whether it goes on")
    deadline = time.monotonic() + _STILL
    nobody = 0  # how often in a row: once may be in the middle of its writing
    while time.monotonic() < deadline and nobody < 3:
        time.sleep(_LOOK_EVERY)
        now = read() if read is not None else _read_anew(path)
        nobody = nobody + 1 if now is None else 0
        if now is not None and (now.token, now.beat) != (other.token, other.beat):
            _refuse(path, now, me)


def refuse_other(path: str, now: Owner | None, me: Owner) -> None:
    """Refuse if somebody else owns the file by now.

    Raises:
        CheckpointInUse: Somebody does.
    """
    if now is not None and now.token != me.token:
        _refuse(path, now, me)


def _refuse(path: str, other: Owner, me: Owner) -> None:
    who = f"another map of this process, {other}," if _is_own(other, me) else f"{other}"
    raise CheckpointInUse(
        f"the checkpoint {path} is in use: {who} writes it. Two drivers cannot share one: wait "
        "for the other's end, or give this map a file of its own",
        path,
        other.host,
        other.pid,
    )


def _is_own(other: Owner, me: Owner) -> bool:
    return (other.place, other.pid, other.started) == (me.place, me.pid, me.started)


def _read_anew(path: str) -> Owner | None:
    """Read the owner from a file opened for it: NFS then asks the server."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_owner(fd)
    finally:
        os.close(fd)


def beat(fd: int, path: str, me: Owner) -> None:
    """Say that the owner lives, after a look whether it still is the owner.

    Raises:
        CheckpointInUse: Another driver has taken the file.
        OSError: The file is gone, or cannot be written.
    """
    now = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ours, there = os.fstat(fd), os.fstat(now)
        if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(errno.ESTALE, "another file has taken its place", path)
        refuse_other(path, read_owner(now), me)
    finally:
        os.close(now)
    write_owner(fd, me)


def is_of_one_host(path: str) -> bool:
    """Tell whether a file's file system is one of this host alone, as far as is known."""
    real = os.path.realpath(path)
    best, kind = "", ""
    try:
        with open("/proc/self/mounts") as file:
            for line in file:
                _, point, name, *_ = line.split(" ")
                point = point.replace("\\040", " ")
                inside = real == point or real.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):
                    best, kind = point, name
    except OSError:
        return False
    return kind in _OF_ONE_HOST
