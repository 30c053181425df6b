"""Options of the commands that make jobs: ours, the scheduler's, and the driver's arguments.

An option that we do not have is the scheduler's. Options may stand before the driver; then all that
follows it is the driver's, as with `hpcdist run`. Or they follow it (`submit driver.py -n 128
--partition debug 10 20`), up to the first word that is neither an option nor a value of one, or
`--`.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from hpcdist._config import one_typo_from
from hpcdist._numbers import whole

Value: TypeAlias = "bool | str | list[bool | str]"


def _split(text: str) -> str | int:
    number = whole(text)
    return text if number is None else number


def _python(text: str) -> str | list[str]:
    return text if os.path.exists(text) else shlex.split(text)


def _times(text: str) -> int:
    number = whole(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return number


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


_Entry: TypeAlias = tuple[str, dict[str, Any]]
# The flag and argparse's arguments for it. `dest` is the keyword of `addprocs`.
_JOB: list[_Entry] = [
    (
        "--scheduler",
        {
            "metavar": "NAME",
            "help": "slurm, pbs, sge, lsf, a package's; by default that found here",
        },
    ),
    ("--template", {"metavar": "FILE", "help": "a template of one's own, by name or path"}),
    ("--module", {"metavar": "NAME", "dest": "modules", "help": "module load NAME; repeatable"}),
    ("--setup", {"metavar": "LINE", "help": "a shell line before the launch; repeatable"}),
    ("--env", {"metavar": "NAME=VALUE", "help": "a variable to set; repeatable"}),
    ("--launcher", {"metavar": "HOW", "help": "auto, mpiexec, or the scheduler's own (srun)"}),
    ("--mpi", {"metavar": "FLAVOUR", "help": "as in srun --mpi=FLAVOUR"}),
    (
        "--python",
        {
            "metavar": "COMMAND",
            "type": _python,
            "help": "the interpreter, or a quoted command that ends with one; by default this one",
        },
    ),
    (
        "--wrapper",
        {"metavar": "COMMAND", "help": "a command before the interpreter: 'numactl --localalloc'"},
    ),
    ("--container", {"metavar": "IMAGE", "help": "take the python3 of this apptainer image"}),
    ("--container-args", {"metavar": "ARGS", "help": "arguments of `apptainer exec`: '--nv'"}),
    ("--srun-args", {"metavar": "ARGS", "help": "more arguments of srun, as they stand"}),
    ("--dir", {"metavar": "FOLDER", "help": "where to run; by default here"}),
    ("--job-dir", {"metavar": "FOLDER", "help": "the base of the runs' folders"}),
    ("--interface", {"metavar": "NAME", "help": "where workers shall reach process 1"}),
    ("--keep", {"action": "store_true", "help": "leave the run's folder where it is"}),
    ("--profile", {"metavar": "NAME", "help": "a table [profile.NAME] of the settings"}),
    ("--option", {"metavar": "TEXT", "dest": "options", "help": "a directive as it stands"}),
]
_WORKERS: list[_Entry] = [
    ("--split", {"metavar": "K", "type": _split, "help": "jobs of K workers each; or: node"}),
    ("--isolation", {"metavar": "HOW", "help": "auto, world or process"}),
    ("--exeflags", {"metavar": "FLAGS", "help": "for the workers' interpreters"}),
    ("--enable-threaded-blas", {"action": "store_true", "help": "leave BLAS its threads"}),
]
_SUBMIT: list[_Entry] = [
    ("--name", {"metavar": "NAME", "help": "what to call it, for jobs, logs and cancel"}),
    (
        "--resubmit",
        {
            "metavar": "N",
            "type": _times,
            "help": "start the driver again after TIMEOUT or PREEMPTED, up to N times",
        },
    ),
    ("--dry-run", {"action": "store_true", "help": "print the script and submit nothing"}),
    ("--wait", {"action": "store_true", "help": "wait, and end with the driver's exit code"}),
]
_DOCTOR: list[_Entry] = [
    ("--run", {"action": "store_true", "help": "also run a test job of two ranks, one minute"}),
    ("--json", {"action": "store_true", "help": "the findings for programs"}),
]
_TABLES = {
    "submit": _JOB + _SUBMIT,
    "script": _JOB + _WORKERS,
    "doctor": _JOB + _DOCTOR,
}
_NUMBER = ("-n", "--ntasks")
_REPEATED = {"--module", "--setup", "--env", "--option"}
_WORDS = {"--wrapper", "--container-args", "--srun-args"}  # quoted words; repeatable
_NO_KEYWORDS = {"scheduler", "dry_run", "wait", "run", "json", "name", "resubmit"}


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Let a parser know our options of a command."""
    for flag, details in _TABLES[command]:
        told = {"default": argparse.SUPPRESS, **details}
        if flag in _REPEATED:
            told |= {"action": "append", "type": _pair if flag == "--env" else str}
        if flag in _WORDS:
            told |= {"action": "extend", "type": shlex.split}
        parser.add_argument(flag, **told)


