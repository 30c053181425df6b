"""What PBS's commands print, and what its words mean: tables, and pure functions from text.

Sources, unless a table says otherwise: the manual pages and sources of OpenPBS 23.06, and what a
real one of two hosts printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from hpcdist._numbers import signed, whole
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.verdict import JobState, Verdict
from hpcdist._schedulers.walltime import clock_seconds

# qstat(1B), "job_state", and the word by which every manager calls such a state.
STATES = {
    "Q": (JobState.QUEUED, "PENDING"),
    "T": (JobState.QUEUED, "PENDING"),  # being moved
    "W": (JobState.QUEUED, "PENDING"),  # for its time, or its files
    "H": (JobState.HELD, "HELD"),
    "R": (JobState.RUNNING, "RUNNING"),
    "B": (JobState.RUNNING, "RUNNING"),
    "E": (JobState.RUNNING, "EXITING"),
    "S": (JobState.PAUSED, "SUSPENDED"),
    "U": (JobState.PAUSED, "SUSPENDED"),  # by a keyboard's owner
}
# The last part of an error code (15000 + n, modulo 256) is a command's exit status: pbs_error.h.
UNKNOWN_JOB, ENDED_JOB, WRONG_STATE = 153, 35, 168
_TERMINATED = 91  # substate: ended by qdel, be it before it started
# Exit_status of a job that its execution host has ended or could not start: job.h.
_ENDED_BY_PBS = {
    -1: "it could not be started",
    -2: "it could not be started",
    -3: "it could not be started",
    -10: "its user is not known on the execution host",
    -11: "it was to be run again",
    -24: "exceeded resource ncpus",
    -25: "exceeded resource ncpus",
    -26: "exceeded resource vmem",
    -27: "exceeded resource mem",
    -28: "exceeded resource cput",
    -29: "exceeded resource walltime",
    -30: "its output could not be joined",
}
_WALLTIME, _CPUT = -29, -28
_OUT_OF_MEMORY = (-26, -27)
_SIGNALLED = 256  # a shell's 128 + n is the script's own word

_ID = re.compile(r"^(\d+(?:\[\d*\])?(?:\.[\w.-]+)?)[ \t]*$", re.MULTILINE)


def parse_submit(out: str, err: str = "") -> JobId:
    """Read the id in what qsub printed, among whatever a site's wrapper adds.

    Raises:
        ValueError: There is none; both streams are in the message.

    >>> parse_submit("Welcome! 30 days left\\n12.head\\n")
    JobId('12.head')
    """
    found = _ID.findall(out)
    if found:
        return JobId(found[-1])
    raise ValueError(
        f"qsub printed no job id. On its output: {out.strip()!r}. On its errors: {err.strip()!r}"
    )


def has_id(out: str) -> bool:
    """Tell whether qsub has said the job's id, whatever it may still wait for."""
    return _ID.search(out.rpartition("\n")[0]) is not None


def is_torque(text: str) -> bool:
    """Tell from `qstat --version` whether this is Torque, which has other options and answers.

    >>> is_torque("Version: 6.1.2\\nCommit: 661e092\\n"), is_torque("pbs_version = 23.06.06\\n")
    (True, False)
    """
    return re.match(r"\s*Version:\s*\d", text, re.IGNORECASE) is not None


