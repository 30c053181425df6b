"""What the keeper knows about processes: their output, their ends, what they leave behind.

Like the keeper it imports only what is quick to import.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

Op = dict[str, Any]

CHUNK = 64 * 1024
TAIL = 2000
# The exit status of a job's keeper that was asked to end by a signal. PBS sends it to all processes
# of a job, so that the keeper may have left in good order before the script hears of it; by this
# status the exit file tells all the same that somebody, or a time limit, ended the job.
ASKED = 128 + signal.SIGTERM

# Shared segments that MPI libraries make in /dev/shm and leave behind after a kill: those of
# MPICH 5 and Open MPI 5 were seen, the other names are from memory (Intel MPI, Open MPI 4, UCX).
# A name that is not MPI's may be the user's own, meant to outlive the world.
SEGMENTS = re.compile(
    r"/dev/shm/(?:mpich_shm_|sm_segment\.|Intel_MPI_|vader_segment\.|ucx_shm_posix_)[^ ]*$"
)

# What prterun (PRRTE 3, Open MPI 5) writes to stderr with odls_base_verbose=5, the only place
# where it tells how one rank ended; src/mca/odls/base/odls_base_default_fns.c.
VERBOSE_LINE = re.compile(r"^\[[^\]\s]+:\d+\] \[[^\]]*@\d+,\d+\]")
EXIT_LINE = re.compile(r"odls:waitpid_fired child \[[^\]]*@\d+,(\d{1,9})\] exit code (-?\d{1,9})")
# Of one that has called MPI_Abort it tells what waitpid has returned, not the exit code.
ABORT_LINE = re.compile(
    r"odls:waitpid_fired child \[[^\]]*@\d+,(\d{1,9})\] was already dead exit code (\d{1,9})"
)
SIGNAL_LINE = re.compile(
    r"odls:waitpid_fired child process \[[^\]]*@\d+,(\d{1,9})\] terminated with signal (.+)"
)


def pack(message: Op) -> bytes:
    """Pack a message as it travels between pid 1 and a keeper: u32 length, JSON."""
    body = json.dumps(message).encode()
    return struct.pack("<I", len(body)) + body


def unpack(buffer: bytearray) -> list[Op]:
    """Take all complete messages out of `buffer`.

    >>> unpack(bytearray(pack({"op": "end"}) + b"rest"))
    [{'op': 'end'}]

    Raises:
        ValueError: They are no messages.
    """
    messages: list[Op] = []
    while len(buffer) >= 4:
        (length,) = struct.unpack_from("<I", buffer)
        if len(buffer) < 4 + length:
            break
        try:
            message = json.loads(buffer[4 : 4 + length])
        except RecursionError as exc:
            raise ValueError("a message is nested too deeply") from exc
        if not isinstance(message, dict):
            raise ValueError(f"no message but {type(message).__name__}")
        messages.append(message)
        del buffer[: 4 + length]
    return messages


def adopt_output(directory: str, rank: int) -> bool:
    """Send this process's fds 1 and 2 to the keeper's FIFOs; False if there is no keeper.

    Called by a rank that a launcher started. The open never blocks: without a reader it fails at
    once and the launcher's own streams stay.
    """
    opened: list[int] = []
    try:
        for name in ("out", "err"):
            path = os.path.join(directory, f"{name}.{rank}")
            opened.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        for fd in opened:
            os.close(fd)
        return False
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    for target, fd in enumerate(opened, start=1):
        os.set_blocking(fd, True)
        os.dup2(fd, target)
        os.close(fd)
    return True


def open_fifos(directory: str, size: int) -> Iterator[tuple[int, int, int]]:
    """Make the FIFOs for the output of ranks; yield the descriptor, rank and number of each."""
    for rank in range(size):
        for number, name in ((1, "out"), (2, "err")):
            path = os.path.join(directory, f"{name}.{rank}")
            os.mkfifo(path, 0o600)
            yield os.open(path, os.O_RDONLY | os.O_NONBLOCK), rank, number


class Lines:
    """Turn a byte stream into whole lines of text, holding back what has no newline yet."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes, *, last: bool = False) -> str:
        text = self._held + self._decoder.decode(data, last)
        if last or len(text) >= CHUNK:
            self._held = ""
            return text
        whole, newline, self._held = text.rpartition("\n")
        return whole + newline


