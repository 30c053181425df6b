"""What Slurm's commands print, read: recorded from 22.05.8 where nothing else is said."""

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.slurm import SlurmManager
from hpcdist._schedulers.slurm_words import (
    STATES,
    expand,
    has_id,
    parse_found,
    parse_mpi_list,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
    parse_submit,
    state_of,
)
from hpcdist._schedulers.verdict import JobState, Verdict

SQUEUE = """\
3|PENDING|N/A|N/A||JobHeldUser
4|PENDING|2026-11-21T14:05:00|2026-11-21T14:15:00||Priority
9|CANCELLED|2026-11-21T05:15:33|2026-11-21T05:15:33||PartitionTimeLimit
18|COMPLETED|2026-11-21T05:15:47|2026-11-21T05:15:48|n1|None
19|FAILED|2026-11-21T05:15:48|2026-11-21T05:15:49|n1|JobLaunchFailure
20_0|FAILED|2026-11-21T05:15:51|2026-11-21T05:15:52|n1|NonZeroExitCode
28|RUNNING|2026-11-21T05:16:31|2026-11-21T05:17:31|n[1-2]|None
"""
SCONTROL = """\
JobId=20 ArrayJobId=20 ArrayTaskId=1 JobName=hpcdist-d34ad69d
   UserId=hpcuser(20001) GroupId=hpcuser(20001) MCS_label=N/A
   Priority=4294901747 Nice=0 Account=(null) QOS=(null)
   JobState=FAILED Reason=NonZeroExitCode Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=3:0
   RunTime=00:00:01 TimeLimit=00:10:00 TimeMin=N/A
   SubmitTime=2026-11-21T05:15:51 EligibleTime=2026-11-21T05:15:51
   StartTime=2026-11-21T05:15:51 EndTime=2026-11-21T05:15:52 Deadline=N/A
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n1
   BatchHost=n1

JobId=21 JobName= JobState=RUNNING x
   JobState=TIMEOUT Reason=TimeLimit Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:15
   StartTime=Unknown EndTime=Unknown Deadline=N/A
   NodeList=
   Comment=JobState=COMPLETED
"""
# Put together after sacct(1).
SACCT = """\
20|FAILED|7:0|2026-11-21T05:15:51|2026-11-21T05:15:52|n1
21|CANCELLED by 20001|0:15|2026-11-21T05:15:51|2026-11-21T05:15:52|n1
22|OUT_OF_MEMORY|0:125|2026-11-21T05:15:51|2026-11-21T05:15:52|n1
23|PENDING|0:0|Unknown|Unknown|None assigned
24_[4-9%2]|PENDING|0:0|Unknown|Unknown|None assigned
24_0|COMPLETED|0:0|2026-11-21T05:15:51|2026-11-21T05:15:52|n1
"""