def parse_jobs(text: str) -> dict[str, dict[str, Any]]:
    """Read `qstat -f -F json`: the jobs' attributes by their ids.

    Variables of a job may make it no JSON: a number with leading zeros, a stray escape. Then what
    matters is picked out line by line.
    """
    begin = text.find("{")
    try:
        jobs = json.loads(text[begin:], strict=False)["Jobs"] if begin >= 0 else {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return _picked(text)
    if not isinstance(jobs, dict):
        return {}
    return {ident: facts for ident, facts in jobs.items() if isinstance(facts, dict)}


def _picked(text: str) -> dict[str, dict[str, Any]]:
    """Read what looks like JSON with one attribute a line."""
    found: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    for line in text.splitlines():
        if job := re.match(r'\s*"(\d+(?:\[\d*\])?\.[\w.-]+)"\s*:\s*\{', line):
            facts = found.setdefault(job[1], {})
        elif field := re.match(r'\s*"(\w+)"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)\s*,?\s*$', line):
            facts.setdefault(field[1], re.sub(r"\\(.)", r"\1", field[2].strip('"')))
    for facts in found.values():
        if "start_time" in facts:
            facts["estimated"] = {"start_time": facts.pop("start_time")}
    return found


def verdict_of(facts: Mapping[str, object]) -> Verdict:
    """Return what the attributes of a job say of it."""
    letter = str(facts.get("job_state", ""))
    comment = str(facts.get("comment", "")).strip()
    nodes = ",".join(hosts(str(facts.get("exec_host", ""))))
    if letter in ("F", "X"):
        return _end(facts, nodes)
    state, word = STATES.get(letter, (JobState.UNKNOWN, letter or "UNKNOWN"))
    waits = state.waiting
    start = _time(_estimate(facts) if waits else facts.get("stime"))
    return Verdict(
        state=state,
        word=word,
        reason=comment if waits else "",
        start=start,
        end=None if waits else _limit(facts, start),
        nodes="" if waits else nodes,
        source="qstat",
    )


def _limit(facts: Mapping[str, object], start: datetime | None) -> datetime | None:
    """Return when a running job is to end at the latest."""
    resources = facts.get("Resource_List")
    limit = resources.get("walltime") if isinstance(resources, Mapping) else None
    seconds = None if limit is None else clock_seconds(limit)
    return None if start is None or seconds is None else start + timedelta(seconds=seconds)


def _end(facts: Mapping[str, object], nodes: str) -> Verdict:
    status, substate = _number(facts.get("Exit_status")), _number(facts.get("substate"))
    state, word = JobState.FAILED, "FAILED"
    reason, code, signal = "", status, None
    if substate == _TERMINATED or (status is None and "terminated" in str(facts.get("comment"))):
        state, word = JobState.CANCELLED, "CANCELLED"
    elif status == 0:
        state, word = JobState.DONE, "COMPLETED"
    elif status in (_WALLTIME, _CPUT):
        state, word = JobState.TIMEOUT, "TIMEOUT"
    elif status in _OUT_OF_MEMORY:
        word = "OUT_OF_MEMORY"
    if status is None or status < 0:
        code = None
        reason = _ENDED_BY_PBS.get(status or 0, "" if status is None else f"PBS says {status}")
    elif status > _SIGNALLED:
        code, signal = None, status - _SIGNALLED
    return Verdict(
        state=state,
        word=word,
        reason=reason,
        start=_time(facts.get("stime")),
        end=_time(facts.get("obittime")),
        nodes=nodes,
        exit_code=code,
        signal=signal,
        source="qstat -x",
    )


def never_starts(comment: str) -> bool:
    """Tell whether a job waits for ever: the scheduler's comment says so in so many words.

    >>> never_starts("Can Never Run: Not enough total nodes available")
    True
    >>> never_starts("Not Running: Insufficient amount of resource: ncpus")
    False
    """
    return comment.startswith("Can Never Run")


def parse_found(text: str, script: str) -> JobId | None:
    """Read `qstat -f -F json`: the job that runs a script, or has the name of its folder."""
    name = script.rpartition("/")[0].rpartition("/")[2]
    for ident, facts in parse_jobs(text).items():
        if script in str(facts.get("Submit_arguments", "")) or facts.get("Job_Name") == name:
            return JobId(ident)
    return None


def only_about_jobs(err: str) -> bool:
    """Tell whether all complaints of a command are about jobs that are not there any more.

    >>> only_about_jobs("qstat: Unknown Job Id 9.head\\nqstat: 1.head Job has finished, use -x\\n")
    True
    >>> only_about_jobs("pbs_iff: error returned: 15031\\nqstat: cannot connect to server head")
    False
    """
    gone = ("Unknown Job Id", "Job has finished", "invalid for state of job")
    lines = [line for line in err.splitlines() if line.strip()]
    return bool(lines) and all(any(word in line for word in gone) for line in lines)


def without_history(err: str) -> bool:
    """Tell whether a server answers that it remembers no jobs that have ended.

    >>> without_history("qstat: PBS is not configured to maintain job history 7.head")
    True
    """
    return "maintain job history" in err


def hosts(exec_host: str) -> list[str]:
    """Return the hosts of a job, each once.

    >>> hosts("n1/0*4+n2/0*4+n2/1"), hosts("")
    (['n1', 'n2'], [])
    """
    names = (part.partition("/")[0].strip("()") for part in exec_host.split("+"))
    return list(dict.fromkeys(name for name in names if name))


def chunks(select: str) -> list[tuple[int, dict[str, str]]]:
    """Read what `select=` asks for: how many chunks of each kind.

    >>> chunks("2:ncpus=4:mpiprocs=4+mem=1gb")
    [(2, {'ncpus': '4', 'mpiprocs': '4'}), (1, {'mem': '1gb'})]
    """
    found: list[tuple[int, dict[str, str]]] = []
    for part in select.split("+"):
        first, *rest = part.split(":")
        count = whole(first)
        words = [first, *rest] if count is None else rest
        pairs = (word.partition("=") for word in words)
        found.append((1 if count is None else count, {name: value for name, _, value in pairs}))
    return found


def _estimate(facts: Mapping[str, object]) -> object:
    estimated = facts.get("estimated")
    return estimated.get("start_time") if isinstance(estimated, dict) else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else signed(str(value))


def _time(value: object) -> datetime | None:
    """Read seconds since the epoch, or the text of ctime(3)."""
    try:
        seconds = value if isinstance(value, int) else whole(str(value))
        if seconds is not None:
            return datetime.fromtimestamp(seconds).astimezone()
        return datetime.strptime(str(value), "%a %b %d %H:%M:%S %Y").astimezone()
    except (ValueError, OverflowError, OSError):
        return None
