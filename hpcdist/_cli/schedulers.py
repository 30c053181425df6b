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

from hpcdist._managers.batch.commands import (
    CommandFailed,
    CommandLate,
    CommandMissing,
    SubmitError,
)
from hpcdist._managers.launching import MpiNotFound

if TYPE_CHECKING:
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
    """

    name: str
    module: str
    manager: str
    program: str
    bare: frozenset[str]


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
SCHEDULERS = {
    "slurm": Scheduler(
        "slurm", "hpcdist._managers.batch.slurm", "SlurmManager", "sbatch", _SLURM_BARE
    )
}


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
        if name not in SCHEDULERS:
            raise NoScheduler(f"no scheduler {name!r} is known: {', '.join(SCHEDULERS)}")
        return SCHEDULERS[name]
    for scheduler in SCHEDULERS.values():
        if shutil.which(scheduler.program):
            return scheduler
    if not needed and len(SCHEDULERS) == 1:
        return next(iter(SCHEDULERS.values()))
    programs = ", ".join(scheduler.program for scheduler in SCHEDULERS.values())
    raise NoScheduler(
        f"no scheduler was found here: on PATH there is no {programs} (is this a login node?)"
    )


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
