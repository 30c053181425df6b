"""What the command line understands: one table of commands, one sentence for each mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

_Parser = argparse.ArgumentParser

_RUN = """\
Add N workers, then run a Python program as process 1, as `python driver.py` would.
Workers run no line of the program but what it sends them; hpcdist.init() in it returns at once.
"""
_RUN_EXAMPLES = """\
examples:
  hpcdist run -n 4 driver.py --size 100
  hpcdist run -n auto -m package.module
  hpcdist run --machine-file machines.txt driver.py

A machine file has one `[count*][user@]host` a line; # begins a comment. Hosts other than this one
are refused for now.
"""
_REPL = """\
Start an interactive Python with N workers and hpcdist's names at hand: IPython where it is
installed. Ctrl-C ends what you wait for and leaves the workers alone; Ctrl-D ends it all.
"""
_WORKER = """\
Be a worker. Cluster managers start this command; people rarely need it. The join file names the
cluster and holds its secret; `-` reads it from standard input.
"""
_DEMO = """\
A first look: pi summed over the workers, a channel between two of them, a worker's error. Runs
under `mpiexec -n N`; where no MPI is installed, with N - 1 workers on plain processes.
"""


class _OneSentence(_Parser):
    """Says in one sentence what is wrong, not with a screen of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; ends the process with 2 where they are wrong."""
    parser = _OneSentence(
        prog="hpcdist",
        description="Julia's Distributed for Python, on MPI.",
        epilog="`hpcdist COMMAND --help` tells more. A program that calls hpcdist.init() also runs "
        "as `mpiexec -n N python driver.py`.",
    )
    parser.add_argument("--version", action="version", version=f"hpcdist {_version()}")
    # Not `required`: argparse would then complain about "command" before an unknown option.
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (summary, description, epilog, arguments) in _COMMANDS.items():
        arguments(
            commands.add_parser(
                name,
                help=summary,
                description=description,
                epilog=epilog,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    options = parser.parse_args(args)
    if options.command is None:
        parser.error("a command is missing: " + ", ".join(_COMMANDS))
    if options.command == "run":
        _check_run(commands.choices["run"], options)
    return options


def _version() -> str:
    version: str = sys.modules[__name__.partition(".")[0]].__version__
    return version


def _run_arguments(parser: _Parser) -> None:
    parser.usage = "hpcdist run -n N [--machine-file FILE] (driver.py | -m MODULE) [argument ...]"
    _add_workers(parser, "-n", "how many workers")
    _add_machine_file(parser)
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="MODULE",
        help="run a module, as `python -m` does; what follows is for it",
    )
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="driver.py [argument ...]",
        help="the program, and what it finds in sys.argv",
    )


def _check_run(parser: _Parser, options: argparse.Namespace) -> None:
    if options.workers is None and options.machine_file is None:
        parser.error("say how many workers with -n N (or -n auto), or give a --machine-file")
    if options.module is not None:
        if not options.module:
            parser.error("-m needs the name of a module")
        return
    if options.program[:1] == ["--"]:
        del options.program[0]
    if not options.program:
        parser.error("the program to run is missing")
    if options.program[0].startswith("-"):
        parser.error(f"unknown option {options.program[0]}")
    if not os.path.exists(options.program[0]):
        parser.error(f"there is no file {options.program[0]}")


def _repl_arguments(parser: _Parser) -> None:
    _add_workers(parser, "-p", "how many workers; without it, none")
    _add_machine_file(parser)


def _worker_arguments(parser: _Parser) -> None:
    parser.add_argument("--join", required=True, metavar="FILE", help="the join file, or -")


def _demo_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "-n", dest="ranks", type=_at_least(2), default=4, metavar="N", help="processes (default: 4)"
    )


def _add_workers(parser: _Parser, flag: str, text: str) -> None:
    parser.add_argument(
        flag, dest="workers", type=_workers, metavar="N", help=f"{text}; auto: one per core"
    )


def _add_machine_file(parser: _Parser) -> None:
    parser.add_argument(
        "--machine-file", metavar="FILE", help="where to start workers, line by line"
    )


def _workers(text: str) -> int:
    return len(os.sched_getaffinity(0)) if text == "auto" else _at_least(0)(text)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return value

    return number


_COMMANDS: dict[str, tuple[str, str, str, Callable[[_Parser], None]]] = {
    "run": ("run a program with workers", _RUN, _RUN_EXAMPLES, _run_arguments),
    "repl": ("an interactive Python with workers", _REPL, "", _repl_arguments),
    "demo": ("a first look", _DEMO, "", _demo_arguments),
    "worker": ("be a worker (for cluster managers)", _WORKER, "", _worker_arguments),
}
