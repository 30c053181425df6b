"""LSF's options and scripts, and what its commands print: put together after its reference."""

import json
import re
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcdist._keeper import installed_mpi
from hpcdist._keeper.installed_mpi import Mpi
from hpcdist._schedulers import commands
from hpcdist._schedulers.commands import CommandFailed, Done
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.lsf import LSFManager
from hpcdist._schedulers.lsf_checks import units
from hpcdist._schedulers.lsf_words import (
    parse_lines,
    parse_records,
    parse_script,
    parse_submit,
    verdicts,
    when,
)
from hpcdist._schedulers.verdict import JobState

NOW = datetime(2026, 11, 21, 14, 0).astimezone()
MPICH = Mpi("mpich", (5, 0, 2), "/env/bin/mpiexec")
OPENMPI = Mpi("openmpi", (5, 0, 11), "/env/bin/mpiexec")


def record(ident: str, stat: str, **more: str) -> dict[str, str]:
    """Return a record as bjobs writes it."""
    fields = ("EXIT_CODE", "START_TIME", "FINISH_TIME", "EXEC_HOST", "EXIT_REASON", "PEND_REASON")
    row = {"JOBID": ident, "STAT": stat} | dict.fromkeys(fields, "")
    return row | {name.upper(): value for name, value in more.items()}


RECORDS = [
    record("1", "PEND", pend_reason="Not enough slots: 4 hosts;"),
    record("2", "RUN", start_time="Nov 21 13:18", exec_host="4*n1:4*n2"),
    record("3", "DONE", finish_time="Nov 21 13:20 L", exec_host="n1"),
    record("4", "EXIT", exit_code="7", finish_time="Nov 21 13:20 L"),
    record(
        "5",
        "EXIT",
        exit_code="140",
        exit_reason="TERM_RUNLIMIT: job killed after reaching LSF run time limit",
    ),
    record(
        "6",
        "EXIT",
        exit_code="137",
        exit_reason="TERM_MEMLIMIT: job killed after reaching LSF memory usage limit",
    ),
    record("7", "EXIT", exit_code="143", exit_reason="TERM_OWNER: job killed by owner"),
    record("8", "PSUSP"),
    record("9", "SSUSP", exec_host="n1"),
    record("10", "UNKWN", exec_host="n1"),
    {"JOBID": "11", "ERROR": "Job <11> is not found"},
]
BJOBS = json.dumps({"COMMAND": "bjobs", "JOBS": len(RECORDS), "RECORDS": RECORDS}, indent=2)
NOHEADER = """\
1|PEND|-|-|-|-|-|Not enough slots: 4 hosts; a | b
2|RUN|-|Nov 21 13:18|-|4*n1:4*n2|-|-
"""


def test_bjobs() -> None:
    records = parse_records("*** maintenance on Monday ***\n" + BJOBS)
    assert records is not None
    found = verdicts(records, NOW)
    assert {ident: (v.state.name, v.describe()) for ident, v in found.items()} == {
        "1": ("QUEUED", "PENDING (Not enough slots: 4 hosts;)"),
        "2": ("RUNNING", "RUNNING"),
        "3": ("DONE", "DONE"),
        "4": ("FAILED", "EXIT, exit code 7"),
        "5": ("TIMEOUT", "TERM_RUNLIMIT (job killed after reaching LSF run time limit)"),
        "6": (
            "FAILED",
            "TERM_MEMLIMIT (job killed after reaching LSF memory usage limit), killed by SIGKILL",
        ),
        "7": ("CANCELLED", "TERM_OWNER"),
        "8": ("HELD", "PSUSP"),
        "9": ("PAUSED", "SSUSP"),
        "10": ("UNKNOWN", "UNKWN"),
    }
    assert found["2"].start == datetime(2026, 11, 21, 13, 18).astimezone()
    assert found["2"].nodes == "4*n1:4*n2"
    assert (found["3"].exit_code, found["4"].exit_code) == (0, 7)


def test_bjobs_without_json() -> None:
    found = verdicts(parse_lines(NOHEADER), NOW)
    assert found["1"].reason == "Not enough slots: 4 hosts; a | b"
    assert (found["2"].state, found["2"].start) == (
        JobState.RUNNING,
        datetime(2026, 11, 21, 13, 18).astimezone(),
    )


def test_a_time_without_a_year_is_the_nearest() -> None:
    new_year = datetime(2026, 1, 1, 0, 10).astimezone()
    assert when("Dec 31 23:50", new_year) == datetime(2025, 12, 31, 23, 50).astimezone()
    assert when("Feb 1 00:00:10 2024", new_year) == datetime(2024, 2, 1, 0, 0, 10).astimezone()
    assert when("whenever", new_year) is None


@given(st.text())
def test_no_text_upsets_a_parser(text: str) -> None:
    verdicts(parse_records(text) or [], NOW)
    verdicts(parse_lines(text), NOW)
    parse_script(parse_records(text) or [], "/x")
    when(text, NOW)


def test_the_job_of_a_script() -> None:
    records = [{"jobid": "3", "job_description": "/a"}, {"jobid": "4", "job_description": "/b"}]
    assert parse_script(records, "/b") == "4"
    assert parse_script(records, "/c") is None


def test_submissions() -> None:
    assert parse_submit("Job <12> is submitted to queue <normal>.\n") == JobId("12")
    with pytest.raises(ValueError, match="no job id"):
        parse_submit("Request aborted by esub. Job not submitted.\n")


