"""What another thread of this process is doing, found out by looking at it for a moment."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from hpcdist._frames import OWN_FOLDER
from hpcdist._runtime.node import Node
from hpcdist._transport.contracts import Slot

_FOR = 1.0  # seconds
_EVERY = 0.05
_ASLEEP = 0.03  # share of a core below which a thread sleeps: one that waits inside MPI spins


class Doing(enum.Enum):
    """What a thread does."""

    PYTHON = "it runs Python, or has ended"
    C_CODE = "it is in one call into C all the time, and uses the processor"
    SLEEP = "it is in one call into C all the time, and does not"
    OUR_WAIT = "it waits in one of our waits"


def look_at(node: Node, thread: int, native: int, goes_on: Callable[[], bool]) -> Doing:
    """Look at a thread for a second.

    A thread that waits inside MPI is C_CODE, as MPI spins; so is one that computes in one long
    call. The two cannot be told apart.

    Args:
        node: The process whose thread it is.
        thread: Its ident.
        native: The kernel's number for it.
        goes_on: Whether what it was looked at for still runs.
    """
    now = node.machine.now
    start, cpu, first = now(), _cpu_time(native), _position(thread)
    while now() - start < _FOR:
        with suppress(TimeoutError):
            node.wait(Slot(), _EVERY)
        if not goes_on() or _position(thread) != first:
            return Doing.PYTHON
    call = node.turns.calls.get(thread)
    if call is not None and call.waits:
        return Doing.OUR_WAIT
    used = _cpu_time(native) - cpu
    return Doing.C_CODE if used > _ASLEEP * (now() - start) else Doing.SLEEP


def _position(thread: int) -> tuple[int, int] | None:
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code.co_filename.startswith(OWN_FOLDER):
        frame = frame.f_back  # our own waits loop
    return (id(frame), frame.f_lasti) if frame is not None else None


def _cpu_time(native: int) -> float:
    try:
        with open(f"/proc/self/task/{native}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # proc(5): utime, stime