def local(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone()


def test_squeue() -> None:
    found = parse_squeue(SQUEUE)
    assert {ident: verdict.state.name for ident, verdict in found.items()} == {
        "3": "HELD",
        "4": "QUEUED",
        "9": "CANCELLED",
        "18": "DONE",
        "19": "FAILED",
        "20_0": "FAILED",
        "28": "RUNNING",
    }
    assert found["4"].start == local("2026-11-21T14:05:00")
    assert found["4"].reason == "Priority"
    assert found["3"].start is None
    assert found["28"].nodes == "n[1-2]"
    assert found["28"].reason == ""


def test_squeue_with_a_headline_a_banner_and_a_reason_of_many_words() -> None:
    text = (
        "CLUSTER: big\n*** maintenance | on Monday ***\n"
        "7|PENDING|N/A|N/A||ReqNodeNotAvail, UnavailableNodes:n1|n2\n8|PONDERING|||n1|None\n"
    )
    found = parse_squeue(text)
    assert found["7"].reason == "ReqNodeNotAvail, UnavailableNodes:n1|n2"
    assert (found["8"].state, found["8"].word) == (JobState.UNKNOWN, "PONDERING")
    assert set(found) == {"7", "8"}


@given(st.text())
def test_no_text_upsets_a_parser(text: str) -> None:
    for parse in (parse_squeue, parse_sacct, parse_scontrol):
        assert isinstance(parse(text), dict)
    parse_mpi_list(text)
    parse_found(text, "/x")
    has_id(text)
    state_of(text)


def test_scontrol() -> None:
    found = parse_scontrol(SCONTROL)
    assert set(found) == {"20_1", "21"}
    assert (found["20_1"].word, found["20_1"].exit_code, found["20_1"].nodes) == ("FAILED", 3, "n1")
    assert found["20_1"].end == local("2026-11-21T05:15:52")
    assert found["21"].describe() == "TIMEOUT (TimeLimit)"
    assert found["21"].nodes == ""


def test_a_job_whose_output_file_could_not_be_opened() -> None:
    text = SCONTROL.replace("ExitCode=3:0", "ExitCode=0:53")
    assert "output file" in parse_scontrol(text)["20_1"].describe()
    assert "output file" in parse_sacct("1|FAILED|0:53|||n1\n")["1"].describe()


def test_sacct() -> None:
    found = parse_sacct(SACCT)
    told = {ident: verdict.describe() for ident, verdict in found.items()}
    assert told == {
        "20": "FAILED, exit code 7",
        "21": "CANCELLED by 20001",
        "22": "OUT_OF_MEMORY, killed by signal 125",
        "23": "PENDING",
        "24_0": "COMPLETED",
    }
    assert found["22"].state is JobState.FAILED
    assert parse_sacct("") == {}


@pytest.mark.parametrize(
    ("out", "job"),
    [
        ("44\n", JobId("44")),
        ("44;big\n", JobId("44", "big")),
        ("Submitted batch job 44\n", JobId("44")),
        ("Submitted batch job 44 on cluster big\n", JobId("44", "big")),
        ("sbatch: 30 day retention\nYou may run 7 jobs\n44\n", JobId("44")),
        ("44\nhave a nice day 7\n", JobId("44")),
        ("Your quota:\n  12 \n44;c-1.x  \n", JobId("44", "c-1.x")),
    ],
)
def test_the_id_among_banners(out: str, job: JobId) -> None:
    found = parse_submit(out)
    assert (found, found.cluster) == (job, job.cluster)


def test_without_an_id_both_streams_are_told() -> None:
    with pytest.raises(ValueError, match=r"'welcome 7'.*'or not'"):
        parse_submit("welcome 7\n", "or not\n")


def test_half_an_id_is_none() -> None:
    assert not has_id("12")
    assert has_id("12\n")
    assert has_id("Submitted batch job 12 on cluster x\n")


def test_the_job_of_a_script() -> None:
    text = "CLUSTER: a\n3|/runs/x/script.sh\nCLUSTER: b\n4|/runs/y |z/script.sh\n"
    found = parse_found(text, "/runs/y |z/script.sh")
    assert found is not None
    assert (found, found.cluster) == ("4", "b")
    assert parse_found(text, "/runs/z/script.sh") is None


def test_mpi_flavours_of_several_versions() -> None:
    now = "MPI plugin types are...\n\tpmix\n\tnone\n\tcray_shasta\n\tpmi2\n"
    now += "specific pmix plugin versions available: pmix_v4\n"
    assert parse_mpi_list(now) == {"pmix", "none", "cray_shasta", "pmi2", "pmix_v4"}
    before = "srun: MPI types are...\nsrun: none\nsrun: pmi2\nsrun: openmpi\n"
    assert parse_mpi_list(before) == {"none", "pmi2", "openmpi"}


def test_every_word_has_one_state() -> None:
    words = [word for words in STATES.values() for word in words.split()]
    assert len(words) == len(set(words))
    assert set(STATES) | {JobState.UNKNOWN} == set(JobState)


@pytest.mark.parametrize(
    ("reason", "hopeless"),
    [
        ("PartitionTimeLimit", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("AssocMaxCpuPerJobLimit", True),
        ("QOSMaxMemoryPerJob", True),
        ("QOSMaxCpuMinutesPerJobLimit", True),
        ("InvalidAccount", True),
        ("JobHeldAdmin", True),
        ("(DependencyNeverSatisfied)", True),
        ("JobHeldUser", False),
        ("Priority", False),
        ("Resources", False),
        ("Dependency", False),
        ("QOSMaxCpuPerUserLimit", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("AssocGrpCpuLimit", False),
        ("ReqNodeNotAvail, UnavailableNodes:n1", False),
        ("", False),
    ],
)
def test_reasons_for_which_a_job_never_starts(reason: str, hopeless: bool) -> None:
    manager = SlurmManager(1)
    waits = Verdict(state=JobState.HELD, word="PENDING", reason=reason)
    assert manager.hopeless(waits) is hopeless
    runs = Verdict(state=JobState.RUNNING, word="RUNNING", reason=reason)
    assert not manager.hopeless(runs)


@pytest.mark.parametrize(
    ("pattern", "job", "path"),
    [
        ("a.txt", JobId("7"), "a.txt"),
        ("%x-%j.%%", JobId("7"), "run-7.%"),
        ("%4j", JobId("7"), "0007"),
        ("%A_%a", JobId("7_3"), "7_3"),
        ("%j", JobId("7_3"), None),
        ("%N-%j", JobId("7"), None),
        ("%j", None, None),
        ("a\\%j", JobId("7"), "a%j"),
    ],
)
def test_patterns_of_output(pattern: str, job: Any, path: str | None) -> None:
    assert expand(pattern, job, "run") == path
