"""What Slurm's commands print, and what its words mean: tables, and pure functions from text.

Sources, unless a table says otherwise: the manual pages of Slurm 22.05 and 24.11, and what both
versions printed on a cluster of our own.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator
from datetime import datetime

from hpcdist._numbers import whole
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.verdict import JobState, Verdict

# `srun --label`: "3: text", the numbers padded to the width of the last.
LABEL = "^ *([0-9]{1,9}): ?"
# srun's own words on its tasks (src/srun/libsrun, 22.05 and 24.11):
# "srun: error: n1: task 3: Killed", "srun: error: n1: tasks 0-2,5: Exited with exit code 7".
ENDS = r"^srun: error: \S+: tasks? ([0-9,-]+): (.+)$"

# sbatch(1): short options and the long ones they stand for.
_SHORT = """
A=account a=array B=extra_node_info b=begin C=constraint c=cpus_per_task D=chdir d=dependency
e=error F=nodefile G=gpus H=hold i=input J=job_name k=no_kill L=licenses M=clusters cluster=clusters
m=distribution N=nodes n=ntasks O=overcommit o=output p=partition Q=quiet q=qos s=oversubscribe
S=core_spec t=time W=wait w=nodelist x=exclude
"""
ALIASES = dict(pair.split("=") for pair in _SHORT.split())

# squeue(1), "JOB STATE CODES", with the flags that are shown instead of a state; compact codes too.
STATES = {
    JobState.QUEUED: (
        "PENDING PD CONFIGURING CF REQUEUED RQ REQUEUE_FED RF POWER_UP_NODE EXPEDITING"
    ),
    JobState.HELD: "REQUEUE_HOLD RH RESV_DEL_HOLD RD SPECIAL_EXIT SE",
    JobState.RUNNING: "RUNNING R COMPLETING CG RESIZING RS SIGNALING SI STAGE_OUT SO UPDATE_DB",
    JobState.PAUSED: "SUSPENDED S STOPPED ST",
    JobState.PREEMPTED: "PREEMPTED PR",
    JobState.DONE: "COMPLETED CD",
    JobState.TIMEOUT: "TIMEOUT TO DEADLINE DL",
    JobState.FAILED: (
        "FAILED F NODE_FAIL NF BOOT_FAIL BF OUT_OF_MEMORY OOM LAUNCH_FAILED RECONFIG_FAIL"
    ),
    JobState.CANCELLED: "CANCELLED CA REVOKED RV",
}
_STATE_OF = {word: state for state, words in STATES.items() for word in words.split()}
# Reasons for which a job waits for ever, unless somebody changes the job or the limits:
# squeue(1), "JOB REASON CODES", and job_reason_string() in src/common/slurm_protocol_defs.c.
HOPELESS = frozenset(
    {
        *("PartitionTimeLimit", "PartitionNodeLimit", "PartitionConfig", "BadConstraints"),
        *("InvalidAccount", "InvalidQOS", "AccountNotAllowed", "QOSNotAllowed"),
        *("AssociationTimeLimit", "QOSTimeLimit", "MaxMemPerLimit", "DeadLine"),
        *("QOSMinCpuNotSatisfied", "QOSMinMemory", "QOSMinNode", "QOSMinGRES", "QOSMinBilling"),
        *("DependencyNeverSatisfied", "JobHeldAdmin", "JobHoldMaxRequeue", "ReservationDeleted"),
    }
)
# What a single job asks for and may not have; PerUser and PerAccount limits wait for other jobs.
_HOPELESS_LIMIT = re.compile(r"(QOS|Assoc)Max\w+Per(Job|Node)(Limit)?")
_HELD = frozenset({"JobHeldUser", "JobHeldAdmin", "JobHoldMaxRequeue"})


# ExitCode of a job whose script never ran: "0:53", seen with 22.05 and no other sign than this.
_NO_OUTPUT_FILE, _NO_OUTPUT = 53, "its output file could not be opened"
_ONE_JOB = re.compile(r"\d+(_\d+)?")
_PARSABLE = re.compile(r"^(\d+)(?:;([\w.-]+))?[ \t]*$", re.MULTILINE)
_FOR_PEOPLE = re.compile(r"^Submitted batch job (\d+)(?: on cluster (\S+))?", re.MULTILINE)


def state_of(word: str) -> JobState:
    """Return the state behind a word of Slurm's.

    >>> state_of("CANCELLED by 20001"), state_of("OUT_OF_ME+"), state_of("PONDERING")
    (<JobState.CANCELLED: 'CANCELLED'>, <JobState.FAILED: 'FAILED'>, <JobState.UNKNOWN: 'UNKNOWN'>)
    """
    first = word.split()[0] if word.split() else ""
    if first.endswith("+"):  # cut off in a column
        first = next((known for known in _STATE_OF if known.startswith(first[:-1])), first)
    return _STATE_OF.get(first, JobState.UNKNOWN)


def parse_array_limit(text: str) -> int | None:
    """Read `scontrol show config`: how many tasks a job array may have; 1: there are no arrays.

    >>> parse_array_limit("MaxArraySize            = 1001\\nMaxBatchRequeue         = 5\\n")
    1001
    >>> parse_array_limit("MaxArraySize = 0"), parse_array_limit("scontrol: error")
    (1, None)
    """
    size = re.search(r"\bMaxArraySize\s*=\s*([0-9]{1,9})\s*$", text, re.MULTILINE)
    # SchedulerParameters may say less: "max_array_tasks=500".
    fewer = re.search(r"\bmax_array_tasks=([0-9]{1,9})", text)
    if size is None:
        return None
    allowed = int(size[1])
    return max(1, min(allowed, int(fewer[1])) if fewer else allowed)


def never_starts(reason: str) -> bool:
    """Tell whether a job waits for ever for this reason.

    >>> never_starts("QOSMaxCpuPerJobLimit"), never_starts("QOSMaxCpuPerUserLimit")
    (True, False)
    """
    # Some versions append details: "ReqNodeNotAvail, UnavailableNodes:n1".
    word = re.split(r"[,\s(]", reason.lstrip("("), maxsplit=1)[0].rstrip(")")
    return word in HOPELESS or _HOPELESS_LIMIT.fullmatch(word) is not None


def has_id(out: str) -> bool:
    """Tell whether sbatch has said the job's id, whatever it may still have to say."""
    complete = out.rpartition("\n")[0]
    return bool(_PARSABLE.search(complete) or _FOR_PEOPLE.search(complete))