def ours(command: str) -> dict[str, bool]:
    """Return our options of a command, and whether each takes a value."""
    table = {flag: "action" not in details for flag, details in _TABLES[command]}
    return table | dict.fromkeys(_NUMBER, True) | {"-h": False, "--help": False}


def for_workers(options: argparse.Namespace) -> list[str]:
    """Return the given options that are for workers alone."""
    return [flag for flag, _ in _WORKERS if hasattr(options, flag[2:].replace("-", "_"))]


def keywords(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was given as keywords of `addprocs`; the scheduler's options are among them.

    >>> keywords(argparse.Namespace(modules=["gcc"], env=[("A", "1")], theirs={"t": "5"}, wait=1))
    {'modules': ['gcc'], 'env': {'A': '1'}, 't': '5'}
    """
    names = [
        str(details.get("dest", flag[2:].replace("-", "_")))
        for table in _TABLES.values()
        for flag, details in table
    ]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if "env" in given:
        given["env"] = dict(given["env"])
    theirs: dict[str, Value] = options.theirs
    return {n: v for n, v in given.items() if n not in _NO_KEYWORDS} | theirs


@dataclass(frozen=True)
class Divided:
    """A command line, divided.

    Attributes:
        ours: What is for our own parser.
        theirs: The scheduler's options, without their dashes; True: given without a value.
        program: The driver and its arguments.
    """

    ours: tuple[str, ...]
    theirs: dict[str, Value]
    program: tuple[str, ...]


def divide(
    args: Sequence[str], ours: Mapping[str, bool], bare: Collection[str], *, program: bool
) -> Divided:
    """Divide the arguments of a command.

    Args:
        ours: Our options, and whether each takes a value.
        bare: Options of the scheduler whose value, if any, is no word of its own.
        program: Whether the command takes a driver.

    >>> found = divide("a.py -n 8 -p debug --exclusive 10 -x".split(), {"-n": True},
    ...                {"--exclusive"}, program=True)
    >>> found.ours, found.theirs, found.program
    (('-n', '8'), {'p': 'debug', 'exclusive': True}, ('a.py', '10', '-x'))
    """
    words, mine, driver = deque(args), list[str](), list[str]()
    theirs: dict[str, Value] = {}
    counted = False
    while words:
        word = words.popleft()
        if word == "--" and program:
            driver += words
            break
        if not word.startswith("-") or word == "-":
            (driver if program else mine).append(word)
            if program and (len(driver) > 1 or counted):
                driver += words
                break
            continue
        name, attached = _name(word)
        if name in ours:
            counted = counted or name in _NUMBER
            value = words.popleft() if ours[name] and attached is None and words else None
            if value is not None and value.startswith("-") and name in _WORDS:
                mine.append(f"{word}={value}")  # argparse takes `--nv` alone for an option
            else:
                mine += [word] if value is None else [word, value]
        else:
            _give(theirs, name.lstrip("-"), _value(name, attached, bare, words))
    return Divided(tuple(mine), theirs, tuple(driver))


def _name(word: str) -> tuple[str, str | None]:
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        return name, value if equals else None
    return word[:2], word[2:] or None


def _value(name: str, attached: str | None, bare: Collection[str], words: deque[str]) -> bool | str:
    short = not name.startswith("--")
    if attached is not None and short and name in bare:
        words.appendleft("-" + attached)  # -HO is -H -O
        return True
    if attached is not None:
        return attached
    if name in bare or not words or words[0].startswith("-"):
        return True
    return words.popleft()


def _give(theirs: dict[str, Value], name: str, value: bool | str) -> None:
    before = theirs.get(name)
    if before is None:
        theirs[name] = value
    else:
        theirs[name] = [*(before if isinstance(before, list) else [before]), value]


def check(command: str, theirs: Mapping[str, Value], complain: Callable[[str], object]) -> None:
    """Complain of an option that was probably meant to be one of ours.

    >>> check("submit", {"templat": "x", "time": "5"}, print)
    unknown option --templat; did you mean --template? (--option=--templat=… passes it on)
    """
    known = [flag[2:] for flag, _ in _TABLES[command]]
    for name in theirs:
        meant = one_typo_from(name, known) if len(name) > 1 else None
        if meant is not None:
            complain(
                f"unknown option --{name}; did you mean --{meant}? "
                f"(--option=--{name}=… passes it on)"
            )
