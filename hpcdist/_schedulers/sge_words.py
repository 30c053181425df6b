"""What Grid Engine's commands print, and what its words mean: tables, and pure functions from text.

Sources, unless a table says otherwise: the manual pages of Son of Grid Engine 8.1.9, and what it
printed on a cluster of our own. Its XML is read by pieces, so that one odd job spoils no other.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from datetime import datetime

from hpcdist._numbers import whole
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.verdict import JobState, Verdict

# qsub(1), with those that Univa's has besides. Any other keyword is a resource: `-l name=value`.
_OPTIONS = """
a ac adds ar A b bgio binding c ckpt clear cwd C dc display dl e h hard hold_jid hold_jid_ad i j jc
js jsv l m M masterl masterq mbind mods N notify now o ot P p par pe q R r rdi rou S sc shell si
soft sync t tc tcon terse u umask v verify V w wd xd xdv
"""
OPTIONS = frozenset(_OPTIONS.split())
# Options that take yes or no; bare they would be none.
YES_OR_NO = frozenset({"b", "bgio", "j", "now", "par", "R", "r", "shell", "sync"})

# sge_status(5), "failed".
_LIMIT, _SIGNALLED = 37, 100

_TERSE = re.compile(r"^(\d+)(?:\.\d+-\d+:\d+)?[ \t]*$", re.MULTILINE)
_FOR_PEOPLE = re.compile(r"^Your job(?:-array)? (\d+)[ .]", re.MULTILINE)
_FIELD = re.compile(r"<(\w+)(?: [^>]*)?>([^<]*)</\1>")
_ERROR_HEAD = re.compile(r"^[\d/]+ [\d:.]+ \[\d+:\d+\]: (?:error: )?")
_SECONDS = (1, 60, 3600, 86400)
_LATER = 5


def state_of(word: str) -> JobState:
    """Return the state behind the letters of qstat(1): what hinders a job comes first.

    >>> state_of("qw"), state_of("hqw"), state_of("Eqw")
    (<JobState.QUEUED: 'QUEUED'>, <JobState.HELD: 'HELD'>, <JobState.HELD: 'HELD'>)
    >>> state_of("dr"), state_of("tS"), state_of("pondering")
    (<JobState.RUNNING: 'RUNNING'>, <JobState.PAUSED: 'PAUSED'>, <JobState.UNKNOWN: 'UNKNOWN'>)
    """
    if not re.fullmatch("[acdhqrstuwzERST]+", word):
        return JobState.UNKNOWN
    if set("Eh") & set(word) and set("qw") & set(word):
        return JobState.HELD
    if set("sST") & set(word):
        return JobState.PAUSED
    if set("qw") & set(word):
        return JobState.QUEUED
    return JobState.RUNNING if set("rtR") & set(word) else JobState.UNKNOWN


def in_error(word: str) -> bool:
    """Tell whether a job could not be started, and waits until somebody clears its error."""
    return word.startswith("E")


def parse_submit(out: str, err: str = "") -> JobId:
    """Read the id in what `qsub -terse` printed, among whatever a site adds.

    Raises:
        ValueError: There is none; both streams are in the message.

    >>> parse_submit("Welcome!\\n1234\\n"), parse_submit('Your job 7 ("a") has been submitted')
    (JobId('1234'), JobId('7'))
    >>> parse_submit("9.1-3:1\\n")
    JobId('9')
    """
    for pattern in (_TERSE, _FOR_PEOPLE):
        matches = pattern.findall(out)
        if matches:
            return JobId(matches[-1])
    raise ValueError(
        f"qsub printed no job id. On its output: {out.strip()!r}. On its errors: {err.strip()!r}"
    )


def parse_qstat(text: str) -> dict[str, Verdict]:
    """Read `qstat -xml -g d`: the jobs that have not ended; "9.2" is a task of a job array."""
    found: dict[str, Verdict] = {}
    for piece in re.findall(r"<job_list\b.*?</job_list>", text, re.DOTALL):
        fields = _fields(piece)
        ident, word = fields.get("JB_job_number", ""), fields.get("state", "")
        if whole(ident) is None or not word:
            continue
        task = fields.get("tasks", "")
        ident += f".{task}" if whole(task) is not None else ""
        found[ident] = Verdict(
            state=state_of(word),
            word={"r": "RUNNING", "qw": "PENDING"}.get(word, word),
            start=_iso(fields.get("JAT_start_time", "")),
            nodes=fields.get("queue_name", ""),
            source="qstat",
        )
    return found


def parse_reasons(text: str) -> dict[str, str]:
    """Read `qstat -xml -j`: why jobs wait, or why they could not be started."""
    found: dict[str, str] = {}
    for piece in re.findall(r"<JB_job_number>.*?</JB_ja_structure>", text, re.DOTALL):
        messages = re.findall(r"<QIM_message>([^<]*)</QIM_message>", piece)
        if messages:
            head = re.match(r"<JB_job_number>(\d+)<", piece)
            found[head[1] if head else ""] = _ERROR_HEAD.sub("", html.unescape(messages[-1]))
    for piece in re.findall(r"<MES_job_number_list>.*?</MES_message>", text, re.DOTALL):
        message = html.unescape(piece.partition("<MES_message>")[2].partition("<")[0])
        for ident in re.findall(r"<ULNG_value>(\d+)</ULNG_value>", piece):
            if ident not in found or "cannot run" in message:
                found.setdefault(ident, message)
    return found


def parse_script(text: str, script: str) -> JobId | None:
    """Read `qstat -xml -j`: the job that runs a script."""
    for piece in re.findall(r"<JB_job_number>.*?</JB_script_file>", text, re.DOTALL):
        fields = _fields(piece)
        if fields.get("JB_script_file") == script:
            return JobId(fields.get("JB_job_number", ""))
    return None


def parse_qacct(text: str) -> dict[str, Verdict]:
    """Read `qacct -j`: a record for each task of a parallel job, and the job's own at the end."""
    found: dict[str, Verdict] = {}
    for record in re.split(r"^=+$", text, flags=re.MULTILINE):
        fields = dict(re.findall(r"^(\w+)[ \t]+(.*?)[ \t]*$", record, re.MULTILINE))
        failed, status = _first(fields, "failed"), _first(fields, "exit_status")
        task = fields.get("pe_taskid", "NONE") != "NONE"  # newer versions tell
        ident = fields.get("jobnumber", "")
        if failed is None or status is None or task or whole(ident) is None:
            continue
        number = fields.get("taskid", "")  # of a job array
        ident += f".{number}" if whole(number) is not None else ""
        found[ident] = _ended(fields, failed, status)
    return found


