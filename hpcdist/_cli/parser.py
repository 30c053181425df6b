"""What the command line understands: one table of commands, one sentence for each mistake."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeAlias

from hpcdist._cli import job_options
from hpcdist._config import nearest
from hpcdist._version import VERSION

_Parser = argparse.ArgumentParser
# Commands whose unknown options are the scheduler's.
_FOR_SCHEDULERS = ("submit", "script", "doctor")

_RUN = """\
Add N workers, then run a Python program as process 1, as `python driver.py` would.
Workers run only what the program sends them; hpcdist.init() in it returns at once.
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
installed. Ctrl-C ends your wait and not the workers; Ctrl-D ends all.
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
  hpcdist submit driver.py -n 128 --name run1                  (then: hpcdist logs -f run1)
  hpcdist submit -n 8 --partition=debug driver.py --size 100   (--size too)
  hpcdist submit -n 8 --setup "source env.sh" --module gcc --dry-run driver.py

hpcdist and the scheduler take the options after the driver's name, up to the first word that is
neither an option nor its value, or `--`. If -n stands before the driver, all words after the driver
are its arguments.
"""
_SCRIPT = """\
Print the job script that addprocs(SlurmManager(N), ...) would submit; with a driver, the one of
`hpcdist submit` with the same words. It submits nothing. Options that are not listed here go to the
scheduler.
"""
_SCRIPT_EXAMPLES = """\
examples:
  hpcdist script -n 8 --partition debug -t 5:00 --module gcc
  hpcdist script driver.py -n 8 --partition debug -t 5:00 10 20
"""
_JOBS = """\
List your jobs that hpcdist has submitted: those that have not ended, and those of the last day; or
those that are named, by a job's id, that of a job array, or a run's name.
"""
_LOGS = """\
Print what a job has written to its log. JOB is a job's id, that of a job array, or a run's name.
"""
_LOGS_EXAMPLES = """\
examples:
  hpcdist logs run1
  hpcdist logs -f run1     (goes on until the job has ended; Ctrl-C ends this, and not the job)
"""
_CANCEL = """\
End jobs that hpcdist has submitted. JOB is a job's id, that of a job array, or a run's name.
"""
_CHECKPOINT = """\
Show what a checkpoint of a map holds: whose it is, how many items are finished, its size, when the
first and the last of them were written, and who writes it now. It may be growing.
"""
_TOP = """\
Show what the workers of a running driver of yours are doing: their calls and for how long they run,
what waits, processor time, memory, bytes in and out, by host and job. DRIVER is the number of its
process on this host; JOB a submitted driver's job, or one with workers of a driver on this host.
Without a name: your only driver here.
"""
_TOP_EXAMPLES = """\
examples:
  hpcdist top
  hpcdist top 4711
  hpcdist top --once | less
  hpcdist top --json | python -m json.tool

