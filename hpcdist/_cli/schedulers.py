"""Which schedulers there are, which one is meant, and what its errors come to here."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from typing import TYPE_CHECKING, NoReturn, cast

from hpcdist._cli import plugins
from hpcdist._keeper.installed_mpi import MpiNotFound
from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing, SubmitError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from hpcdist._schedulers.batch_manager import BatchManager
    from hpcdist._schedulers.scheduler import Scheduler

# Folders that are every machine's own nearly everywhere.
_PRIVATE = ("/tmp", "/var/tmp", "/dev/shm", "/run")


@dataclass(frozen=True)
class Known:
    """A scheduler that the command line knows, and how its manager is made."""

    scheduler: Scheduler
    manager: Callable[[int], BatchManager]

    @property
    def bare(self) -> frozenset[str]:
        """Its options that take no value; those of the scheduler that it extends are among them."""
        tables = [vars(cls).get("bare", ()) for cls in type(self.scheduler).__mro__]
        return frozenset[str]().union(*tables)


# Grid Engine has a qsub, as PBS does, and so comes before.
_OURS = {
    "slurm": ("hpcdist._schedulers.slurm", "SlurmManager"),
    "sge": ("hpcdist._schedulers.sge", "SGEManager"),
    "lsf": ("hpcdist._schedulers.lsf", "LSFManager"),
    "pbs": ("hpcdist._schedulers.pbs", "PBSManager"),
}


class NoScheduler(Exception):
    """There is none, or none of that name; the text says which there could be."""


def chosen(name: str | None, *, needed: bool = True) -> Known:
    """Return the scheduler of this name; without one, the one whose commands are on PATH.

    Args:
        needed: Whether it shall do something; a script can be shown without it.

    Raises:
        NoScheduler: There is none.
    """
    if name is not None:
        return find(name)
    programs = []
    for ours in _OURS:
        known = find(ours)
        if shutil.which(known.scheduler.program):
            return known
        programs.append(known.scheduler.program)
    brought, complaints = _theirs_here()
    if brought is not None:
        return brought
    if not needed:
        return find(next(iter(_OURS)))
    raise NoScheduler(
        f"no scheduler was found here: on PATH there is no {', '.join(programs)} (is this a login "
        "node?)" + "".join(f"; {text}" for text in complaints)
    )


def find(name: str) -> Known:
    """Return the scheduler of this name: one of ours, or one that another package brings along.

    Raises:
        NoScheduler: There is none, or it cannot be loaded.
    """
    if name in _OURS:
        module, attribute = _OURS[name]
        return _known(getattr(import_module(module), attribute))
    brought = plugins.entries()
    if name not in brought:
        known = ", ".join([*_OURS, *brought])
        raise NoScheduler(f"no scheduler {name!r} is known: {known}")
    try:
        return _brought(brought[name])
    except plugins.Unusable as exc:
        raise NoScheduler(str(exc)) from exc


def _brought(entry: EntryPoint) -> Known:
    """Load a scheduler of another package.

    Raises:
        Unusable: It cannot be.
    """
    found = plugins.load(entry)
    try:
        return _known(found)
    except Exception as exc:  # somebody else's code
        raise plugins.Unusable(entry, f"cannot be made: {type(exc).__name__}: {exc}") from exc


def _known(found: type[Scheduler] | type[BatchManager]) -> Known:
    """Make what is known of a manager's class, or of a scheduler's that has none of its own."""
    from hpcdist._schedulers.batch_manager import BatchManager

    if issubclass(found, BatchManager):
        make = cast("Callable[[int], BatchManager]", found)
        return Known(make(1).scheduler, make)
    return Known(found(), lambda n: BatchManager(found(), n))


def _theirs_here() -> tuple[Known | None, list[str]]:
    """Return the first of theirs whose command is on PATH, and what is wrong with others."""
    complaints = []
    for entry in plugins.entries().values():
        try:
            known = _brought(entry)
        except plugins.Unusable as exc:
            complaints.append(str(exc))
            continue
        program = known.scheduler.program
        if program and shutil.which(program):
            return known, complaints
    return None, complaints


def named(args: Sequence[str]) -> str | None:
    """Return what `--scheduler` says, before the arguments are understood.

    >>> named(["driver.py", "--scheduler=slurm"]), named(["--scheduler", "pbs"]), named([])
    ('slurm', 'pbs', None)
    """
    for word, following in zip_longest(args, args[1:], fillvalue=""):
        if word == "--scheduler":
            return following
        if word.startswith("--scheduler="):
            return word.partition("=")[2]
    return None


def bare_options(args: Sequence[str]) -> frozenset[str]:
    """Return the options without a value of the scheduler that is probably meant."""
    try:
        return chosen(named(args), needed=False).bare
    except NoScheduler:  # complained of later
        return frozenset()


@contextmanager
def refusals(options: argparse.Namespace) -> Iterator[None]:
    """End the process with one message where options, scheduler or MPI refuse."""
    try:
        yield
    except (CommandFailed, CommandLate, CommandMissing, SubmitError) as exc:
        leave(options, 1, str(exc))
    except (NoScheduler, MpiNotFound, ValueError, OSError) as exc:
        leave(options, 1, str(exc))
    except TypeError as exc:
        leave(options, 2, str(exc))


def leave(options: argparse.Namespace, code: int, text: str) -> NoReturn:
    """End the process with a message."""
    print_line(f"hpcdist {options.command}: {text}")
    sys.exit(code)


def print_line(text: str) -> None:
    """Print a line that is not the command's result, to stderr."""
    print(text, file=sys.stderr, flush=True)


def private_place(path: str) -> str | None:
    """Return the machine-local root of `path` (such as /tmp), or None.

    >>> private_place("/tmp/venv/bin/python"), private_place("/home/u/tmp/x")
    ('/tmp', None)
    """
    return next(
        (place for place in _PRIVATE if path == place or path.startswith(place + "/")), None
    )