def _first(fields: dict[str, str], name: str) -> int | None:
    """Return the number with which a field begins."""
    match = re.match("[0-9]+", fields.get(name, ""))
    return whole(match[0]) if match else None


def _ended(fields: dict[str, str], failed: int, status: int) -> Verdict:
    state, word = JobState.FAILED, "FAILED"
    deleted = fields.get("deleted_by", "NONE")  # newer versions
    if failed == 0 and status == 0:
        state, word = JobState.DONE, "COMPLETED"
        # It may be a task's, whose records come up to 15 s before the job's: the script knows more.
        if fields.get("granted_pe", "NONE") != "NONE" and "pe_taskid" not in fields:
            state, word = JobState.UNKNOWN, "ended"
    elif failed == _SIGNALLED and deleted not in ("NONE", ""):
        state, word = JobState.CANCELLED, f"CANCELLED by {deleted}"
    elif failed in (_LIMIT, _SIGNALLED) and _out_of_time(fields):
        state, word = JobState.TIMEOUT, "TIMEOUT"
    return Verdict(
        state=state,
        word=word,
        reason=fields["failed"].partition(":")[2].strip(),
        start=_ctime(fields.get("start_time", "")),
        end=_ctime(fields.get("end_time", "")),
        nodes=fields.get("hostname", ""),
        exit_code=status,
        signal=status - 128 if failed and 128 < status < 192 else None,
        source="qacct",
    )


def _out_of_time(fields: dict[str, str]) -> bool:
    """Tell whether a job, or a task that began a little later, ran as long as it may."""
    limit = re.search(r"\b[hs]_rt=([\d:]+)", fields.get("category", ""))
    ran = _first(fields, "ru_wallclock")
    if limit is None or ran is None:
        return False
    parts = [whole(part) or 0 for part in reversed(limit[1].split(":"))]
    asked = sum(part * scale for part, scale in zip(parts, _SECONDS, strict=False))
    return ran >= asked - (_LATER if asked > 2 * _LATER else 0)


def parse_environments(text: str) -> list[str]:
    """Read `qconf -spl`: the names of the parallel environments.

    >>> parse_environments("mpi\\nsmp 8\\n"), parse_environments("no parallel environment defined")
    (['mpi'], [])
    """
    return [line.strip() for line in text.splitlines() if re.fullmatch(r"[\w.-]+", line.strip())]


def expand(path: str, job: JobId | None, name: str, user: str) -> str | None:
    """Return the file behind a path of `-o`; None where only Grid Engine knows.

    >>> expand("out/$JOB_NAME.$JOB_ID", JobId("7"), "run", "me"), expand("$HOSTNAME", None, "", "")
    ('out/run.7', None)
    """
    known = {"JOB_ID": job or "", "JOB_NAME": name, "USER": user, "TASK_ID": "undefined"}
    wanted = re.findall(r"\$(\w+)", path)
    if not all(known.get(variable) for variable in wanted):
        return None
    return re.sub(r"\$(\w+)", lambda match: known[match[1]], path.lstrip(":"))


def _fields(piece: str) -> dict[str, str]:
    return dict(_pairs(piece))


def _pairs(piece: str) -> Iterator[tuple[str, str]]:
    for name, value in _FIELD.findall(piece):
        yield name, html.unescape(value).strip()


def _iso(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        return None


def _ctime(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%a %b %d %H:%M:%S %Y").astimezone()
    except (ValueError, OverflowError):  # "-/-"
        return None
