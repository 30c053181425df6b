"""Drivers in jobs are started again when their time is up: `hpcdist submit --resubmit`.

Slurm's programs are scripts on PATH; the job's own script is really run.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.test_cli_batch import SUBMIT, Site
from tests.helpers import eventually

OVER = "2026-01-01T00:00:00|2026-01-01T01:00:00|n1|TimeLimit"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A Slurm whose jobs are 42, 43 and so on, until the test says what becomes of them."""
    site = Site(tmp_path)
    site.program(
        "sbatch",
        f"n=42; while [ -e {site.bin}/$n ]; do n=$((n+1)); done; : >{site.bin}/$n; echo $n",
    )
    site.program("squeue", "true")
    site.program("scontrol", "true")
    site.program("sacct", "exit 1")
    site.program("scancel", "true")
    return site


def says(site: Site, job: int, word: str) -> None:
    site.program("squeue", f"echo '{job}|{word}|{OVER}'")
    site.program("scontrol", f"printf 'JobId={job} JobName=x\\n   JobState={word} Reason=None\\n'")


def manifest(site: Site) -> dict[str, object]:
    found: dict[str, object] = json.loads(
        (site.state / "jobs" / "run" / "manifest.json").read_text()
    )
    return found


def submitted(site: Site) -> list[str]:
    return [line.rpartition("/")[2] for line in site.args("sbatch").splitlines()]


def test_who_looks_has_it_submitted_again_until_the_count_is_full(site: Site) -> None:
    done = site(*SUBMIT, "--name", "run", "--resubmit", "2")
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    exit_file = site.state / "jobs" / "run" / "exit"
    exit_file.write_text("143 1700000000 n1 TERM\n")
    says(site, 42, "TIMEOUT")
    row = site("jobs").stdout.splitlines()[1]
    assert row.startswith("43 "), row
    assert "driver.py (try 2 of 3)" in row
    assert not exit_file.exists()

    says(site, 43, "PREEMPTED")
    exit_file.write_text("143 1700000000 n1 TERM\n")
    site("jobs")
    says(site, 44, "TIMEOUT")
    exit_file.write_text("143 1700000000 n1 TERM\n")
    row = site("jobs", "run").stdout.splitlines()[1]
    assert row.split()[:2] == ["44", "TIMEOUT"]
    assert "driver.py (try 3 of 3)" in row
    assert manifest(site)["earlier"] == [["42", None], ["43", None]]
    assert submitted(site) == ["script.sh", "again-1.sh", "again-2.sh"]


@pytest.mark.parametrize("word", ["CANCELLED", "FAILED", "NODE_FAIL", "COMPLETED", "RUNNING"])
def test_other_ends_are_the_end(site: Site, word: str) -> None:
    site(*SUBMIT, "--name", "run", "--resubmit", "2")
    says(site, 42, word)
    assert site("jobs", "run").stdout.splitlines()[1].split()[:2] == ["42", word]
    assert submitted(site) == ["script.sh"]


def test_wait_goes_on_with_the_next_job(site: Site) -> None:
    job = site.state / "jobs" / "run"
    says(site, 42, "TIMEOUT")
    site.program(
        "sbatch",
        f"if [ -e {site.bin}/42 ]; then echo 43; echo '7 1700000000 n1 ' >{job}/exit\n"
        f"else : >{site.bin}/42; echo 42; echo '143 1700000000 n1 TERM' >{job}/exit; fi",
    )
    done = site(*SUBMIT, "--name", "run", "--resubmit", "3", "--wait")
    assert (done.returncode, done.stdout) == (7, "42\n"), done.stderr
    assert "job 42: TIMEOUT; job 43 goes on with it" in done.stderr
    assert "job 43: FAILED, exit code 7" in done.stderr


def test_logs_wait_for_the_scheduler_to_say_why_a_script_was_told_to_end(site: Site) -> None:
    site(*SUBMIT, "--name", "run", "--resubmit", "3")
    job = site.state / "jobs" / "run"
    (job / "exit").write_text(f"143 {int(time.time())} n1 TERM\n")
    (job / "log").write_text("first\n")
    # It is listed as ending at first, then as over its time; of the next job the script tells.
    site.program(
        "squeue",
        f"[ -e {site.bin}/43 ] && exit\n"
        f"if [ -e {site.bin}/asked ]; then echo '42|TIMEOUT|{OVER}'; "
        f"else : >{site.bin}/asked; echo '42|COMPLETING|{OVER}'; fi",
    )
    site.program(
        "sbatch", f": >{site.bin}/43; echo 43; echo second >>{job}/log; echo '0 1 n1' >{job}/exit"
    )
    done = site("logs", "-f", "run")
    assert (done.returncode, done.stdout) == (0, "first\nsecond\n"), done.stderr
    assert "job 43: COMPLETED" in done.stderr


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5"])
def test_a_count_that_is_none(site: Site, count: str) -> None:
    done = site(*SUBMIT, f"--resubmit={count}")
    assert done.returncode == 2
    assert f"'{count}' is not a number of 1 or more" in done.stderr
    assert submitted(site) == []


@pytest.mark.parametrize("due", [True, False])
def test_the_script_submits_itself_when_its_time_is_up(site: Site, due: bool) -> None:
    site.program("srun", f": >{site.bin}/at-work; exec sleep 600")
    for program in ("sleep", "chmod", "rm"):
        (site.bin / program).symlink_to(f"/bin/{program}")
    site(*SUBMIT, "--name", "run", "--resubmit", "1", "-t", "5")
    folder = site.state / "jobs" / "run"
    says(site, 42, "RUNNING")
    env = {"PATH": str(site.bin), "HPCDIST_DIR": str(site.state), "HOME": str(site.folder)}
    ends = {"SLURM_JOB_END_TIME": str(int(time.time()))} if due else {}
    with open(folder / "log", "w") as log:
        script = subprocess.Popen(
            ["bash", str(folder / "script.sh")],
            env={**env, **ends, "SLURM_JOB_ID": "42"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        eventually(lambda: (site.bin / "at-work").exists(), 30)
        script.send_signal(signal.SIGTERM)
        script.wait(60)
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
    said = (folder / "log").read_text()
    if due:
        assert "this job TIMEOUT: submitted again as job 43 (try 2 of 2)" in said
        assert submitted(site) == ["script.sh", "again-1.sh"]
        assert not (folder / "exit").exists()
    else:
        assert submitted(site) == ["script.sh"], said
        assert (folder / "exit").read_text().startswith("143 ")
