"""Running a scheduler's commands: an argv, a clean environment, a deadline, a record."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

# What a job or a launcher leaves in the environment of what runs inside it. Slurm's commands take
# SLURM_* and SBATCH_* before what a script says (sbatch(1), "INPUT ENVIRONMENT VARIABLES"), and a
# job gets the rest as its own. PBS_DPREFIX would have qsub look for other directives than ours.
_DROPPED = (
    *("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCANCEL_"),
    *("SCONTROL_", "SINFO_", "PBS_DPREFIX", "PMI", "OMPI_", "PRTE_", "HYD", "MPI_LOCAL"),
)
_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS"})
# Pipes of a killed command may be held open by a child of it that left its session.
_DRAIN = 2.0


class CommandMissing(RuntimeError):
    """A program is not on PATH.

    Attributes:
        program: Its name.
    """

    def __init__(self, program: str) -> None:
        super().__init__(f"the command {program!r} was not found on PATH: is this a login node?")
        self.program = program


class CommandLate(RuntimeError):
    """A command did not end in time, and was killed.

    Attributes:
        argv: What was run.
        seconds: The deadline.
    """

    def __init__(self, argv: Sequence[str], seconds: float) -> None:
        super().__init__(f"{argv[0]} did not answer within {seconds:g} s")
        self.argv = tuple(argv)
        self.seconds = seconds


class CommandFailed(RuntimeError):
    """A command ended with an error that is not an answer.

    Attributes:
        done: How it ended.
    """

    def __init__(self, done: Done) -> None:
        super().__init__(f"{done.argv[0]} failed ({done.status}): {done.said}")
        self.done = done


class SubmitError(RuntimeError):
    """The scheduler did not take a job, or nobody knows whether it did."""


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
    kept = {n: v for n, v in source.items() if n in _KEPT or not n.startswith(_DROPPED)}
    return kept | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}


def run(
    argv: Sequence[str],
    *,
    deadline: float = 30.0,
    log: str | None = None,
    input: str | None = None,
    until: Callable[[str], bool] | None = None,
) -> Done:
    """Run a command to its end.

    Args:
        deadline: Seconds after which it is killed, with all it has started.
        log: A file that gets a line of JSON for each command and what it answered.
        until: For a command that answers and then lingers: asked with the output so far; when it
            says True, the command is ended and counts as done, with status 0.

    Raises:
        CommandMissing: There is no such program.
        CommandLate: The deadline passed.
    """
    started = time.monotonic()
    try:
        status, out, err = (
            _run_to_end(argv, deadline, input)
            if until is None
            else _run_until(argv, deadline, until)
        )
    except FileNotFoundError:
        raise CommandMissing(argv[0]) from None
    except TimeoutError:
        _record(log, Done(tuple(argv), -signal.SIGKILL, "", "killed at the deadline", deadline))
        raise CommandLate(argv, deadline) from None
    done = Done(tuple(argv), status, out, err, round(time.monotonic() - started, 3))
    _record(log, done)
    return done


def _start(argv: Sequence[str], stdin: int) -> subprocess.Popen[str]:
    # A session of its own: a terminal's Ctrl-C is for the user's program, not for a submission.
    return subprocess.Popen(
        list(argv),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment(),
        start_new_session=True,
    )


def _run_to_end(argv: Sequence[str], deadline: float, input: str | None) -> tuple[int, str, str]:
    stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
    with _start(argv, stdin) as process:
        try:
            out, err = process.communicate(input, deadline)
        except subprocess.TimeoutExpired:
            _kill(process)
            raise TimeoutError from None
        except BaseException:
            _kill(process)
            raise
    return process.returncode, out, err


def _run_until(
    argv: Sequence[str], deadline: float, until: Callable[[str], bool]
) -> tuple[int, str, str]:
    end = time.monotonic() + deadline
    with _start(argv, subprocess.DEVNULL) as process, selectors.DefaultSelector() as selector:
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.fileno(), process.stderr.fileno()
        texts = {out: b"", err: b""}
        for fd in texts:
            selector.register(fd, selectors.EVENT_READ)
        try:
            while selector.get_map():
                for key, _ in selector.select(max(0.0, end - time.monotonic())):
                    data = os.read(key.fd, 1 << 16)
                    texts[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
                if until(texts[out].decode(errors="replace")):
                    break
                if time.monotonic() > end:
                    raise TimeoutError
            status = 0 if selector.get_map() else process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            if process.poll() is None:
                _kill(process)
    return status, texts[out].decode(errors="replace"), texts[err].decode(errors="replace")


def _kill(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass
    try:
        process.communicate(timeout=_DRAIN)
    except (subprocess.TimeoutExpired, ValueError):
        pass


def _record(log: str | None, done: Done) -> None:
    if log is None:
        return
    line = json.dumps({"when": round(time.time(), 3), **asdict(done)})
    try:
        with open(log, "a") as file:
            file.write(line + "\n")
    except OSError:  # The run's folder has been removed: nobody will read it.
        pass
