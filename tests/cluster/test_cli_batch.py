"""The commands around jobs, as far as they need no cluster: arguments, scripts, odd schedulers.

The scheduler's programs are scripts on PATH that answer what a real one cannot be made to answer.
What a real one does is tested in `tests/slurm`.
"""

import doctest
import importlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcdist._cli import job_options, testjob
from hpcdist._cli.wait_for_job import exit_code
from hpcdist._schedulers import slurm_checks
from hpcdist._schedulers.findings import Mark
from hpcdist._schedulers.verdict import JobState, Verdict
from tests.helpers import mpi_flavour, patient

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    "_cli.checks",
    "_cli.wait_for_job",
    "_cli.job_options",
    "_cli.runs",
    "_cli.schedulers",
    "_schedulers.findings",
    "_schedulers.lsf_checks",
    "_schedulers.pbs_checks",
    "_schedulers.slurm_checks",
    "_schedulers.plan",
    "_schedulers.slurm",
    "_schedulers.lsf",
    "_schedulers.sge",
]


class Site:
    """A login node with a scheduler of scripts, and a user at work in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work dir"
        self.bin = folder / "bin"
        self.state = folder / "state"
        for path in (self.folder, self.bin):
            path.mkdir()
        for program in ("sh", "cat", "bash", "date", "hostname", "mv"):
            found = shutil.which(program)
            assert found
            (self.bin / program).symlink_to(found)
        (self.folder / "driver.py").write_text("print('never run here')\n")

    def program(self, name: str, body: str) -> None:
        """Put a program on PATH. It notes down its arguments in the file `<name>.args`."""
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "$@" >> "{self.bin}/{name}.args"\n{body}\n')
        path.chmod(0o755)

    def args(self, name: str) -> str:
        path = self.bin / f"{name}.args"
        return path.read_text() if path.exists() else ""

    def __call__(self, *args: str) -> "subprocess.CompletedProcess[str]":
        kept = {n: v for n, v in os.environ.items() if n.startswith(("HPCDIST_TEST", "TMPDIR"))}
        return subprocess.run(
            [sys.executable, "-m", "hpcdist", *args],
            cwd=self.folder,
            env={
                **kept,
                "PATH": str(self.bin),
                "HOME": str(self.folder),
                "PYTHONPATH": str(ROOT),
                "PYTHONUTF8": "1",
                "HPCDIST_DIR": str(self.state),
            },
            capture_output=True,
            text=True,
            timeout=patient(50),
            stdin=subprocess.DEVNULL,
            check=False,
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def slurm_site(site: Site) -> Site:
    """Slurm's commands: every job is 42, and no one is known."""
    site.program("sbatch", "echo '42;big'")
    site.program("squeue", "true")
    site.program("scancel", "true")
    site.program(
        "sinfo", "[ \"$1\" = --version ] && echo 'slurm 99.1' || echo 'all*|up|1:00|0/3/0/4|8'"
    )
    site.program("scontrol", "echo 'Slurmctld(primary) at head is UP'")
    site.program("srun", "printf 'MPI plugin types are...\\n\\tnone\\n\\tpmi2\\n\\tpmix\\n'")
    site.program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    return site


# --- what is whose -----------------------------------------------------------

_OURS = {"-n": True, "--wait": False, "--setup": True}
_BARE = {"--exclusive", "-H", "-O"}


