"""Handing a script in, once, whatever becomes of the answer."""

from __future__ import annotations

from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._schedulers.job import JobId, JobSpec
from hpcdist._schedulers.scheduler import Scheduler


def submit(scheduler: Scheduler, spec: JobSpec, script: str, log: str | None) -> JobId:
    """Submit a script; where the answer gets lost, look for the job before giving up.

    Raises:
        SubmitError: In the scheduler's words.
    """
    try:
        return scheduler.hand_in(spec, script, log)
    except (CommandLate, ValueError) as exc:
        try:
            found = scheduler.find(spec, script, log)
        except (CommandFailed, CommandLate, CommandMissing) as then:
            raise SubmitError(f"{exc}; and then: {then}") from exc
        if found is None:
            raise SubmitError(f"{exc}; no job of {script} is listed") from exc
        return found
    except CommandMissing as exc:
        raise SubmitError(str(exc)) from exc