Answers = Callable[..., list[list[str]]]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """`answers((status, out, err), …)`: what LSF says next; returns what it was asked."""

    def prepare(*told: tuple[int, str, str]) -> list[list[str]]:
        asked: list[list[str]] = []
        left = list(told)

        def run(argv: list[str], **more: Any) -> Done:
            asked.append(argv)
            return Done(tuple(argv), *left.pop(0), 0.0)

        monkeypatch.setattr(commands, "run", run)
        return asked

    return prepare


def test_no_answer_says_nothing_of_jobs(answers: Answers) -> None:
    manager = LSFManager(1)
    answers((255, "", "LSF is down. Please wait ..."))
    with pytest.raises(CommandFailed, match="LSF is down"):
        manager.poll([JobId("1")])
    answers((255, "", "LSF is down. Please wait ..."))
    assert manager.post_mortem([JobId("1")]) == {}
    answers((255, "", "Job <1> is not found"))
    assert manager.poll([JobId("1")]) == {}


def test_an_older_bjobs_is_asked_in_another_way(answers: Answers) -> None:
    asked = answers((255, "", "bjobs: Illegal option -- json"), (0, NOHEADER, ""))
    assert set(LSFManager(1).poll([JobId("1"), JobId("2")])) == {"1", "2"}
    assert "-noheader" in asked[1]


def test_what_has_ended_is_cancelled_without_a_word(answers: Answers) -> None:
    manager = LSFManager(1)
    answers((255, "", "Job <1>: Job has already finished\nJob <2>: No matching job found"))
    manager.cancel([JobId("1"), JobId("2")])
    answers((255, "", "User permission denied"))
    with pytest.raises(CommandFailed, match="permission denied"):
        manager.cancel([JobId("1")])


# Options and scripts


@pytest.fixture(params=[MPICH, OPENMPI], ids=["mpich", "openmpi"])
def script(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., str]:
    """`script(n, **options)`: what would be submitted from `/`, for one MPI or the other."""
    monkeypatch.setattr(installed_mpi, "find_mpi", lambda python: request.param)
    monkeypatch.setenv("HPCDIST_DIR", "/runs")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return lambda n, **options: LSFManager(n).job_script(**{"dir": "/", **options})


GOLDEN = """\
#!/bin/bash
#BSUB -n 16
#BSUB -J hpcdist-run
#BSUB -Jd /runs/jobs/hpcdist-run/script.sh
#BSUB -cwd /
#BSUB -o /dev/null
#BSUB -rn
#BSUB -q normal
#BSUB -W 1:00
#BSUB -x
#BSUB -R "span[ptile=8]"
#BSUB -R 'select[type=="any"]'
#BSUB -M 4GB
#BSUB -app stack

# hpcdist-run: made by hpcdist from the template lsf.sh.j2
folder=/runs/jobs/hpcdist-run
exec >>"$folder/log" 2>&1
"""


def test_a_script(script: Callable[..., str]) -> None:
    text = script(
        16,
        q="normal",
        W="1:00",
        x=True,
        R=["span[ptile=8]", 'select[type=="any"]'],
        M="4GB",
        options=["-app stack"],
        P=None,
    )
    assert text.startswith(GOLDEN), text
    assert "blaunch" in text
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, timeout=20)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_how_many_workers_a_job_and_a_host_have(script: Callable[..., str]) -> None:
    text = script(8, split="node", ntasks_per_node=2, R="rusage[mem=2G]")
    assert "\n#BSUB -n 2\n" in text
    assert '\n#BSUB -R "rusage[mem=2G]"\n#BSUB -R "span[ptile=2]"\n' in text
    assert "\n#BSUB -n 4\n" in script(8, split="node", R="span[ptile=4]")
    assert "\n#BSUB -n 3\n" in script(8, split=3)
    assert "ntasks" not in text


def test_output_of_one_s_own_is_lsf_s_business(script: Callable[..., str]) -> None:
    text = script(1, o="out.%J")
    assert "\n#BSUB -o out.%J\n" in text
    assert "exec >>" not in text
    manager = LSFManager(1)
    asked = manager.plan(manager.settings_of({"o": "out.%J", "e": "err.%I"})).asked
    assert manager.log_files(asked, "/work", "/runs/a", JobId("7")) == ["/work/out.7"]
    plain = manager.plan(manager.settings_of({})).asked
    assert manager.log_files(plain, "/work", "/runs/a", JobId("7")) == ["/runs/a/log"]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (("n=3", "LSFManager(4)"), {"n": 3}),
        (("K=True", "submit --wait"), {"K": True}),
        (("J='a[1-4]'", "split="), {"J": "a[1-4]"}),
        (("cwd='/tmp'", "dir="), {"cwd": "/tmp"}),
        (("ptile=2", "ntasks_per_node=2"), {"R": "span[ptile=2]", "ntasks_per_node": 2}),
        (("both kinds of quotes",), {"Jd": 'it\'s "it"'}),
    ],
)
def test_what_contradicts_is_refused(words: tuple[str, ...], options: dict[str, Any]) -> None:
    manager = LSFManager(4)
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        manager.plan(manager.settings_of({"dir": "/", **options})).asked
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_unit_of_memory(tmp_path: Path) -> None:
    (tmp_path / "lsf.conf").write_text("LSF_UNIT_FOR_LIMITS=MB\n")
    assert "counts in MB" in units({"LSF_ENVDIR": str(tmp_path)}).text
    assert "with its unit" in units({"LSF_ENVDIR": str(tmp_path / "none")}).text
