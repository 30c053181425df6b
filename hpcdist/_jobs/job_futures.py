"""`JobFuture`: a function that runs as a job, or has run; the same in any process, at any time."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Generator
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

from hpcdist import _errors
from hpcdist._cluster.launch_state import LaunchState
from hpcdist._config import nearest
from hpcdist._errors import LaunchError, ProcessExitedException
from hpcdist._jobs import envelopes
from hpcdist._jobs.envelopes import ENDED, OPTIONS, STARTED, STDERR, STDOUT
from hpcdist._jobs.recipes import manager_of
from hpcdist._jobs.watch import JobWatch, Standing
from hpcdist._keeper.folders import last_lines
from hpcdist._public import public
from hpcdist._schedulers import job as jobs
from hpcdist._schedulers.job import MANIFEST, JobId
from hpcdist._schedulers.render import render
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.submission import submit
from hpcdist._schedulers.verdict import JobState

T = TypeVar("T")

_LOOK_EVERY = 0.2  # at the folder, which costs nothing; the scheduler is asked less often
_LATE = 10.0  # a result may be seen so much later than the exit of the job, on a shared file system
_SUBMISSION = 180.0  # a process that submits a job again has done so within this time
_TAIL = 20
_ATTEMPTS = "attempts.json"
_CANCELLED = "cancelled"  # says which job
_AGAIN_AFTER = ("PREEMPTED", "NODE_FAIL", "TIMEOUT")  # no fault of the function


@public
class JobFuture(Generic[T]):
    """What becomes of a function that was submitted as a job.

    It is the same object in every process: pickle it, or get it again by `hpcdist.job(name)`.

    Args:
        name: Its name; that of a map's job ends with a dot and the number of the item.
        folder: The folder of the run.
        task: Which task of a job array it is.

    Example:
        >>> import hpcdist
        >>> hpcdist.job("nobody")
        Traceback (most recent call last):
          ...
        LookupError: no job is called 'nobody'...
    """

    def __init__(self, name: str, folder: str, task: int | None = None) -> None:
        self.name = name
        self._run = folder
        self._task = task
        self._folder = folder if task is None else os.path.join(folder, "tasks", str(task))

    def __reduce__(self) -> tuple[Any, ...]:
        return JobFuture, (self.name, self._run, self._task)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobFuture) and other._folder == self._folder

    def __hash__(self) -> int:
        return hash(self._folder)

    def __repr__(self) -> str:
        return f"<JobFuture {self.name}: job {self.job_id}, {self.state}>"

    # How it stands

    @property
    def job_id(self) -> str:
        """The scheduler's number of the job; with `retries`, of the last one."""
        return self._attempts()[-1]

    @property
    def state(self) -> LaunchState:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, or the scheduler's own word."""
        outcome = envelopes.read_outcome(self._folder)
        if outcome is not None:
            return LaunchState("FAILED" if outcome.failed else "COMPLETED")
        verdict = self._standing().verdict
        if verdict is None or verdict.state.waiting:
            return LaunchState.PENDING
        return LaunchState(verdict.word.partition(" ")[0])

    @property
    def reason(self) -> str:
        """Why it waits, or how it failed."""
        outcome = envelopes.read_outcome(self._folder)
        if outcome is not None:
            return _summary(_errors.decode_error(outcome.body)) if outcome.failed else ""
        verdict = self._standing().verdict
        if verdict is None:
            return ""
        return verdict.describe() if verdict.state.terminal else verdict.reason

    def done(self) -> bool:
        """Tell whether it has ended, well or not."""
        if envelopes.read_outcome(self._folder) is not None:
            return True
        return self._standing().ended and not self._tries_again()

    # What it gives

    def result(self, timeout: float | None = None) -> T:
        """Wait for the end; return what the function returned, or raise what it raised.

        Raises:
            RemoteException: The function failed; it is an instance of the original's class, too.
            LaunchError: The job ended before the function could begin; the end of its log is in it.
            ProcessExitedException: It ended before the function did: TIMEOUT, OUT_OF_MEMORY, …
            CancelledError: It was cancelled.
            TimeoutError: It has not ended within the timeout, and goes on.
        """
        error = self._error(timeout)
        if error is not None:
            raise error
        return cast(T, envelopes.result_of(self._folder))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return the error that `result` raises, None if it returns."""
        return self._error(timeout)

    def stdout(self) -> str:
        """Return what the function has printed so far."""
        return _text(os.path.join(self._folder, STDOUT))

    def stderr(self) -> str:
        """Return what it has written to stderr so far, and before it began, the log of its job."""
        return _text(os.path.join(self._folder, STDERR)) or _text(self._log())

    def __await__(self) -> Generator[Any, None, T]:
        return self._awaited().__await__()

    async def _awaited(self) -> T:
        while not await asyncio.to_thread(self.done):
            await asyncio.sleep(_LOOK_EVERY)
        return await asyncio.to_thread(self.result)

    def _error(self, timeout: float | None) -> BaseException | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        late: float | None = None  # since when it has ended, and no result is seen
        while True:
            outcome = envelopes.read_outcome(self._folder)
            if outcome is not None:
                return self._raised(outcome.body) if outcome.failed else None
            standing = self._standing()
            now = time.monotonic()
            if standing.ended and not self._tries_again(standing):
                late = now if late is None else late
                verdict = standing.verdict
                patience = _LATE if verdict and verdict.state is JobState.DONE else 1.0
                if now > late + patience:
                    return self._lost(standing)
            elif self._is_hopeless(standing):
                return self._given_up(standing)
            else:
                late = None
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"job {self.job_id} ({self.name}) has not ended: {self.state}")
            pause = _LOOK_EVERY if deadline is None else min(_LOOK_EVERY, deadline - now)
            time.sleep(max(0.0, pause))

    def _is_hopeless(self, standing: Standing) -> bool:
        """Tell whether it waits for what can never come, as with a time limit above the highest."""
        verdict = standing.verdict
        return verdict is not None and self._scheduler().hopeless(verdict)

    def _given_up(self, standing: Standing) -> BaseException:
        """Cancel a job that can never start."""
        assert standing.verdict is not None
        what = f"job {self.job_id} ({self.name}) can never start: {standing.verdict.reason}"
        self.cancel()
        return LaunchError(f"{what}; it has been cancelled", phase="queued", jobs=[self.job_id])

    def _raised(self, body: bytes) -> BaseException:
        error = _errors.decode_error(body)
        error.add_note(f"It is of job {self.job_id} ({self.name})")
        return error

    def _lost(self, standing: Standing) -> BaseException:
        """Say why there is no result."""
        verdict = standing.verdict
        why = "no record says how it ended" if verdict is None else verdict.describe()
        what = f"job {self.job_id} ({self.name})"
        if verdict is not None and verdict.state is JobState.CANCELLED:
            return CancelledError(f"{what} was cancelled")
        if not os.path.exists(os.path.join(self._folder, STARTED)):
            return LaunchError(
                f"{what} ended before its function began: {why}",
                phase="start",
                output=last_lines(self._log(), _TAIL),
                jobs=[self.job_id],
            )
        host = _text(os.path.join(self._folder, STARTED)).strip()
        tail = last_lines(os.path.join(self._folder, STDERR), _TAIL)
        return ProcessExitedException(1, f"{why}, in {what}", host, tail)

    # What one can do to it

    def cancel(self) -> bool:
        """Cancel the job; tell whether it had not ended before."""
        if self.done():
            return False
        scheduler, number = self._scheduler(), self._attempts()[-1]
        mark = os.path.join(self._folder, _CANCELLED)
        with open(mark, "w") as file:
            file.write(number)
        try:
            scheduler.cancel([number])
        except BaseException:
            os.unlink(mark)
            raise
        JobWatch.here().ask_soon(scheduler)
        return True

    def forget(self) -> None:
        """Remove the result, and all that is kept of the job.

        Raises:
            RuntimeError: It has not ended.
        """
        if not self.done():
            raise RuntimeError(f"job {self.job_id} ({self.name}) has not ended: cancel() it first")
        if self._task is None:
            jobs.forget(self._run)
            return
        jobs.remove(self._folder)
        if not os.listdir(os.path.join(self._run, "tasks")):
            jobs.forget(self._run)

    # Its folder

    def _facts(self) -> dict[str, Any]:
        try:
            with open(os.path.join(self._run, MANIFEST)) as file:
                facts: dict[str, Any] = json.load(file)
        except FileNotFoundError:
            raise LookupError(f"job {self.name} was forgotten: {self._run} is gone") from None
        return facts

    def _attempts(self) -> list[JobId]:
        """Return its jobs, the first one first."""
        number = self._task or 0
        try:
            with open(os.path.join(self._folder, _ATTEMPTS)) as file:
                later = json.load(file)
        except FileNotFoundError:
            later = []
        return [JobId(*one) for one in [self._facts()["jobs"][number], *later]]

    def _log(self) -> str:
        return os.path.join(self._folder, "log")

    def _scheduler(self) -> Scheduler:
        return manager_of(self._facts()).scheduler

    def _standing(self) -> Standing:
        number = self._attempts()[-1]
        try:
            of, known = envelopes.read(os.path.join(self._folder, ENDED))
        except FileNotFoundError:
            of = None
        if of == number:
            return Standing(known)
        standing = JobWatch.here().standing(self._scheduler(), number, self._folder)
        verdict = standing.verdict
        if standing.ended and verdict is not None:
            if verdict.state is JobState.FAILED and self._was_cancelled(number):
                verdict = replace(verdict, state=JobState.CANCELLED, word="CANCELLED", reason="")
                standing = Standing(verdict)
            envelopes.write(self._folder, ENDED, (number, verdict))
        return standing

    def _was_cancelled(self, number: JobId) -> bool:
        """Tell whether `cancel` has ended a job; its script may see the launcher fail first."""
        return _text(os.path.join(self._folder, _CANCELLED)) == number

    # Again

    def _tries_again(self, standing: Standing | None = None) -> bool:
        """Submit it again if its end was no fault of its own; tell whether it was.

        Whoever looks first does so.
        """
        verdict = (standing or self._standing()).verdict
        if verdict is None or not verdict.word.startswith(_AGAIN_AFTER):
            return False
        attempts = self._attempts()
        if len(attempts) > int(self._facts().get("retries", 0)):
            return False
        guard = os.path.join(self._folder, f"again-{len(attempts)}")
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
        except FileExistsError:  # another process is at it, unless it has died over it
            return time.time() - os.stat(guard).st_mtime < _SUBMISSION
        self._submit_again(attempts)
        return True

    def _submit_again(self, attempts: list[JobId]) -> None:
        for name in ("exit", STARTED):
            path = os.path.join(self._folder, name)
            if os.path.exists(path):
                os.unlink(path)
        facts = self._facts()
        plan = manager_of(facts).program_plan(envelopes.read(os.path.join(self._run, OPTIONS)))
        spec = plan.program(facts["name"], self._folder, facts["command"])
        script = jobs.write_script(self._folder, render(spec), f"again-{len(attempts)}.sh")
        made = submit(plan.scheduler, spec, script, os.path.join(self._folder, "commands.jsonl"))
        later = [[one, one.cluster] for one in [*attempts[1:], made]]
        path = os.path.join(self._folder, _ATTEMPTS)
        with open(f"{path}.new", "w") as file:
            json.dump(later, file)
        os.replace(f"{path}.new", path)


@public
def job(name: str) -> JobFuture[Any]:
    """Find a job again, in another process or on another day, by its name.

    Args:
        name: That of its `JobFuture`.

    Raises:
        LookupError: There is none, or it was forgotten.

    Example:
        >>> import hpcdist
        >>> hpcdist.job("nobody")
        Traceback (most recent call last):
          ...
        LookupError: no job is called 'nobody'...
    """
    known = {str(f.get("name")): f for f in jobs.read_manifests() if f.get("kind") == "call"}
    run, _, task = name.partition(".")
    facts = known.get(run)
    if facts is None:
        meant = nearest(run, known)
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise LookupError(f"no job is called {name!r} in {jobs.jobs_folder()}{hint}")
    folder, tasks = str(facts["folder"]), int(facts.get("tasks", 0))
    if not tasks:
        return JobFuture(run, folder)
    if not task.isdecimal() or int(task) >= tasks:
        raise LookupError(
            f"{run} is a map of {tasks} items: its jobs are {run}.0 to {run}.{tasks - 1}"
        )
    return JobFuture(name, folder, int(task))


def _summary(error: BaseException) -> str:
    cause = getattr(error, "cause", error)
    return f"{type(cause).__name__}: {cause}"


def _text(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""
