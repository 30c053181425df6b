"""A job that waits for its next driver: what lies in the run's folder, and the keeper's wait.

`lingering` says that the job waits, and what it is. A driver that wants it puts a claim beside it:
its join file, under a name of its own. The keeper alone decides who gets the job; see
docs/design.md.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from hpcdist._keeper.processes import ASKED, unlink

STATE = "lingering"
LOOK_EVERY = 0.25  # seconds
# How long before its walltime is over a job ends by itself: in good order.
_BEFORE_THE_END = 2.0
_CLAIM = "claim-"
_DRAFT = ".new"

Told = dict[str, Any]
Line = TypeVar("Line")


def write_private(path: str, contents: Told) -> None:
    """Write a file that only this user can read, so that a reader finds a whole one."""
    draft = path + _DRAFT
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(contents, file)
    os.replace(draft, path)


def read_state(folder: str) -> Told | None:
    """Return what a lingering job says of itself in its run's folder; None: it does not linger.

    Its keys: `until` and `ends`, in Unix time, of which the last may be None; `asked`, its options.
    """
    found = _read(os.path.join(folder, STATE))
    if found is None or not isinstance(found.get("asked"), dict):
        return None
    until, ends = found.get("until"), found.get("ends")
    good = isinstance(until, int | float) and (ends is None or isinstance(ends, int | float))
    return found if good else None


def claim_path(folder: str, run: str) -> str:
    """Return where the claim of a run to a lingering job's folder belongs."""
    return os.path.join(folder, _CLAIM + run)


def begin(folder: str, linger: Told, ends: float | None) -> float:
    """Say in a run's folder that its job waits from now on; return for how many seconds.

    Args:
        linger: What the join file says: for how many `seconds`, and the options `asked`.
        ends: When the job ends at the latest, if that is known.
    """
    now = time.time()
    until = now + float(linger["seconds"])
    if ends is not None:
        until = min(until, ends - _BEFORE_THE_END)
    about = {"host": socket.gethostname(), "os_pid": os.getpid()}
    told = {"until": until, "ends": ends, "asked": linger["asked"], **about}
    write_private(os.path.join(folder, STATE), told)
    return max(0.0, until - now)


def start(folder: str, environ: dict[str, str]) -> NoReturn:
    """Become a fresh keeper, which waits: whatever the world has left in this process is gone."""
    argv = list(sys.orig_argv)
    at = argv.index("keeper")
    argv[at + 1 : at + 3] = ["--linger", os.path.join(folder, "join")]
    signal.alarm(0)  # it would outlive the exec
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, argv, environ)


def wait(folder: str, reach: Callable[[Told], Line]) -> tuple[Told, Line]:
    """Wait for a driver; return what its join file says, and the line to it.

    If none comes in time, or this process is asked to end, it ends here.

    Args:
        reach: Dials the process that a join file describes, and proves who we are.
    """
    state = read_state(folder)

    def leave(code: int) -> NoReturn:
        unlink(os.path.join(folder, STATE))
        os._exit(code)

    signal.signal(signal.SIGTERM, lambda *_: leave(ASKED))
    while state is not None and time.time() < state["until"]:
        for claim in _claims(folder):
            told = _read(claim)
            try:
                if told is None:
                    raise ValueError("it is no join file")
                line = reach(told)
            except (OSError, ValueError, KeyError) as exc:  # gone, or another's: the next one
                print(f"hpcdist: a driver that wants this job does not answer: {exc}", flush=True)
                unlink(claim)
                continue
            _accept(folder, claim, told)
            return told, line
        time.sleep(LOOK_EVERY)
    leave(0)


def _accept(folder: str, claim: str, told: Told) -> None:
    join = os.path.join(folder, "join")
    try:
        os.replace(claim, join)
    except FileNotFoundError:  # the driver has heard of us, and is quicker to take its claim back
        write_private(join, told)
    unlink(os.path.join(folder, STATE))
    for other in _claims(folder):
        unlink(other)


def _claims(folder: str) -> list[str]:
    """List the claims that are there. On NFS only a folder that has changed is looked at anew."""
    try:
        os.utime(folder)
        names = sorted(os.listdir(folder))
    except OSError:  # a file server that is away for a while
        return []
    claims = (name for name in names if name.startswith(_CLAIM) and not name.endswith(_DRAFT))
    return [os.path.join(folder, name) for name in claims]


def _read(path: str) -> Told | None:
    try:
        with open(path) as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
