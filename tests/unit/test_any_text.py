"""Whatever others print, a parser returns a value or raises the error that it documents."""

import contextlib
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hpcdist import _numbers
from hpcdist._cli import job_options, machines
from hpcdist._cli.checks import library
from hpcdist._keeper import aborts, installed_mpi, launcher_output, pmi, processes
from hpcdist._keeper.pmi import PmiServer
from hpcdist._managers import ssh_machines
from hpcdist._schedulers import (
    job_watch,
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
from hpcdist._wire import greeting
from hpcdist._worker.join_file import CannotJoin, read_join

NOW = datetime(2026, 2, 28, 23, 59).astimezone()
LONG = "9" * 5000
DEEP = "[" * 100_000
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


# Parsers of what others print, and the errors they document.
PARSERS: dict[str, tuple[Callable[[str], object], tuple[type[Exception], ...]]] = {
    "numbers": (lambda text: (_numbers.whole(text), _numbers.signed(text)), ()),
    "slurm state": (slurm_words.state_of, ()),
    "slurm reason": (slurm_words.never_starts, ()),
    "slurm submit": (slurm_words.parse_submit, (ValueError,)),
    "slurm has_id": (slurm_words.has_id, ()),
    "slurm found": (lambda text: slurm_words.parse_found(text, "s"), ()),
    "squeue": (slurm_words.parse_squeue, ()),
    "sacct": (slurm_words.parse_sacct, ()),
    "scontrol": (slurm_words.parse_scontrol, ()),
    "mpi list": (slurm_words.parse_mpi_list, ()),
    "slurm file": (lambda text: slurm_words.expand(text, JobId("7_1"), "n"), ()),
    "partitions": (slurm_checks.parse_partitions, ()),
    "ping": (slurm_checks.parse_ping, ()),
    "accounting": (lambda text: slurm_checks.parse_accounting(1, text, text), ()),
    "pbs submit": (pbs_words.parse_submit, (ValueError,)),
    "pbs has_id": (pbs_words.has_id, ()),
    "torque": (pbs_words.is_torque, ()),
    "pbs jobs": (pbs, ()),
    "pbs found": (lambda text: pbs_words.parse_found(text, "/a/s"), ()),
    "pbs complaints": (pbs_words.only_about_jobs, ()),
    "pbs hosts": (pbs_words.hosts, ()),
    "pbs chunks": (pbs_words.chunks, ()),
    "pbs queues": (lambda text: pbs_checks.parse(text, "Queue"), ()),
    "sge state": (sge_words.state_of, ()),
    "sge submit": (sge_words.parse_submit, (ValueError,)),
    "sge qstat": (sge_words.parse_qstat, ()),
    "sge reasons": (sge_words.parse_reasons, ()),
    "sge script": (lambda text: sge_words.parse_script(text, "s"), ()),
    "sge qacct": (sge_words.parse_qacct, ()),
    "sge environments": (sge_words.parse_environments, ()),
    "sge file": (lambda text: sge_words.expand(text, JobId("7"), "n", "u"), ()),
    "lsf": (lsf, ()),
    "lsf submit": (lsf_words.parse_submit, (ValueError,)),
    "lsf unit": (lsf_checks.parse_unit, ()),
    "MPI library": (library, ()),
    "mpiexec": (installed_mpi.identify, ()),
    "pmi line": (pmi.parse, ()),
    "a rank": (rank, ()),
    "prterun": (processes.parse_launcher, ()),
    "aborts": (lambda text: aborts.blamed({0: text, None: text}, 0, 1, 1, all_end=True), ()),
    "signal": (processes.signal_number, ()),
    "ends": (lambda text: launcher_output.parse_ends(text, slurm_words.ENDS), ()),
    "told": (launcher_output.parse_told, ()),
    "labels": (
        lambda text: [launcher_output.split_labels(label, text) for label in LABELS],
        (),
    ),
    "machine": (ssh_machines.parse, (ValueError,)),
    "machine file": (machines._read_line, (ValueError,)),
    "addresses": (network.targets, (ValueError,)),
    "split": (job_options._split, ()),
}
# What the formats are made of, so that a text at random gets past the first look.
WORDS = st.sampled_from(
    [
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
    ]
)
TEXTS = st.text(max_size=200) | st.lists(WORDS | st.text(max_size=4), max_size=30).map("".join)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
@example(text=DEEP)
@example(text='{"Jobs":' + DEEP)
@example(text='{"RECORDS":' + DEEP)
@example(text=f"1|FAILED|²:{LONG}|N/A|N/A|n1\n2|FAILED|{LONG}:0|N/A|N/A|n1\n")
@example(text=f"{LONG}: out\n[1,{LONG}]<stdout>: out\n[{LONG}] out\n")
@example(text="srun: error: n1: tasks 0-4294967295,²: Exited with exit code 1\n")
@example(text="99999999999:ncpus=1")
@example(text="[h:1] [p@0,0] odls:waitpid_fired child [p@1,2] was already dead exit code 127\n")
@example(text="cmd=abort exitcode=²")
def test_any_text_is_read_or_refused(name: str, text: str) -> None:
    parser, errors = PARSERS[name]
    with contextlib.suppress(*errors):
        parser(text)


@pytest.mark.parametrize("code", ["²", LONG, "x", ""])
def test_an_odd_exit_code_is_none(code: str) -> None:
    (verdict,) = slurm_words.parse_sacct(f"1|FAILED|{code}:0|N/A|N/A|n1\n").values()
    assert (verdict.exit_code, verdict.signal) == (None, None)
    records = [{"jobid": "7", "stat": "EXIT", "exit_code": code}]
    assert lsf_words.verdicts(records, NOW)["7"].exit_code is None


def test_a_year_that_no_clock_has_is_no_time() -> None:
    (verdict,) = slurm_words.parse_sacct(
        "1|FAILED|0:0|0001-01-01T00:00:00|9999-12-31T23:59:59|n1\n"
    ).values()
    assert verdict.start is None or verdict.start.year == 1  # as the zone has it
    assert verdict.end is None or verdict.end.year == 9999


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
@example(data=DEEP.encode())
@example(data=f"1 {LONG} host".encode())
@example(data=b"1 99999999999999999 host")
def test_any_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    for name in ("exit", "join"):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)
    job_watch.exit_verdict(str(tmp_path))
    with pytest.raises(CannotJoin):
        read_join(str(tmp_path / "join"))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
@example(data=DEEP.encode())
@example(data=LONG.encode())
@example(data=b"\xff")
@example(data=b"[]")
def test_any_hello_is_read_or_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(len(data).to_bytes(4, "little") + data)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(greeting.Refused):
            assert isinstance(greeting.receive_hello(ours), dict)