class Output:
    """One stream of one rank, or of the launcher (rank None)."""

    def __init__(self, fd: int, rank: int | None, number: int) -> None:
        self.fd = fd
        self.rank = rank
        self.number = number
        self.lines = Lines()
        os.set_blocking(fd, False)

    def read(self) -> bytes | None:
        """Return the bytes that have arrived; b"" at the end; None if there are none now."""
        try:
            return os.read(self.fd, CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            return b""


def parse_launcher(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Split prterun's stderr into what is meant for people and the ranks' ends it reports.

    >>> parse_launcher("hello\\n[h:01] [prterun-h-1@0,0] odls:waitpid_fired child "
    ...                "[prterun-h-1@1,2] exit code 3\\n")
    ('hello\\n', [(2, 3)])
    """
    kept: list[str] = []
    deaths: list[tuple[int, int]] = []
    for line in text.splitlines(keepends=True):
        if not VERBOSE_LINE.match(line):
            kept.append(line)
        elif match := EXIT_LINE.search(line):
            deaths.append((int(match[1]), int(match[2])))
        elif match := ABORT_LINE.search(line):
            kept.append(line)  # of several aborts the launcher tells people of the first alone
            deaths.append((int(match[1]), exit_code(match[2])))
        elif match := SIGNAL_LINE.search(line):
            deaths.append((int(match[1]), -signal_number(match[2].strip())))
    return "".join(kept), deaths


def exit_code(status: str) -> int:
    """Read what waitpid has returned for a process that has ended; negative: by that signal.

    >>> exit_code("1792"), exit_code("9"), exit_code("127")
    (7, -9, 127)
    """
    number = int(status) & 0xFFFF
    try:
        return os.waitstatus_to_exitcode(number)
    except ValueError:  # that of one that was stopped: it means something else
        return number


def describe_status(status: int | None) -> str:
    """Describe an exit status in words; a negative one is a signal.

    >>> describe_status(3), describe_status(-9), describe_status(None)
    ('exit code 3', 'SIGKILL', 'cause unknown')
    """
    if status is None:
        return "cause unknown"
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


class Stat:
    """What `/proc/<pid>/stat` says; proc(5)."""

    def __init__(self, fields: list[str]) -> None:
        self.state = fields[0]  # one letter: "T" is stopped
        self.parent = int(fields[1])
        self.group = int(fields[2])
        self.session = int(fields[3])
        self.birth = fields[19]


def stat_of(pid: int) -> Stat | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return Stat(file.read().rpartition(")")[2].split())
    except OSError:
        return None


def descends(pid: int, ancestor: int) -> bool:
    """Tell whether a process descends from another. hydra gives its ranks own sessions."""
    while pid > 1:
        status = stat_of(pid)
        if status is None:
            return False
        pid = status.parent
        if pid == ancestor:
            return True
    return False


def rank_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            match = re.search(rb"(?:^|\0)PMIX_RANK=(\d+)\0", file.read())
    except OSError:
        return None
    return int(match[1]) if match else None


def ranks_of_session(session: int) -> dict[int, int]:
    """Return prterun's ranks in a session: each leads a group of its own (PRRTE 3)."""
    ranks: dict[int, int] = {}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        status = stat_of(pid)
        if status is None or status.session != session or status.group != pid:
            continue
        rank = rank_of(pid)
        if rank is not None:
            ranks.setdefault(rank, pid)
    return ranks


def segments_of(pid: int) -> set[str]:
    """Return the MPI segments in /dev/shm that a process maps and that still have a name."""
    try:
        with open(f"/proc/{pid}/maps", errors="replace") as file:
            found = {line.rstrip("\n").partition("/dev/shm/")[2] for line in file}
    except OSError:
        return set()
    return {path for name in found if name and SEGMENTS.match(path := f"/dev/shm/{name}")}


def signal_number(text: str) -> int:
    """Return the signal that strsignal(3) describes as `text`; SIGKILL if none does.

    >>> signal_number("Segmentation fault")
    11
    """
    for number in signal.valid_signals():
        if signal.strsignal(number) == text:
            return int(number)
    return int(signal.SIGKILL)


def take_status(pid: int) -> tuple[int, int] | None:
    """Return the exit code (negative: signal) of an ended child, after killing its group.

    Beside it stands the most memory that it has had, in bytes: wait4(2).

    While the zombie is not reaped its pid, and so the number of its group, is not reused.
    """
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    kill_group(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024


def lead_python_path(entries: list[str]) -> None:
    """Put `entries` in front of PYTHONPATH, for a program about to be run."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, dict.fromkeys([*entries, *known])))


def lead_group(pid: int) -> None:
    """Make a child the leader of a group of its own."""
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass  # it has already ended, or become another program in its group


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass


def kill_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except OSError:
        pass


def unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def point_streams(out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    # New objects: the keeper's are bound to what its descriptors were, /dev/null, block-buffered.
    vars(sys)["stdout"] = vars(sys)["__stdout__"] = _text(1, "strict")
    vars(sys)["stderr"] = vars(sys)["__stderr__"] = _text(2, "backslashreplace")


def _text(fd: int, errors: str) -> TextIO:
    return open(fd, "w", buffering=1, encoding="utf-8", errors=errors, closefd=False)


def flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass


def default_signals() -> None:
    """Restore the signals of a new Python interpreter; the keeper's choices are not a rank's."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def fresh_main() -> None:
    """Give a forked rank a `__main__` of its own, so that it never sees the keeper's."""
    from types import ModuleType

    sys.modules["__main__"] = ModuleType("__main__")
    sys.argv[:] = [""]


def become(launch: Op, work: Callable[[str], None] | None) -> NoReturn:
    """Turn a fork of the keeper into a rank or its launcher."""
    try:
        if work is None:
            lead_python_path(launch.get("path") or [])
            argv = launch["argv"]
            os.execvpe(argv[0], argv, os.environ)
        fresh_main()
        work(launch["join"])
    except OSError as error:
        print(f"hpcdist: cannot run {launch.get('argv')}: {error}", file=sys.stderr)
    except BaseException:  # the edge of the process: show it where the output is collected
        sys.excepthook(*sys.exc_info())
    finally:
        flush_streams()
        os._exit(1)