Keys: q ends it, s sorts by the next column, / keeps the workers that match a word, k shows the
stacks of a worker (Esc goes back), space holds the picture.
"""
_TRACE = """\
Make one page of a trace, for any browser: a timeline, how busy each process was, the longest calls,
what was waited for, what was sent where. FILE is what `with hpcdist.trace(FILE):` or HPCDIST_TRACE
has made. It also opens in Perfetto (https://ui.perfetto.dev).
"""
_STATUS = """\
Print once what the workers of a running driver of yours are doing: `hpcdist top --once`.
"""
_CONFIG = """\
Show each setting, its value, and who has said so: the environment, a file, or nobody.
"""
_COMPLETION = """\
Print what makes a shell complete the commands and options of hpcdist.
"""
_COMPLETION_EXAMPLES = """\
examples:
  source <(hpcdist completion bash)                           (in ~/.bashrc)
  source <(hpcdist completion zsh)                            (in ~/.zshrc, after compinit)
  hpcdist completion fish >~/.config/fish/completions/hpcdist.fish
"""
_DOCTOR = """\
Check whether workers can start here, line by line; a failed check names its remedy. Options that
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


_Commands: TypeAlias = "argparse._SubParsersAction[_OneSentence]"


def make() -> tuple[_OneSentence, _Commands]:
    """Make the parser, and what has those of the commands."""
    parser = _OneSentence(
        prog="hpcdist",
        description="Julia's Distributed for Python, on MPI.",
        epilog="`hpcdist COMMAND --help` says more. A program that calls hpcdist.init() also runs "
        "as `mpiexec -n N python driver.py`.",
    )
    parser.add_argument("--version", action="version", version=f"hpcdist {VERSION}")
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
    return parser, commands


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; ends the process with 2 where they are wrong."""
    parser, commands = make()
    _check_command(parser, args)
    divided = _divide(args)
    words = args if divided is None else [args[0], *divided.ours]
    options, unknown = parser.parse_known_args(words)
    if unknown:
        known = commands.choices[options.command]._option_string_actions if options.command else {}
        _refuse(parser, unknown, known)
    if divided is not None:
        options.theirs, options.program = divided.theirs, list(divided.program)
        _check_job(commands.choices[options.command], options)
    if options.command is None:
        parser.error("a command is missing: " + ", ".join(_COMMANDS))
    if options.command == "run":
        _check_run(commands.choices["run"], options)
    return options


def _check_command(parser: _Parser, args: Sequence[str]) -> None:
    if args and not args[0].startswith("-") and args[0] not in _COMMANDS:
        meant = nearest(args[0], _COMMANDS)
        known = f"did you mean {meant!r}?" if meant else f"there are {', '.join(_COMMANDS)}"
        parser.error(f"there is no command {args[0]!r}; {known}")


def _refuse(parser: _Parser, unknown: Sequence[str], known: Iterable[str]) -> NoReturn:
    meant = nearest(unknown[0].partition("=")[0], known) if unknown[0].startswith("-") else None
    hint = f"; did you mean {meant}?" if meant else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    raise AssertionError  # `error` has ended the process


def _divide(args: Sequence[str]) -> job_options.Divided | None:
    """Divide the arguments of a command that takes a scheduler's options too."""
    if not args or args[0] not in _FOR_SCHEDULERS:
        return None
    from hpcdist._cli import schedulers

    rest, ours = args[1:], job_options.ours(args[0])
    bare = schedulers.bare_options(rest)
    return job_options.divide(rest, ours, bare, program=args[0] != "doctor")


def _check_job(parser: _Parser, options: argparse.Namespace) -> None:
    job_options.check(options.command, options.theirs, parser.error)
    if options.command == "submit" and not options.program:
        parser.error("the program to submit is missing")
    if options.command == "script" and options.program:
        for flag in job_options.for_workers(options):
            parser.error(f"{flag} is for workers, and {options.program[0]} is a driver")
    if options.n is None:
        parser.error("say how many with -n N (where it follows the program: before its arguments)")


def _run_arguments(parser: _Parser) -> None:
    parser.usage = "hpcdist run -n N [--machine-file FILE] (driver.py | -m MODULE) [argument ...]"
    _add_workers(parser, "-n", "how many workers")
    _add_machine_file(parser)
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="MODULE",
        help="run a module, as `python -m` does; the rest are its arguments",
    )
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="driver.py [argument ...]",
        help="the program and its arguments",
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
    parser.usage = "hpcdist script [driver.py] -n N [option ...] [argument ...]"
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
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.add_argument("--all", action="store_true", help="also those that ended long ago")
    parser.add_argument(
        "--clear", action="store_true", help="remove the folders, with the logs, of ended ones"
    )
    parser.add_argument("names", nargs="*", metavar="JOB", help="a job's id, or a run's name")


def _logs_arguments(parser: _Parser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    parser.add_argument("job", metavar="JOB", help="a job's id, or a run's name")


def _cancel_arguments(parser: _Parser) -> None:
    parser.add_argument("jobs", nargs="+", metavar="JOB", help="a job's id, as `jobs` shows it")


def _top_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "driver", nargs="?", metavar="DRIVER | JOB", help="a driver's process, or a job"
    )
    parser.add_argument("--once", action="store_true", help="print it once, all workers")
    parser.add_argument("--json", action="store_true", help="the same for programs")


def _status_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "driver", nargs="?", metavar="DRIVER | JOB", help="a driver's process, or a job"
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")


def _config_arguments(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="the same for programs")


def _completion_arguments(parser: _Parser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="bash | zsh | fish")


def _trace_arguments(parser: _Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="the trace")
    parser.add_argument("-o", dest="output", metavar="PAGE", help="the page (default: FILE.html)")


def _checkpoint_arguments(parser: _Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="the file that checkpoint= of the map names")


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
        "print the job script for workers, or for a driver",
        _SCRIPT,
        _SCRIPT_EXAMPLES,
        _script_arguments,
    ),
    "jobs": ("list your jobs", _JOBS, "", _jobs_arguments),
    "status": ("what workers are doing, once", _STATUS, "", _status_arguments),
    "top": ("show what workers are doing", _TOP, _TOP_EXAMPLES, _top_arguments),
    "logs": ("show what a job prints", _LOGS, _LOGS_EXAMPLES, _logs_arguments),
    "trace": ("make a page of a trace", _TRACE, "", _trace_arguments),
    "cancel": ("end jobs", _CANCEL, "", _cancel_arguments),
    "checkpoint": (
        "show what a map's checkpoint holds",
        _CHECKPOINT,
        "",
        _checkpoint_arguments,
    ),
    "doctor": ("check what is here", _DOCTOR, _DOCTOR_EXAMPLES, _doctor_arguments),
    "config": ("show the settings", _CONFIG, "", _config_arguments),
    "completion": (
        "completion for a shell",
        _COMPLETION,
        _COMPLETION_EXAMPLES,
        _completion_arguments,
    ),
    "demo": ("a first look", _DEMO, "", _demo_arguments),
    "worker": ("be a worker (for cluster managers)", _WORKER, "", _worker_arguments),
}