def parse_submit(out: str, err: str = "") -> JobId:
    """Read the id in what sbatch printed, among whatever a site's wrapper adds.

    Raises:
        ValueError: There is none; both streams are in the message.

    >>> parse_submit("Welcome! 30 days left\\n1234;big\\n")
    JobId('1234', 'big')
    """
    for pattern in (_PARSABLE, _FOR_PEOPLE):
        matches = pattern.findall(out)
        if matches:
            number, cluster = matches[-1]
            return JobId(number, cluster.rstrip(".") or None)
    raise ValueError(
        f"sbatch printed no job id. On its output: {out.strip()!r}. On its errors: {err.strip()!r}"
    )


def parse_found(text: str, script: str) -> JobId | None:
    """Read `squeue -o "%F|%o"`, with headlines that name clusters: the job that runs a script."""
    cluster = None
    for line in text.splitlines():
        if line.startswith("CLUSTER: "):
            cluster = line.removeprefix("CLUSTER: ").strip()
        number, _, command = line.partition("|")
        if command.strip() == script and whole(number) is not None:
            return JobId(number, cluster)
    return None


def parse_squeue(text: str) -> dict[str, Verdict]:
    """Read `squeue -r -o "%i|%T|%S|%e|%N|%r"`; lines that are something else are passed over."""
    found = {}
    for ident, word, start, end, nodes, reason in _rows(text, 6):
        state = state_of(word)
        if state is JobState.QUEUED and reason.strip("()") in _HELD:
            state = JobState.HELD
        found[ident] = Verdict(
            state=state,
            word=word,
            reason="" if reason == "None" else reason,
            start=_time(start),
            end=_time(end),
            nodes=nodes,
            source="squeue",
        )
    return found


