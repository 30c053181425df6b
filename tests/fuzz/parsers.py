"""Parsers of what others print: schedulers, launchers, MPI libraries, ranks, users."""

from collections.abc import Callable, Iterator
from datetime import datetime

from hpcdist import _numbers
from hpcdist._cli import job_options, machines
from hpcdist._cli.checks import library
from hpcdist._keeper import aborts, installed_mpi, launcher_output, pmi, processes
from hpcdist._keeper.pmi import PmiServer
from hpcdist._managers import ssh_machines
from hpcdist._schedulers import (
    lsf_checks,
    lsf_words,
    pbs_checks,
    pbs_words,
    sge_words,
    slurm_checks,
    slurm_words,
)
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.launchers import HYDRA_LABEL, PRTE_LABEL
from hpcdist._transport import network
from tests.fuzz.target import Errors, Target

NOW = datetime(2026, 2, 28, 23, 59).astimezone()
LONG = "9" * 5000
LABELS = (slurm_words.LABEL, HYDRA_LABEL, PRTE_LABEL, "^(.*): ")  # the last: somebody's own


def lsf(text: str) -> object:
    return [
        lsf_words.verdicts(lsf_words.parse_records(text) or [], NOW),
        lsf_words.verdicts(lsf_words.parse_lines(text), NOW),
        lsf_words.parse_script(lsf_words.parse_records(text) or [], "s"),
        lsf_words.when(text, NOW),
        lsf_words.state_of(text, text),
    ]


def pbs(text: str) -> object:
    return [pbs_words.verdict_of(facts) for facts in pbs_words.parse_jobs(text).values()]


def rank(text: str) -> object:
    return PmiServer(2, "kvs").feed(0, text.encode(errors="replace") + b"\n")


# What the formats are made of, so that a text at random gets past the first look.
WORDS = (
    *("²", "٣", LONG, "-1", "0", "7", "9:0", "1970-01-01T00:00:00", "0001-01-01T00:00:00"),
    *("9999-12-31T23:59:59", "Feb 29 10:00", "Mon Jan  1 00:00:00 1", "-/-", "None", "N/A"),
    *("|", ":", ",", "+", "[", "]", "{", "}", "<", ">", '"', "=", "/", "%", "$", "@", "*", "_"),
    *("\n", "\n\n", "\t", " ", "\0", "\\", "CANCELLED by 1", "PENDING", "up"),
    *("JobId=", " JobState=", "ExitCode=", " Reason=", "StartTime=", "ArrayTaskId=", "%j%10x"),
    *("Submitted batch job ", "Your job ", "Job <", "> is submitted to ", "CLUSTER: "),
    *("<job_list", "</job_list>", "<JB_job_number>", "</JB_job_number>", "<state>r</state>"),
    *("jobnumber ", "failed ", "exit_status ", "ru_wallclock ", "category -l h_rt="),
    *('{"Jobs":', '{"Queue":', '{"RECORDS":[', '"JOBID":"', '"STAT":"EXIT"', '"EXIT_CODE":"'),
    *('"job_state":"F"', '"Exit_status":', '"stime":', '"estimated":', "Version: 4..3"),
    *("srun: error: n1: tasks ", ": Exited with exit code ", "hpcdist: rank ", " ended with "),
    *("[h:01] [prterun-h-1@0,0] odls:waitpid_fired child [p@1,", "] exit code "),
    *("] was already dead exit code ", "127", "Abort(", ") on node", "Errorcode: "),
    *("(Open MPI) ", "HYDRA Version: ", "cmd=abort exitcode=", "cmd=getbyidx idx=", "mcmd="),
    *("value=", "node1:", "user@", "auto*", "1.5K", "Slurmctld(", ") at ", " is UP"),
)

# By the folder of their corpus: the parsers, and the errors they document.
PARSERS: dict[str, dict[str, Callable[[str], object] | tuple[Callable[[str], object], Errors]]] = {
    "slurm": {
        "slurm state": slurm_words.state_of,
        "slurm reason": slurm_words.never_starts,
        "slurm submit": (slurm_words.parse_submit, (ValueError,)),
        "slurm has_id": slurm_words.has_id,
        "slurm found": lambda text: slurm_words.parse_found(text, "s"),
        "slurm arrays": slurm_words.parse_array_limit,
        "squeue": slurm_words.parse_squeue,
        "sacct": slurm_words.parse_sacct,
        "scontrol": slurm_words.parse_scontrol,
        "mpi list": slurm_words.parse_mpi_list,
        "slurm file": lambda text: slurm_words.expand(text, JobId("7_1"), "n"),
        "partitions": slurm_checks.parse_partitions,
        "ping": slurm_checks.parse_ping,
        "accounting": lambda text: slurm_checks.parse_accounting(1, text, text),
    },
    "pbs": {
        "pbs submit": (pbs_words.parse_submit, (ValueError,)),
        "pbs has_id": pbs_words.has_id,
        "torque": pbs_words.is_torque,
        "pbs jobs": pbs,
        "pbs found": lambda text: pbs_words.parse_found(text, "/a/s"),
        "pbs complaints": pbs_words.only_about_jobs,
        "pbs history": pbs_words.without_history,
        "pbs comment": pbs_words.never_starts,
        "pbs hosts": pbs_words.hosts,
        "pbs chunks": pbs_words.chunks,
        "pbs queues": lambda text: pbs_checks.parse(text, "Queue"),
    },
    "sge": {
        "sge state": lambda text: (sge_words.state_of(text), sge_words.in_error(text)),
        "sge submit": (sge_words.parse_submit, (ValueError,)),
        "sge qstat": sge_words.parse_qstat,
        "sge reasons": sge_words.parse_reasons,
        "sge script": lambda text: sge_words.parse_script(text, "s"),
        "sge qacct": sge_words.parse_qacct,
        "sge environments": sge_words.parse_environments,
        "sge file": lambda text: sge_words.expand(text, JobId("7"), "n", "u"),
    },
    "lsf": {
        "lsf": lsf,
        "lsf submit": (lsf_words.parse_submit, (ValueError,)),
        "lsf reason": lambda text: (lsf_words.term_of(text), lsf_words.not_there(text)),
        "lsf unit": lsf_checks.parse_unit,
    },
    "mpi": {
        "MPI library": library,
        "mpiexec": installed_mpi.identify,
        "mpi4py": installed_mpi.read_library,
        "pmi line": pmi.parse,
        "a rank": rank,
        "prterun": processes.parse_launcher,
        "aborts": lambda text: aborts.blamed({0: text, None: text}, 0, 1, 1, all_end=True),
        "signal": processes.signal_number,
        "ends": lambda text: launcher_output.parse_ends(text, slurm_words.ENDS),
        "told": launcher_output.parse_told,
        "labels": lambda text: [launcher_output.split_labels(each, text) for each in LABELS],
    },
    "words": {
        "numbers": lambda text: (_numbers.whole(text), _numbers.signed(text)),
        "machine": (ssh_machines.parse, (ValueError,)),
        "machine file": (machines._read_line, (ValueError,)),
        "addresses": (network.targets, (ValueError,)),
        "split": job_options._split,
    },
}


def targets() -> Iterator[Target]:
    """Make a target of each."""
    words = tuple(word.encode() for word in WORDS)
    for folder, parsers in PARSERS.items():
        for name, found in parsers.items():
            parse, errors = found if isinstance(found, tuple) else (found, ())
            read = lambda data, parse=parse: parse(data.decode(errors="replace"))
            yield Target(name, read, errors, folder, words)
