"""The first steps of a worker: its join file, and who ends it when process 1 is gone."""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import time
from typing import Any, NoReturn

from hpcdist._wire.greeting import Socket

_GRACE = 1.0  # seconds; a worker that can leave by itself needs a few milliseconds
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class CannotJoin(Exception):
    """This process cannot be the worker it was meant to be; the text is for people."""


def read_join(path: str) -> dict[str, Any]:
    """Read a join file.

    Raises:
        CannotJoin: It is none, or one that others can read too.
    """
    try:
        with open(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise CannotJoin(
                    f"{path} holds the secret of a cluster and is open to others (its mode is "
                    f"{mode:04o}, not 0600): chmod 600 {path}"
                )
            told = json.load(file)
    except OSError as exc:
        raise CannotJoin(f"{path}: {exc.strerror}") from exc
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or "cookie" not in told:
        raise CannotJoin(f"{path} is no join file")
    return told


def guard(sock: Socket) -> None:
    """Have this process ended when the connection to process 1 ends, whatever it is doing then.

    Workers that nobody keeps need it: while C code holds the interpreter's lock, no thread of
    ours would. Called before there are threads.
    """
    ours = os.getpid()
    if os.fork() == 0:
        try:
            _watch(sock.fileno(), ours)
        finally:
            os._exit(0)


def _watch(fd: int, worker: int) -> NoReturn:
    import ctypes

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # With the worker goes its guard, whose copy of the socket would hide its end.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)  # not what can be read; that is for the worker
    while os.getppid() == worker and not poll.poll():
        pass
    time.sleep(_GRACE)
    if os.getppid() == worker:
        os.kill(worker, signal.SIGKILL)
    os._exit(0)