@pytest.mark.parametrize(
    ("line", "theirs", "program"),
    [
        ("d.py -n 8 --partition debug -t 5:00", {"partition": "debug", "t": "5:00"}, "d.py"),
        ("d.py -n8 --partition=debug --wait", {"partition": "debug"}, "d.py"),
        ("-n 8 d.py --partition debug", {}, "d.py --partition debug"),
        ("--partition debug d.py -n 8 10 --x", {"partition": "debug"}, "d.py 10 --x"),
        ("d.py -n 8 --exclusive 10 20", {"exclusive": True}, "d.py 10 20"),
        ("d.py -n 8 --exclusive=user 10", {"exclusive": "user"}, "d.py 10"),
        ("d.py -n 8 --x --y 1", {"x": True, "y": "1"}, "d.py"),
        ("d.py -n 8 -HO -N2 -t5", {"H": True, "O": True, "N": "2", "t": "5"}, "d.py"),
        ("d.py -n 8 -C a -C b", {"C": ["a", "b"]}, "d.py"),
        ("d.py -n 8 -- --size 3", {}, "d.py --size 3"),
        ("-n 8 -p x -- d.py -- 3", {"p": "x"}, "d.py -- 3"),
        ("d.py -n 8 --comment= 5", {"comment": ""}, "d.py 5"),
        ("d.py -n 8 - 5", {}, "d.py - 5"),
    ],
)
def test_options_are_told_apart(line: str, theirs: dict[str, Any], program: str) -> None:
    found = job_options.divide(line.split(), _OURS, _BARE, program=True)
    assert found.theirs == theirs
    assert found.program == tuple(program.split())
    assert set(found.ours) <= {"-n", "-n8", "8", "--wait"}


def test_a_value_of_ours_may_look_like_anything() -> None:
    found = job_options.divide(["--setup", "--x y", "-n", "2"], _OURS, _BARE, program=True)
    assert found == job_options.Divided(("--setup", "--x y", "-n", "2"), {}, ())


# --- scripts -----------------------------------------------------------------


def test_dry_run_prints_the_script_and_does_nothing(slurm_site: Site) -> None:
    done = slurm_site(
        *("submit", "driver.py", "-n", "8", "--partition", "debug", "-t", "5:00", "--exclusive"),
        *("--mpi", "pmi2", "--setup", "echo one", "--setup", "echo two", "--module", "gcc/12"),
        *("--env", "A=b c=d", "--option=--x  y", "--dry-run", "10", "it's"),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for directive in ("--ntasks=8", "--partition=debug", "-t 5:00", "--exclusive", "--x  y"):
        assert f"#SBATCH {directive}" in lines
    assert lines.index("module load gcc/12") < lines.index("echo one") < lines.index("echo two")
    assert "export A='b c=d'" in lines
    (launch,) = [line for line in lines if "driver.py" in line]
    assert f"{sys.executable} driver.py 10 'it'\"'\"'s' &" in launch
    assert launch.startswith("srun --mpi=pmi2 --ntasks=8 ")
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    assert not slurm_site.args("sbatch")
    assert not slurm_site.state.exists()


@pytest.mark.parametrize(
    "words",
    [
        "driver.py -n 8 --partition debug -t 5:00 --exclusive --mpi pmi2 10 it's",
        "-n 8 --mpi pmi2 --setup 'echo one' --env A=b driver.py --size 100",
        "driver.py -n 2 --scheduler pbs --module gcc/12 -- --size 100",
    ],
)
def test_the_script_of_a_driver_is_that_of_submit(slurm_site: Site, words: str) -> None:
    args = shlex.split(words.replace("it's", '"it\'s"'))
    done = slurm_site("script", *args)
    assert done.returncode == 0, done.stderr
    assert "driver.py" in done.stdout
    assert done.stdout == slurm_site("submit", "--dry-run", *args).stdout
    assert not slurm_site.state.exists()


def test_the_script_of_workers_needs_no_scheduler(site: Site) -> None:
    done = site("script", "-n", "8", "--mpi", "pmi2", "--partition=debug", "--split", "4")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-1\n" in done.stdout
    assert "hpcdist worker --join" in done.stdout
    assert not site.state.exists()


def test_a_template_of_ones_own(site: Site) -> None:
    (site.folder / "mine.sh.j2").write_text(
        '{% extends "builtin/slurm.sh.j2" %}{% block setup %}\n. /opt/init.sh\n{% endblock %}'
    )
    done = site("script", "-n", "2", "--mpi", "pmi2", "--template", "mine.sh.j2")
    assert ". /opt/init.sh\n" in done.stdout, done.stderr
    done = site("script", "-n", "2", "--mpi", "pmi2", "--template", "other.sh.j2")
    assert done.returncode == 1
    assert done.stderr.startswith("hpcdist script: there is no template 'other.sh.j2'")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["submit"], 2, "the program to submit is missing"),
        (["submit", "-n", "2"], 2, "the program to submit is missing"),
        (["submit", "driver.py"], 2, "say how many with -n N"),
        (["submit", "driver.py", "10", "-n", "2"], 2, "before its arguments"),
        (["submit", "driver.py", "-n", "0"], 2, "'0' is not a number of 1 or more"),
        (["submit", "driver.py", "-n", "2", "--templat", "x"], 2, "did you mean --template?"),
        (["submit", "driver.py", "-n", "2", "--env", "x"], 2, "not of the form NAME=VALUE"),
        (["submit", "nowhere.py", "-n", "2"], 1, "there is no file nowhere.py"),
        (["submit", "driver.py", "-n", "2", "--launcher", "ssh"], 1, "launcher= is one of"),
        (["submit", "driver.py", "-n", "2", "--array=1-3"], 1, "array='1-3' contradicts"),
        (["submit", "driver.py", "-n", "2", "--scheduler", "cron"], 1, "no scheduler 'cron'"),
        (["submit", "driver.py", "-n", "2", "--profile", "x"], 1, "no [profile.x]"),
        (["script", "driver.py", "-n", "2", "--split", "1"], 2, "--split is for workers"),
        (["script", "nowhere.py", "-n", "2"], 1, "there is no file nowhere.py"),
        (["script", "-n", "2", "--split", "x"], 1, 'split= is "node" or a number'),
        (["cancel"], 2, "required: JOB"),
        (["cancel", "12", "13"], 1, "no job of hpcdist is called 12, 13"),
        (["doctor", "--rum"], 2, "did you mean --run?"),
    ],
)
def test_mistakes_are_told_in_one_message(
    slurm_site: Site, args: list[str], code: int, said: str
) -> None:
    done = slurm_site(*args)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("hpcdist")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not slurm_site.args("sbatch")


