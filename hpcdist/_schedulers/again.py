"""Programs that are submitted again after their time was up, or they were preempted: `--resubmit`.

The job's own script does so as it ends, where its host may submit; and, for a script that was
killed before it could, whoever next asks for the job. A file in the run's folder lets one of them
do it.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from hpcdist import _version
from hpcdist._schedulers import job
from hpcdist._schedulers.job import JobId, JobSpec, read_manifest, write_script
from hpcdist._schedulers.render import render
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.submission import submit
from hpcdist._schedulers.verdict import JobState, Verdict

_SPEC = "spec"
_CLOSING = 60.0  # seconds in which the script of a job that has ended may still be at work
_SUBMISSION = 180.0  # and in which one that submits has done so


def keep_spec(folder: str, spec: JobSpec) -> None:
    """Keep what a job is, so that it can be submitted again as it was."""
    with open(os.path.join(folder, _SPEC), "wb") as file:
        pickle.dump((_version.VERSION, spec), file)


def tries(facts: Mapping[str, Any]) -> tuple[int, int]:
    """Return how often a run has been submitted, and how often it may be.

    >>> tries({"jobs": [["3", None]], "earlier": [["1", None], ["2", None]], "resubmit": 5})
    (3, 6)
    """
    return 1 + len(facts.get("earlier", ())), 1 + int(facts.get("resubmit", 0))


def is_due(facts: Mapping[str, Any], verdict: Verdict | None) -> bool:
    """Tell whether a job's end is one after which it is submitted again, and may be."""
    done, most = tries(facts)
    if verdict is None or done >= most:
        return False
    return verdict.state is JobState.TIMEOUT or verdict.word.startswith("PREEMPTED")


class Succession(NamedTuple):
    """What comes after a job.

    Attributes:
        job: The job that its run is now; None: there is no other yet.
        awaited: Whether there may soon be one.
    """

    job: JobId | None
    awaited: bool


def succeed(
    scheduler: Scheduler, folder: str, number: JobId, verdict: Verdict | None
) -> Succession:
    """See what comes after a job; if it has ended, and that is due, submit it again.

    Args:
        folder: The run's.
        verdict: What is known of the job.

    Raises:
        SubmitError: In the scheduler's words.
        ValueError: Another version of hpcdist has made the run.
    """
    facts = read_manifest(folder)
    last = facts["jobs"][-1] if facts.get("jobs") else number
    if last != number:
        return Succession(last, False)
    if facts.get("array") or verdict is None:
        return Succession(None, False)
    if not is_due(facts, verdict):
        done, most = tries(facts)
        return Succession(None, done < most and _is_unexplained(verdict))
    if not _is_closed(folder, verdict):
        return Succession(None, True)
    made = submit_again(scheduler, facts)
    return Succession(made, made is None and _is_at_work(_guard(facts)))


def _is_closed(folder: str, verdict: Verdict) -> bool:
    """Tell whether the script of a job that has ended does nothing any more."""
    if os.path.exists(os.path.join(folder, "exit")) or verdict.end is None:
        return True
    return time.time() - verdict.end.timestamp() > _CLOSING


def _is_unexplained(verdict: Verdict) -> bool:
    """Tell whether a script has just been told to end, and its scheduler has not yet said why."""
    told = verdict.source == "exit file" and verdict.signal is not None
    return told and verdict.end is not None and time.time() - verdict.end.timestamp() < _CLOSING


def _guard(facts: Mapping[str, Any]) -> str:
    """Return the file that says that the next try is being submitted."""
    return os.path.join(str(facts["folder"]), f"again-{tries(facts)[0]}")


def _is_at_work(guard: str) -> bool:
    try:
        return time.time() - os.stat(guard).st_mtime < _SUBMISSION
    except OSError:
        return False


def submit_again(scheduler: Scheduler, facts: Mapping[str, Any]) -> JobId | None:
    """Submit a job again; None: somebody else does.

    Args:
        facts: What the manifest of its run says.

    Raises:
        SubmitError: In the scheduler's words.
        ValueError: Another version of hpcdist has made the run.
    """
    folder, guard = str(facts["folder"]), _guard(facts)
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return None
    with open(os.path.join(folder, _SPEC), "rb") as file:
        version, spec = pickle.load(file)
    if version != _version.VERSION:
        raise ValueError(f"hpcdist {version} has made {folder}, and this is {_version.VERSION}")
    script = write_script(folder, render(spec), os.path.basename(guard) + ".sh")
    if os.path.exists(ended := os.path.join(folder, "exit")):
        os.unlink(ended)
    made = submit(scheduler, spec, script, os.path.join(folder, "commands.jsonl"))
    earlier = [[each, each.cluster] for each in facts["jobs"]]
    logs = [*facts.get("logs", ()), *scheduler.log_files(spec.options, spec.cwd, folder, made)]
    changed = {
        "jobs": [[made, made.cluster]],
        "earlier": [*facts.get("earlier", ()), *earlier],
        "logs": list(dict.fromkeys(logs)),
    }
    job.write_manifest(folder, {**facts, **changed})
    return made
