"""What the command line understands: one table of commands, one sentence for each mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from hpcdist._cli import job_options

_Parser = argparse.ArgumentParser
# Commands whose unknown options are the scheduler's.
_FOR_SCHEDULERS = ("submit", "script", "doctor")

_RUN = """\
Add N workers, then run a Python program as process 1, as `python driver.py` would.
Workers run no line of the program but what it sends them; hpcdist.init() in it returns at once.
"""
_RUN_EXAMPLES = """\
examples:
  hpcdist run -n 4 driver.py --size 100
  hpcdist run -n auto -m package.module
  hpcdist run --machine-file machines.txt driver.py

A machine file has one `[count*][user@]host[:port] [bind_addr]` a line, where count may be auto; #
begins a comment. Hosts other than this one are reached by ssh.
"""
_REPL = """\
Start an interactive Python with N workers and hpcdist's names at hand: IPython where it is
installed. Ctrl-C ends what you wait for and leaves the workers alone; Ctrl-D ends it all.
"""
_WORKER = """\
Be a worker. Cluster managers start this command; type it yourself with the join file of an
ElasticManager. The file names the cluster and holds its secret, so it has to be yours alone (mode
0600); `-` reads it from standard input.
"""
_DEMO = """\
A first look: pi summed over the workers, a channel between two of them, a worker's error. Runs
under `mpiexec -n N`; where no MPI is installed, with N - 1 workers on plain processes.
"""


_SUBMIT = """\
Submit a job in which the driver runs as rank 0 of a world of N ranks; hpcdist.init() in it makes
the others its workers. Prints the job's id. Options not listed here go to the scheduler.
"""
_SUBMIT_EXAMPLES = """\
examples:
  hpcdist submit driver.py -n 128 --partition debug -t 5:00
  hpcdist submit driver.py -n 128 --exclusive --wait 10 20     (10 and 20 are for the driver)
  hpcdist submit -n 8 --partition=debug driver.py --size 100   (--size too)
  hpcdist submit -n 8 --setup "source env.sh" --module gcc --dry-run driver.py

Options that follow the driver's name are ours or the scheduler's up to the first word that is
neither, or `--`. Where -n stands before the driver, all that follows it is the driver's.
"""
_SCRIPT = """\
Print the job script that addprocs(SlurmManager(N), ...) would submit. Nothing is made or submitted.
Options that are not listed here go to the scheduler.
"""
_SCRIPT_EXAMPLES = """\
example:
  hpcdist script -n 8 --partition debug -t 5:00 --module gcc
"""
_JOBS = """\
List your jobs that hpcdist has submitted: those that have not ended, and those of the last day.
"""
_CANCEL = """\
End jobs that hpcdist has submitted. JOB is a job's id, that of a job array, or a run's name.
"""
_DOCTOR = """\
Check whether workers can be had here, line by line; what fails comes with its remedy. Options that
are not listed here go to the scheduler, as with submit. Ends with 1 if a check has failed.
"""
_DOCTOR_EXAMPLES = """\
examples:
  hpcdist doctor
  hpcdist doctor --scheduler slurm --run --partition debug
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
    divided = _divide(args)
    options = parser.parse_args(args if divided is None else [args[0], *divided.ours])
    if divided is not None:
        options.theirs, options.program = divided.theirs, list(divided.program)
        _check_job(commands.choices[options.command], options)
    if options.command is None:
        parser.error("a command is missing: " + ", ".join(_COMMANDS))
    if options.command == "run":
        _check_run(commands.choices["run"], options)
    return options


def _divide(args: Sequence[str]) -> job_options.Divided | None:
    """Divide the arguments of a command that takes a scheduler's options too."""
    if not args or args[0] not in _FOR_SCHEDULERS:
        return None
    from hpcdist._cli import schedulers

    rest, ours = args[1:], job_options.ours(args[0])
    bare = schedulers.bare_options(rest)
    return job_options.divide(rest, ours, bare, program=args[0] == "submit")


def _check_job(parser: _Parser, options: argparse.Namespace) -> None:
    job_options.check(options.command, options.theirs, parser.error)
    if options.command == "submit" and not options.program:
        parser.error("the program to submit is missing")
    if options.n is None:
        parser.error("say how many with -n N (where it follows the program: before its arguments)")


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


def _submit_arguments(parser: _Parser) -> None:
    parser.usage = "hpcdist submit driver.py -n N [option ...] [argument ...]"
    _job_arguments(parser, "submit", "ranks; rank 0 is the driver")


def _script_arguments(parser: _Parser) -> None:
    parser.usage = "hpcdist script -n N [option ...]"
    _job_arguments(parser, "script", "workers")


def _doctor_arguments(parser: _Parser) -> None:
    parser.usage = "hpcdist doctor [--scheduler slurm] [--run] [option ...]"
    _job_arguments(parser, "doctor", "ranks of the test job (default: 2)", default=2)


def _job_arguments(parser: _Parser, command: str, what: str, default: int | None = None) -> None:
    parser.add_argument(
        "-n",
        "--ntasks",
        dest="n",
        type=_at_least(1),
        default=default,
        metavar="N",
        help=f"how many {what}",
    )
    job_options.add_arguments(parser, command)


def _jobs_arguments(parser: _Parser) -> None:
    parser.add_argument("--all", action="store_true", help="also those that ended long ago")
    parser.add_argument(
        "--clear", action="store_true", help="remove the folders, with the logs, of ended ones"
    )


def _cancel_arguments(parser: _Parser) -> None:
    parser.add_argument("jobs", nargs="+", metavar="JOB", help="a job's id, as `jobs` shows it")


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
    "submit": (
        "submit a driver as a job",
        _SUBMIT,
        _SUBMIT_EXAMPLES,
        _submit_arguments,
    ),
    "script": (
        "print the job script for workers",
        _SCRIPT,
        _SCRIPT_EXAMPLES,
        _script_arguments,
    ),
    "jobs": ("list your jobs", _JOBS, "", _jobs_arguments),
    "cancel": ("end jobs", _CANCEL, "", _cancel_arguments),
    "doctor": ("check what is here", _DOCTOR, _DOCTOR_EXAMPLES, _doctor_arguments),
    "demo": ("a first look", _DEMO, "", _demo_arguments),
    "worker": ("be a worker (for cluster managers)", _WORKER, "", _worker_arguments),
}