def test_without_a_scheduler(site: Site) -> None:
    done = site("submit", "driver.py", "-n", "2")
    assert done.returncode == 1
    assert "on PATH there is no sbatch" in done.stderr
    assert (site("jobs").stdout, site("jobs").returncode) == ("no jobs\n", 0)


# --- submitting, waiting, cancelling ------------------------------------------

SUBMIT = ("submit", "driver.py", "-n", "2", "--mpi", "pmi2")


def test_submit_prints_the_id_alone(slurm_site: Site) -> None:
    slurm_site.program("sbatch", "echo 'Welcome! 30 days left'; echo '42;big'; echo note >&2")
    done = slurm_site(*SUBMIT)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    (folder,) = (slurm_site.state / "jobs").iterdir()
    assert f"job 42: its output goes to {folder}/log\n" in done.stderr
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_the_output_goes_is_told(slurm_site: Site) -> None:
    done = slurm_site(*SUBMIT, "--output", "out-%j.txt")
    assert f"its output goes to {slurm_site.folder}/out-42.txt\n" in done.stderr


def test_a_refusal_comes_in_the_schedulers_words(slurm_site: Site) -> None:
    slurm_site.program("sbatch", "echo 'sbatch: error: no such luck' >&2; exit 1")
    done = slurm_site(*SUBMIT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "hpcdist submit: sbatch: error: no such luck\n" in done.stderr
    assert list((slurm_site.state / "jobs").iterdir()) == []


def test_wait_outlives_a_scheduler_that_does_not_answer(slurm_site: Site) -> None:
    # The first question fails; the job ends meanwhile, which its folder tells.
    slurm_site.program(
        "sbatch",
        'f=${2%/script.sh}; echo "from the job" > "$f/log"; echo 42;'
        '(exec >/dev/null 2>&1; /bin/sleep 3; echo "7 100 n1 " > "$f/exit") &',
    )
    slurm_site.program("squeue", "echo 'squeue: error: Unable to contact controller' >&2; exit 1")
    done = slurm_site(*SUBMIT, "--wait")
    assert (done.returncode, done.stdout) == (7, "42\n"), done.stderr
    assert "Unable to contact controller; asking again" in done.stderr
    assert "job 42: FAILED, exit code 7" in done.stderr
    assert "  from the job\n" in done.stderr


def test_wait_gives_up_a_job_that_can_never_start(slurm_site: Site) -> None:
    slurm_site.program("squeue", "echo '42|PENDING|N/A|N/A||QOSMaxCpuPerJobLimit'")
    done = slurm_site(*SUBMIT, "--wait")
    assert done.returncode == 1
    assert "job 42 can never start: QOSMaxCpuPerJobLimit; it has been cancelled" in done.stderr
    assert slurm_site.args("scancel") == "-M big -Q 42\n"


def test_jobs_and_cancel_know_the_cluster_of_a_job(slurm_site: Site) -> None:
    slurm_site(*SUBMIT, "5")
    slurm_site.program("squeue", "echo '42|RUNNING|N/A|N/A|n[1-2]|None'")
    done = slurm_site("jobs")
    headline, row = done.stdout.splitlines()
    columns = "JOB STATE REASON SIZE LEFT SINCE NAME WHAT LAST LINE FOLDER"
    assert headline.split() == columns.split()
    assert row.split()[:5] == ["42", "RUNNING", "n[1-2]", "2", "ranks"]
    assert "  driver.py 5  " in row
    assert "-M big " in slurm_site.args("squeue")
    done = slurm_site("cancel", "42")
    assert (done.returncode, done.stderr) == (0, "cancelled: 42\n")
    assert slurm_site.args("scancel") == "-M big -Q 42\n"


def test_a_job_has_a_name_that_no_other_has(slurm_site: Site) -> None:
    done = slurm_site(*SUBMIT, "--name", "run1")
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    (folder,) = (slurm_site.state / "jobs").iterdir()
    assert folder.name == "run1"
    assert "--job-name=run1" in (folder / "script.sh").read_text()
    slurm_site.program("sbatch", "echo 43")
    for flags in ((), ("--dry-run",)):
        done = slurm_site(*SUBMIT, "--name", "run1", *flags)
        assert done.returncode == 1
        assert "there is a job called 'run1': take another name" in done.stderr
    done = slurm_site(*SUBMIT, "--name", "a/b")
    assert "letters, digits, - and _, not 'a/b'" in done.stderr
    done = slurm_site(*SUBMIT, "--name", "41")
    assert "the name 41 would be taken for the id of a job" in done.stderr
    assert slurm_site.args("sbatch").count("script.sh") == 1

    slurm_site.program("squeue", "echo '42|RUNNING|N/A|N/A|n[1-2]|None'")
    (folder / "log").write_text("first\nat step 7 of 9\n\n")
    for name in ("42", "run1"):
        done = slurm_site("jobs", name)
        row = done.stdout.splitlines()[1]
        assert "  run1  " in row, done
        assert "  at step 7 of 9  " in row, done
    done = slurm_site("jobs", "run2")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no job of hpcdist is called run2" in done.stderr

    (folder / "exit").write_text("0 1700000000 n1 \n")
    assert slurm_site("jobs", "--clear", "run1").returncode == 0
    assert slurm_site(*SUBMIT, "--name", "run1").stdout == "43\n"


def test_logs_are_shown_and_followed_until_the_job_has_ended(slurm_site: Site) -> None:
    slurm_site(*SUBMIT, "--name", "run1")
    log = slurm_site.state / "jobs" / "run1" / "log"
    done = slurm_site("logs", "run1")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"nothing has been written yet to {log}" in done.stderr
    log.write_bytes("one\n\u00e9 two".encode())
    assert slurm_site("logs", "42").stdout == "one\n\u00e9 two"
    done = slurm_site("logs", "run2")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no job of hpcdist is called run2" in done.stderr

    # It writes while it is asked for, and says itself that it has ended.
    job = log.parent
    slurm_site.program(
        "squeue",
        f"echo ' three' >>{job}/log; echo '0 1700000000 n1 ' >{job}/exit\n"
        "echo '42|RUNNING|N/A|N/A|n[1-2]|None'",
    )
    done = slurm_site("logs", "-f", "run1")
    assert (done.returncode, done.stdout) == (0, "one\n\u00e9 two three\n")
    assert done.stderr.splitlines() == ["job 42: RUNNING (n[1-2])", "job 42: COMPLETED (n1)"]


def test_cancel_of_a_job_that_the_scheduler_has_forgotten(slurm_site: Site) -> None:
    slurm_site(*SUBMIT)
    done = slurm_site("cancel", "42")
    assert done.returncode == 1
    assert "the scheduler no longer knows job 42" in done.stderr
    (folder,) = (slurm_site.state / "jobs").iterdir()
    (folder / "exit").write_text("0 1700000000 n1 \n")
    done = slurm_site("cancel", "42")
    assert (done.returncode, done.stderr) == (0, "job 42 has ended before: COMPLETED\n")
    assert slurm_site.args("scancel") == ""
    assert slurm_site("jobs").stdout == "no jobs; 1 older one(s): hpcdist jobs --all\n"
    assert "COMPLETED" in slurm_site("jobs", "--all").stdout
    assert slurm_site("jobs", "--clear").returncode == 0
    assert slurm_site("jobs", "--all").stdout == "no jobs\n"
    assert list((slurm_site.state / "jobs").iterdir()) == []


def test_a_scheduler_that_does_not_answer(slurm_site: Site) -> None:
    slurm_site(*SUBMIT)
    slurm_site.program("squeue", "echo 'squeue: error: Socket timed out' >&2; exit 1")
    for command in (["jobs"], ["cancel", "42"]):
        done = slurm_site(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Socket timed out" in done.stderr


@pytest.mark.parametrize(
    ("state", "facts", "code"),
    [
        (JobState.DONE, {"exit_code": 0}, 0),
        (JobState.DONE, {}, 0),
        (JobState.FAILED, {"exit_code": 7}, 7),
        (JobState.FAILED, {"exit_code": 0, "signal": 9}, 137),
        (JobState.CANCELLED, {"exit_code": 0, "signal": 15}, 143),
        (JobState.TIMEOUT, {"exit_code": 0}, 1),
        (JobState.UNKNOWN, {}, 1),
    ],
)
def test_only_a_job_that_is_done_gives_0(state: JobState, facts: dict[str, int], code: int) -> None:
    given = {"exit_code": None, "signal": None, **facts}
    assert exit_code(Verdict(state=state, word=state.value, **given)) == code


# --- the doctor ----------------------------------------------------------------


def _doctor(site: Site, *args: str) -> tuple[int, str]:
    done = site("doctor", "--scheduler", "slurm", *args)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def _needs_mpi() -> None:
    if mpi_flavour() == "none":
        pytest.skip("there is no mpiexec")


def test_doctor_of_a_sound_site(slurm_site: Site) -> None:
    _needs_mpi()
    code, out = _doctor(slurm_site)
    assert code == 0, out
    assert "✓ slurm 99.1: sbatch, squeue" in out
    assert "✓ the controller on head answers" in out
    assert "✓ sbatch --test-only accepts our script" in out
    assert "all (default)  up     1:00        3 of 4      8" in out
    assert "accounting (sacct) is off" in out
    assert "--test-only" in slurm_site.args("sbatch")
    assert not slurm_site.state.exists()


def test_doctor_of_a_site_where_much_is_wrong(slurm_site: Site) -> None:
    slurm_site.program("sbatch", "echo 'allocation failure: Invalid account' >&2; exit 1")
    slurm_site.program("srun", "echo 'MPI plugin types are...'; printf '\\tnone\\n'")
    slurm_site.program("sacct", "echo 'sacct: error: slurmdbd: Permission denied' >&2; exit 1")
    slurm_site.program("sinfo", "echo 'Good morning!'")
    jobs = slurm_site.state / "jobs"
    jobs.mkdir(parents=True)
    jobs.chmod(0o755)
    code, out = _doctor(slurm_site, "--mpi", "pmi2", "--account", "x")
    assert code == 1
    assert f"✗ {jobs} is open to others (mode 0755)\n  fix: chmod 700 {jobs}\n" in out
    assert "✗ sbatch --test-only refuses our script\n    allocation failure: Invalid account" in out
    assert "! sinfo lists no partition\n    Good morning!" in out
    assert "accounting (sacct) is forbidden" in out


def test_doctor_without_a_controller(slurm_site: Site) -> None:
    slurm_site.program("scontrol", "echo 'Slurmctld(primary) at head is DOWN'; exit 1")
    code, out = _doctor(slurm_site)
    assert code == 1
    assert "✗ the controller does not answer\n    Slurmctld(primary) at head is DOWN" in out
    assert not slurm_site.args("sbatch")


def test_doctor_without_commands(site: Site) -> None:
    code, out = _doctor(site)
    assert code == 1
    assert "✗ not on PATH: sbatch, squeue, scancel, srun, scontrol, sinfo" in out


def test_doctor_without_a_scheduler_looks_at_this_machine(site: Site) -> None:
    _needs_mpi()
    done = site("doctor")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "no scheduler was found on PATH" in done.stdout
    assert "✓ two ranks of one world start here" in done.stdout
    done = site("doctor", "--run")
    assert (done.returncode, done.stdout) == (1, "")


HERE = {"python": "3.12.1", "hpcdist": "1.0", "mpi4py": "4.1.0", "library": "Open MPI v5.0.1"}
THERE = {**HERE, "host": "n1", "reach": {"10.0.0.1 port 5": ""}, "size": 2, "hosts": ["n1", "n2"]}


@pytest.mark.parametrize(
    ("changes", "mark", "said"),
    [
        ({}, Mark.GOOD, "2 ranks are one world, on n1, n2"),
        ({"python": "3.6.8"}, Mark.BAD, "python: 3.6.8 there, 3.12.1 here"),
        ({"library": None, "size": None}, Mark.BAD, "MPI does not start there"),
        ({"size": 1}, Mark.BAD, "2 ranks were started, and MPI makes worlds of 1"),
        ({"reach": {"a port 1": "Connection refused"}}, Mark.BAD, "n1 cannot reach this machine"),
        (
            {"reach": {"a port 1": "Connection refused"}, "door": "it was not dialled"},
            Mark.BAD,
            "n1 cannot reach this machine, nor this machine n1",
        ),
        (
            {"reach": {"a port 1": "Connection refused"}, "door": ""},
            Mark.DOUBT,
            "process 1 dials workers",
        ),
        (
            {"reach": {"a port 1": "No route to host", "b port 2": ""}},
            Mark.DOUBT,
            "reaches this machine at b port 2, and not everywhere",
        ),
    ],
)
def test_what_a_test_job_saw_is_judged(changes: dict[str, Any], mark: Mark, said: str) -> None:
    findings = list(testjob.judge({**THERE, **changes}, HERE, 2))
    marks = [finding.mark for finding in findings]
    assert mark in marks
    assert (mark is Mark.BAD) == (Mark.BAD in marks)
    assert any(said in f"{finding.text}\n{finding.more}" for finding in findings)


def test_the_doorbell_answers_each_visitor() -> None:
    from hpcdist._cli.probe import reach

    bell = testjob.Doorbell(None)
    try:
        assert set(reach(bell.targets, bell.word).values()) == {""}
        assert set(reach(bell.targets, "x").values()) == {"another program answered there"}
    finally:
        bell.close()
    assert set(reach(bell.targets, bell.word).values()) == {"Connection refused"}


@pytest.mark.parametrize("family", ["mpich", "openmpi"])
def test_flavours_are_compared_with_the_library(
    family: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(site.bin))
    fitting = {"mpich": "pmi2", "openmpi": "pmix"}[family]
    site.program("srun", "printf '\\tnone\\n\\tpmi2\\n\\tpmix_v5\\n' >&2")

    def check(launcher: str) -> Mark:
        return slurm_checks.flavours(family, launcher).mark

    assert check(f"srun --mpi={fitting}") is Mark.GOOD
    assert check("mpiexec") is Mark.GOOD
    assert check("srun --mpi=none") is Mark.BAD
    site.program("srun", "true")
    assert check("srun --mpi=none") is Mark.DOUBT


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_the_modules(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"hpcdist.{name}")).failed == 0
