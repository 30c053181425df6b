"""Pid 1's way to a keeper: a socket pair to one it has started, TLS to one in a job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from hpcdist import _log
from hpcdist._keeper.installed_mpi import scrubbed
from hpcdist._keeper.processes import Op, kill_group, pack, unpack
from hpcdist._wire.greeting import Socket

_SENDING = 5.0


class RemoteKeeper:
    """A keeper that has dialled in from another host.

    Args:
        sock: The connection, greeted. Its end is the world's end.
        host: Where it runs.
    """

    gone = "its keeper ended"

    def __init__(self, sock: Socket, host: str) -> None:
        self._link = sock
        self._lock = threading.Lock()  # guards the link's mode: greetings send, the driver reads
        self.host = host
        self._incoming = bytearray()
        self._ended = False

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait on; readable means `receive` has something."""
        number: int = self._link.fileno()
        return number

    def send(self, op: Op) -> None:
        """Send one op. Raises OSError when the keeper is gone."""
        with self._lock:
            self._link.settimeout(_SENDING)
            self._link.sendall(pack(op))

    def receive(self) -> list[dict[str, Any]]:
        """Return every complete event that has arrived, without waiting.

        Raises:
            EOFError: The keeper has ended and everything it said has been returned; or what it
                says makes no sense.
        """
        ended = self._fill()
        try:
            events = unpack(self._incoming)
        except ValueError as exc:
            raise EOFError(f"the keeper says what makes no sense: {exc}") from exc
        if ended and not events:
            raise EOFError("the keeper has ended")
        return events

    def _fill(self) -> bool:
        try:
            with self._lock:
                self._link.setblocking(False)
                while data := self._link.recv(1 << 16):
                    self._incoming += data
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def wait(self, timeout: float | None = None) -> int:
        """Return at once: there is no process of ours to wait for."""
        return 0

    def close(self) -> None:
        """Drop the link. A world that is still up ends."""
        self._link.close()


class KeeperLink(RemoteKeeper):
    """A keeper on this host, started here. The socket's end is the world's end.

    Args:
        python: The interpreter for it and, where they are forked, for its ranks: a command.
        flags: Flags of the interpreter.
        environ: What it starts with; by default this process's, scrubbed.
    """

    def __init__(
        self,
        python: Sequence[str] = (sys.executable,),
        *,
        flags: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        # -P: the current directory is the user's, and may hold a `socket.py`.
        argv = [*python, *flags, "-P", "-m", "hpcdist._keeper.keeper"]
        env = _with_package(scrubbed(os.environ if environ is None else environ))
        self._start(argv, socket.gethostname(), env=env)

    def _start(self, argv: Sequence[str], host: str, *, both: bool = False, **how: Any) -> None:
        """Start a process with a socket to us as its standard input; with `both`, output too."""
        ours, theirs = socket.socketpair()
        super().__init__(ours, host)
        with theirs:
            try:
                self.process: subprocess.Popen[bytes] = subprocess.Popen(
                    argv,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno() if both else subprocess.DEVNULL,
                    start_new_session=True,
                    **how,
                )
            except BaseException:
                ours.close()
                raise

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the keeper's process to leave; return its status."""
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End the process, and whatever it has started in its session's first group."""
        kill_group(self.process.pid, signal.SIGKILL)

    def drop(self) -> None:
        """End a keeper that is not needed."""
        self.kill()
        self.wait()
        self.close()


def checkout() -> str | None:
    """Return the folder this hpcdist lies in; None where it is an interpreter's own."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return None if os.path.basename(here) in ("site-packages", "dist-packages") else here


def _with_package(environ: dict[str, str]) -> dict[str, str]:
    """Make sure the keeper finds the very hpcdist that starts it."""
    here = checkout()
    entries = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if here is not None and here not in entries:
        environ["PYTHONPATH"] = os.pathsep.join([here, *entries])
    return environ


def reap(keeper: RemoteKeeper) -> None:
    """Wait for a keeper that has said its last word."""
    try:
        keeper.wait(10)
    except Exception as exc:  # TimeoutExpired: its own watchdog ends it
        _log.log("warning", f"a keeper did not leave: {exc}")
