"""Running a scheduler's commands: an argv, a clean environment, a deadline, a record."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from hpcdist._keeper.installed_mpi import left_by_job
from hpcdist._keeper.leash import Answer, Command, Cut, communicate, running
from hpcdist._public import public_in

# What a job or a launcher leaves in the environment of what runs inside it. Slurm's commands take
# SLURM_* and SBATCH_* before what a script says (sbatch(1), "INPUT ENVIRONMENT VARIABLES"), and a
# job gets the rest as its own. PBS_DPREFIX would have qsub look for other directives than ours.
_DROPPED = (
    *("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCANCEL_"),
    *("SCONTROL_", "SINFO_", "PBS_DPREFIX", "PMI", "OMPI_", "PRTE_", "HYD", "MPI_LOCAL"),
)
_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS"})


# What another host's shell runs: a command, and then it tells how that ended, so that an end of the
# connection is not taken for one of the command.
_FAR = '"$@"; echo "hpcdist: status $?" >&2'
_STATUS = re.compile(r"^hpcdist: status ([0-9]{1,3})\n\Z", re.MULTILINE)
_NOT_FOUND = 127  # sh(1)


class Place(Protocol):
    """Another host, on which commands run."""

    name: str
    user: str  # who we are there

    def reaching(self, argv: Sequence[str]) -> list[str]:
        """Return the command of this host that runs another one there."""


_place: ContextVar[Place | None] = ContextVar("_place", default=None)


def place() -> Place | None:
    """Return the host on which this thread's commands run; None: this one."""
    return _place.get()


@contextlib.contextmanager
def on(host: Place) -> Iterator[None]:
    """Have the commands that this thread runs meanwhile run on another host."""
    token = _place.set(host)
    try:
        yield
    finally:
        _place.reset(token)


def user() -> str:
    """Return who we are where commands run."""
    host = place()
    return getpass.getuser() if host is None else host.user


@public_in("managers")
class CommandMissing(RuntimeError):
    """A program is not on PATH.

    Attributes:
        program: Its name.
    """

    def __init__(self, program: str) -> None:
        host = place()
        where = "is this a login node?" if host is None else f"is {host.name} a login node?"
        super().__init__(f"the command {program!r} was not found on PATH: {where}")
        self.program = program


@public_in("managers")
class CommandLate(RuntimeError):
    """A command did not end in time, and was killed.

    Attributes:
        argv: What was run.
        seconds: The deadline.
        cut: Whether it was killed before that, as nobody waited for it any more.
    """

    def __init__(self, argv: Sequence[str], seconds: float, *, cut: bool = False) -> None:
        within = "before the launch ended" if cut else f"within {seconds:g} s"
        super().__init__(f"{argv[0]} did not answer {within}")
        self.argv = tuple(argv)
        self.seconds = seconds
        self.cut = cut


class ConnectionLost(CommandLate):
    """The connection to the host on which a command ran ended before the command's answer came."""

    def __init__(self, done: Done, host: str) -> None:
        super().__init__(done.argv, done.seconds)
        self.args = (f"{done.argv[0]}: the ssh connection to {host} ended: {done.said}",)


@public_in("managers")
class CommandFailed(RuntimeError):
    """A command ended with an error that is not an answer.

    Attributes:
        done: How it ended.
    """

    def __init__(self, done: Done) -> None:
        super().__init__(f"{done.argv[0]} failed ({done.status}): {done.said}")
        self.done = done


@public_in("managers")
class SubmitError(RuntimeError):
    """The scheduler did not take a job, or it is not known whether it did."""


@public_in("managers")
@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    argv: tuple[str, ...]
    status: int
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        """What it has to say for itself: its errors, or else its output."""
        return self.err.strip() or self.out.strip() or "it said nothing"


def environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment that a scheduler's commands get.

    >>> environment({"SLURM_JOB_ID": "1", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/home/u"})
    ... # doctest: +NORMALIZE_WHITESPACE
    {'SLURM_CONF': '/etc/slurm.conf', 'HOME': '/home/u', 'LC_ALL': 'C',
     'SLURM_TIME_FORMAT': 'standard'}
    """
    source = os.environ if environ is None else environ
    dropped = (*_DROPPED, *left_by_job(source))
    kept = {n: v for n, v in source.items() if n in _KEPT or not n.startswith(dropped)}
    return kept | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}


@public_in("managers")
def run(
    argv: Sequence[str],
    *,
    deadline: float = 30.0,
    log: str | None = None,
    input: str | None = None,
    until: Callable[[str], bool] | None = None,
) -> Done:
    """Run a command of a scheduler to its end: no shell, plain English, none of a job's variables.

    Args:
        deadline: Seconds after which it is killed, with all it has started.
        log: A file that gets a line of JSON for each command and what it answered.
        until: For a command that answers and then lingers: asked with the output so far; when it
            says True, the command is ended and counts as done, with status 0.

    Returns:
        What it printed, `out` and `err`, and its exit `status`.

    Raises:
        CommandMissing: There is no such program.
        CommandLate: The deadline passed.

    Example:
        >>> from hpcdist.managers import run
        >>> run(["echo", "hello"]).out
        'hello\\n'
    """
    started = time.monotonic()
    host = place()
    real = argv if host is None else host.reaching(_far(argv))
    try:
        status, out, err = (
            communicate(real, deadline, env=environment(), input=input)
            if until is None
            else _run_until(real, deadline, until)
        )
    except FileNotFoundError:
        raise CommandMissing(argv[0]) from None
    except TimeoutError as exc:
        waited = min(deadline, round(time.monotonic() - started, 1))  # a launch may be impatient
        late = CommandLate(argv, waited, cut=isinstance(exc, Cut))
        _record(log, Done(tuple(argv), -signal.SIGKILL, "", str(late), time.monotonic() - started))
        raise late from None
    done = Done(tuple(argv), status, out, err, round(time.monotonic() - started, 3))
    _record(log, done)
    return done if host is None or (until is not None and not status) else _told(done, host)


def _far(argv: Sequence[str]) -> list[str]:
    """Write a command as the shell of another host is to run it."""
    return ["env", "LC_ALL=C", "SLURM_TIME_FORMAT=standard", "sh", "-c", _FAR, "sh", *argv]


def _told(done: Done, host: Place) -> Done:
    """Return how a command of another host has ended, as that has told."""
    said = _STATUS.search(done.err)
    if said is None:
        raise ConnectionLost(done, host.name)
    if int(said[1]) == _NOT_FOUND:
        raise CommandMissing(done.argv[0])
    return replace(done, status=int(said[1]), err=done.err[: said.start()])


def text_of(path: str) -> str:
    """Return the text of a file of the host where commands run."""
    if place() is None:
        with open(path) as file:
            return file.read()
    done = run(["cat", path])
    if done.status:
        raise CommandFailed(done)
    return done.out


def ask(*argv: str) -> Done:
    """Run a command; one that is missing or late has failed."""
    try:
        return run(argv)
    except (CommandLate, CommandMissing) as exc:
        return Done(argv, 1, "", str(exc), 0.0)


def _run_until(argv: Sequence[str], deadline: float, until: Callable[[str], bool]) -> Answer:
    with (
        running(argv, deadline, env=environment(), stdin=subprocess.DEVNULL) as command,
        selectors.DefaultSelector() as selector,
    ):
        process = command.process
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.fileno(), process.stderr.fileno()
        texts = {out: b"", err: b""}
        for fd in texts:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and not until(texts[out].decode(errors="replace")):
            for key, _ in selector.select(command.left()):
                data = os.read(key.fd, 1 << 16)
                texts[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
        status = 0 if selector.get_map() else _status(command)
    said, complained = (texts[fd].decode(errors="replace") for fd in (out, err))
    return Answer(status, said, complained)


def _status(command: Command) -> int:
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return command.process.wait(command.left())


def _record(log: str | None, done: Done) -> None:
    if log is None:
        return
    line = json.dumps({"when": round(time.time(), 3), **asdict(done)})
    try:
        with open(log, "a") as file:
            file.write(line + "\n")
    except OSError:  # The run's folder has been removed: nobody will read it.
        pass
