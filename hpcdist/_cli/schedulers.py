"""Which schedulers there are, which one is meant, and what its errors come to here."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from typing import TYPE_CHECKING, NoReturn

from hpcdist._cli import plugins
from hpcdist._managers.batch.commands import (
    CommandFailed,
    CommandLate,
    CommandMissing,
    SubmitError,
)
from hpcdist._managers.launching import MpiNotFound

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from hpcdist._managers.batch.base import BatchManager

# Folders that are every machine's own nearly everywhere.
_PRIVATE = ("/tmp", "/var/tmp", "/dev/shm", "/run")


@dataclass(frozen=True)
class Scheduler:
    """A scheduler that the command line knows.

    Attributes:
        module: Where its manager is defined.
        manager: The manager's name there.
        program: The command by which it is recognised.
        bare: Its options that take no value, or none but with `=`.
        checks: The module with its checks for `hpcdist doctor`.
        limit: The option that limits a job's time, and a minute as its value.
    """

    name: str
    module: str
    manager: str
    program: str
    bare: frozenset[str]
    checks: str = ""
    limit: tuple[str, str] = ("", "")


# sbatch(1) of 22.05 and 24.11.
_SLURM_BARE = frozenset(
    {
        *("-H", "--hold", "-O", "--overcommit", "-Q", "--quiet", "-k", "--no-kill", "-v"),
        *("--verbose", "-W", "--wait", "-s", "--oversubscribe", "-I", "-V", "-h"),
        *("--contiguous", "--exclusive", "--get-user-env", "--ignore-pbs", "--nice"),
        *("--no-requeue", "--requeue", "--parsable", "--propagate", "--reboot", "--spread-job"),
        *("--test-only", "--use-min-nodes", "--resv-ports", "--segment", "--stepmgr", "--wrap"),
    }
)
# qsub(1B) of OpenPBS 23.06.
_PBS_BARE = frozenset({"-f", "-h", "-I", "-V", "-X", "-z"})
# qsub(1) of Grid Engine 8.1.9, and bsub of LSF 10.1, as they are written on our command line.
_SGE_BARE = frozenset({"-V", "-h", "--clear", "--hard", "--notify", "--soft", "--verbose"})
_LSF_BARE = frozenset({"-B", "-H", "-N", "-V", "-h", "-r", "-x", "--Ne", "--rn", "--ul"})
_KNOWN = (
    Scheduler(
        name="slurm",
        module="hpcdist._managers.batch.slurm",
        manager="SlurmManager",
        program="sbatch",
        bare=_SLURM_BARE,
        checks="hpcdist._cli.checks_slurm",
        limit=("time", "1"),
    ),
    Scheduler(
        name="sge",
        module="hpcdist._managers.batch.sge",
        manager="SGEManager",
        program="qconf",  # other schedulers have a qsub, too
        bare=_SGE_BARE,
        checks="hpcdist._cli.checks_sge",
        limit=("h_rt", "60"),
    ),
    Scheduler(
        name="lsf",
        module="hpcdist._managers.batch.lsf",
        manager="LSFManager",
        program="bsub",
        bare=_LSF_BARE,
        checks="hpcdist._cli.checks_lsf",
        limit=("W", "1"),
    ),
    Scheduler(
        name="pbs",
        module="hpcdist._managers.batch.pbs",
        manager="PBSManager",
        program="qsub",  # Grid Engine has one too, and so comes before
        bare=_PBS_BARE,
        checks="hpcdist._cli.checks_pbs",
        limit=("walltime", "60"),
    ),
)
SCHEDULERS = {scheduler.name: scheduler for scheduler in _KNOWN}


class NoScheduler(Exception):
    """There is none, or none of that name; the text says which there could be."""


def chosen(name: str | None, *, needed: bool = True) -> Scheduler:
    """Return the scheduler of this name; without one, the one whose commands are on PATH.

    Args:
        needed: Whether it shall do something; a script can be shown without it.

    Raises:
        NoScheduler: There is none.
    """
    if name is not None:
        return find(name)
    for scheduler in SCHEDULERS.values():
        if shutil.which(scheduler.program):
            return scheduler
    brought, complaints = _theirs_here()
    if brought is not None:
        return brought
    if not needed:
        return next(iter(SCHEDULERS.values()))
    programs = ", ".join(scheduler.program for scheduler in SCHEDULERS.values())
    raise NoScheduler(
        f"no scheduler was found here: on PATH there is no {programs} (is this a login node?)"
        + "".join(f"; {text}" for text in complaints)
    )


def find(name: str) -> Scheduler:
    """Return the scheduler of this name: one of ours, or one that another package brings along.

    Raises:
        NoScheduler: There is none, or its manager cannot be loaded.
    """
    if name in SCHEDULERS:
        return SCHEDULERS[name]
    brought = plugins.entries()
    if name not in brought:
        known = ", ".join([*SCHEDULERS, *brought])
        raise NoScheduler(f"no scheduler {name!r} is known: {known}")
    try:
        return _brought(brought[name])
    except plugins.Unusable as exc:
        raise NoScheduler(str(exc)) from exc


def _brought(entry: EntryPoint) -> Scheduler:
    manager = plugins.load(entry)
    its = (entry.name, entry.module, entry.attr, manager.program)
    parents = [f"{parent.__module__}.{parent.__name__}" for parent in manager.__mro__]
    for known in SCHEDULERS.values():
        if f"{known.module}.{known.manager}" in parents:
            return Scheduler(*its, known.bare | manager.bare, known.checks, known.limit)
    return Scheduler(*its, manager.bare)


def _theirs_here() -> tuple[Scheduler | None, list[str]]:
    """Return the first of theirs whose command is on PATH, and what is wrong with others."""
    complaints = []
    for entry in plugins.entries().values():
        try:
            scheduler = _brought(entry)
        except plugins.Unusable as exc:
            complaints.append(str(exc))
            continue
        if scheduler.program and shutil.which(scheduler.program):
            return scheduler, complaints
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


def manager_of(scheduler: Scheduler, n: int) -> BatchManager:
    """Make the manager of a scheduler."""
    manager: BatchManager = getattr(import_module(scheduler.module), scheduler.manager)(n)
    return manager


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
    tell(f"hpcdist {options.command}: {text}")
    sys.exit(code)


def tell(text: str) -> None:
    """Say something that is not the command's result."""
    print(text, file=sys.stderr, flush=True)


def private_place(path: str) -> str | None:
    """Return the folder above a path that compute nodes usually have one of their own of.

    >>> private_place("/tmp/venv/bin/python"), private_place("/home/u/tmp/x")
    ('/tmp', None)
    """
    return next(
        (place for place in _PRIVATE if path == place or path.startswith(place + "/")), None
    )
