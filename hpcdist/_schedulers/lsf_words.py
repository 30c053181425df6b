"""What LSF's commands print, and what its words mean: tables, and pure functions from text.

Source: the reference of IBM Spectrum LSF 10.1. Nothing here has met a real LSF.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from hpcdist._numbers import whole
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.verdict import JobState, Verdict

# bjobs: what is asked for. The reason of waiting is free text, and so comes last.
FIELDS = (
    *("jobid", "stat", "exit_code", "start_time", "finish_time", "exec_host", "exit_reason"),
    "pend_reason",
)
# bjobs, "Job status".
_STATES = {
    "PEND": JobState.QUEUED,
    "PROV": JobState.QUEUED,
    "WAIT": JobState.QUEUED,
    "PSUSP": JobState.HELD,
    "RUN": JobState.RUNNING,
    "USUSP": JobState.PAUSED,
    "SSUSP": JobState.PAUSED,
    "UNKWN": JobState.UNKNOWN,
    "ZOMBI": JobState.UNKNOWN,
    "DONE": JobState.DONE,
    "PDONE": JobState.DONE,
    "EXIT": JobState.FAILED,
    "PERR": JobState.FAILED,
}
# bacct, "Termination reasons". The rest are failures.
_ENDS = {
    "TERM_RUNLIMIT": JobState.TIMEOUT,
    "TERM_CPULIMIT": JobState.TIMEOUT,
    "TERM_DEADLINE": JobState.TIMEOUT,
    "TERM_OWNER": JobState.CANCELLED,
    "TERM_FORCE_OWNER": JobState.CANCELLED,
    "TERM_ADMIN": JobState.CANCELLED,
    "TERM_FORCE_ADMIN": JobState.CANCELLED,
}
# Words that are shown as everybody's.
_WORDS = {"PEND": "PENDING", "RUN": "RUNNING"}
_SUBMITTED = re.compile(r"^Job <(\d+)> is submitted to ", re.MULTILINE)
_NOT_THERE = re.compile(r"(is not found|No (matching|unfinished )?\s*job found)")
_TIMES = ("%b %d %H:%M", "%b %d %H:%M:%S", "%b %d %H:%M:%S %Y", "%b %d %H:%M %Y")


def state_of(word: str, reason: str = "") -> JobState:
    """Return the state behind a word of LSF's, and the reason that it gives for an end.

    >>> state_of("PEND"), state_of("EXIT", "TERM_RUNLIMIT: job killed after ...")
    (<JobState.QUEUED: 'QUEUED'>, <JobState.TIMEOUT: 'TIMEOUT'>)
    """
    state = _STATES.get(word, JobState.UNKNOWN)
    # A script that gets a signal to end may still end well.
    return _ENDS.get(term_of(reason), state) if state.terminal else state


def term_of(reason: str) -> str:
    """Return the name of a reason for a job's end, if it has one.

    >>> term_of("TERM_MEMLIMIT: job killed after reaching LSF memory usage limit")
    'TERM_MEMLIMIT'
    """
    match = re.match(r"TERM_\w+", reason)
    return match[0] if match else ""


def not_there(text: str) -> bool:
    """Tell whether a command says no more than that there is no such job."""
    return _NOT_THERE.search(text) is not None


def parse_submit(out: str, err: str = "") -> JobId:
    """Read the id in what bsub printed, among whatever a site adds.

    Raises:
        ValueError: There is none; both streams are in the message.

    >>> parse_submit("Memory is in MB\\nJob <123> is submitted to default queue <normal>.\\n")
    JobId('123')
    """
    matches = _SUBMITTED.findall(out)
    if matches:
        return JobId(matches[-1])
    raise ValueError(
        f"bsub printed no job id. On its output: {out.strip()!r}. On its errors: {err.strip()!r}"
    )


def parse_records(text: str) -> list[dict[str, str]] | None:
    """Read `bjobs -json`, among what a site prints before it; None: that is none."""
    start = text.find("{")
    try:
        told, _ = json.JSONDecoder().raw_decode(text, max(start, 0))
    except (ValueError, RecursionError):
        return None
    records: Any = told.get("RECORDS") if isinstance(told, dict) else None
    if not isinstance(records, list):
        return None
    rows = [row for row in records if isinstance(row, dict)]
    return [{str(name).lower(): _text(row[name]) for name in row} for row in rows]


def _text(value: object) -> str:
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    return "" if text == "-" else text


def parse_lines(text: str, fields: Iterable[str] = FIELDS) -> list[dict[str, str]]:
    """Read `bjobs -noheader -o "… delimiter='|'"`, for versions that have no JSON."""
    names = list(fields)
    rows = [line.split("|", len(names) - 1) for line in text.splitlines()]
    return [
        dict(zip(names, map(_text, row), strict=True)) for row in rows if len(row) == len(names)
    ]


def verdicts(records: Iterable[dict[str, str]], now: datetime) -> dict[str, Verdict]:
    """Return what records say of jobs; those that are errors say nothing."""
    found = {}
    for record in records:
        ident, word = record.get("jobid", ""), record.get("stat", "")
        if whole(ident) is None or not word:
            continue
        reason = record.get("exit_reason", "")
        state = state_of(word, reason)
        status = whole(record.get("exit_code"))
        if status is None and state is JobState.DONE:
            status = 0
        found[ident] = Verdict(
            state=state,
            word=_word(word, state, reason),
            reason=record.get("pend_reason", "") if state.waiting else _plain(reason),
            start=when(record.get("start_time", ""), now),
            end=when(record.get("finish_time", ""), now) if state.terminal else None,
            nodes=record.get("exec_host", ""),
            exit_code=status,
            signal=status - 128 if status is not None and 128 < status < 192 else None,
            source="bjobs",
        )
    return found


def _word(word: str, state: JobState, reason: str) -> str:
    return term_of(reason) if state.terminal and term_of(reason) else _WORDS.get(word, word)


def _plain(reason: str) -> str:
    """Return what stands behind the name of a reason.

    >>> _plain("TERM_OWNER: job killed by owner")
    'job killed by owner'
    """
    return re.sub(r"^TERM_\w+:\s*", "", reason).rstrip(".")


def parse_script(records: Iterable[dict[str, str]], script: str) -> JobId | None:
    """Find the job whose description is the path of a script."""
    for record in records:
        ident = record.get("jobid", "")
        if record.get("job_description") == script and whole(ident) is not None:
            return JobId(ident)
    return None


def when(text: str, now: datetime) -> datetime | None:
    """Read a time, which mostly names no year: then it is the one that is nearest to now.

    >>> now = datetime(2026, 1, 1, 0, 10).astimezone()
    >>> print(when("Dec 31 23:50 L", now).date())
    2025-12-31
    """
    words = re.sub(r"\s+[LXE]$", "", text.strip())  # how a limit was come by
    for form in _TIMES:
        years = [""] if "%Y" in form else [f" {now.year + change}" for change in (0, -1, 1)]
        read = [_time(words + year, form if not year else f"{form} %Y") for year in years]
        known = [time for time in read if time is not None]
        if known:
            return min(known, key=lambda time: abs(time - now))
    return None


def _time(text: str, form: str) -> datetime | None:
    try:
        return datetime.strptime(text, form).astimezone()
    except (ValueError, OverflowError):
        return None