def parse_sacct(text: str) -> dict[str, Verdict]:
    """Read `sacct -X -n -P -o JobID,State,ExitCode,Start,End,NodeList`."""
    found = {}
    for ident, word, code, start, end, nodes in _rows(text, 6):
        exit_code, signal = _exit(code)
        lost = signal == _NO_OUTPUT_FILE
        found[ident] = Verdict(
            state=state_of(word),
            word=word,
            reason=_NO_OUTPUT if lost else "",
            start=_time(start),
            end=_time(end),
            nodes="" if nodes == "None assigned" else nodes,
            exit_code=exit_code,
            signal=None if lost else signal,
            source="sacct",
        )
    return found


def parse_scontrol(text: str) -> dict[str, Verdict]:
    """Read `scontrol show job`: records, divided by empty lines."""
    found = {}
    for record in re.split(r"\n\s*\n", text):
        ident = _field(record, r"^JobId=(\d+)")
        word = _field(record, r"^\s+JobState=(\S+)")
        if ident is None or word is None:
            continue
        array = re.search(r"^JobId=\d+ ArrayJobId=(\d+) ArrayTaskId=(\d+) ", record, re.MULTILINE)
        reason = _field(record, r"^\s+JobState=\S+ Reason=(.*?)(?: Dependency=|$)") or ""
        exit_code, signal = _exit(_field(record, r"\bExitCode=(\d+:\d+)") or "")
        if signal == _NO_OUTPUT_FILE:
            reason, signal = _NO_OUTPUT, None
        nodes = _field(record, r"^\s+NodeList=(\S+)") or ""
        found[f"{array[1]}_{array[2]}" if array else ident] = Verdict(
            state=state_of(word),
            word=word,
            reason="" if reason == "None" else reason,
            start=_time(_field(record, r"\bStartTime=(\S+)") or ""),
            end=_time(_field(record, r"\bEndTime=(\S+)") or ""),
            nodes="" if nodes == "(null)" else nodes,
            exit_code=exit_code,
            signal=signal,
            source="scontrol",
        )
    return found


def parse_mpi_list(text: str) -> frozenset[str]:
    """Read `srun --mpi=list`, in the layouts of several versions.

    >>> sorted(parse_mpi_list("MPI plugin types are...\\n\\tpmix\\n\\tnone\\n\\tpmi2\\n"))
    ['none', 'pmi2', 'pmix']
    """
    words = re.findall(
        r"^(?:srun: )?(?:MPI types are\.\.\.)?[ \t]*([a-z]\w*)[ \t]*$", text, re.MULTILINE
    )
    also = re.findall(r"\b(pmix_v\d+)\b", text)
    return frozenset([*words, *also])


def expand(pattern: str, job: JobId | None, name: str) -> str | None:
    """Return the file behind a pattern of `--output`; None where only Slurm knows.

    >>> expand("out/%x-%j.txt", JobId("7"), "run"), expand("%N.txt", JobId("7"), "run")
    ('out/run-7.txt', None)
    """
    if "\\" in pattern:  # sbatch(1), "filename pattern": nothing is replaced then
        return pattern.replace("\\", "")
    master, _, task = (job or "").partition("_")
    known = {"%": "%", "x": name, "u": getpass.getuser()}
    known |= {"A": master, "j": "" if task else master, "a": task}
    asked = re.findall(r"%(\d*)(.)", pattern)
    if not all(known.get(letter) for _, letter in asked):
        return None
    # sbatch(1): zeros are put in front up to a width of 10.
    return re.sub(
        r"%(\d*)(.)", lambda m: known[m[2]].rjust(min(whole(m[1]) or 0, 10), "0"), pattern
    )


def _rows(text: str, columns: int) -> Iterator[list[str]]:
    for line in text.splitlines():
        row = [field.strip() for field in line.split("|", columns - 1)]
        if len(row) == columns and _ONE_JOB.fullmatch(row[0]):
            yield row


def _field(record: str, pattern: str) -> str | None:
    match = re.search(pattern, record, re.MULTILINE)
    return match[1] if match else None


def _exit(text: str) -> tuple[int | None, int | None]:
    """Read "code:signal"."""
    before, _, after = text.partition(":")
    code, signal = whole(before), whole(after)
    return (None, None) if code is None or signal is None else (code, signal or None)


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):  # "N/A", "Unknown", "None"; a year that is none here
        return None
