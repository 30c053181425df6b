"""What a worker has started ends after it, whatever session it is in."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import eventually

STARTER = """
import os, subprocess, sys
from hpcdist._keeper.escaped_processes import sweep_after

sweep_after(sys.argv[1])
loose = subprocess.Popen(["sleep", "599"], start_new_session=True)
foreign = subprocess.Popen(["sleep", "599"], start_new_session=True, env={"HPCDIST_MARK": "other."})
job = {**os.environ, "SLURM_JOB_ID": "7"}
submitted = subprocess.Popen(["sleep", "599"], start_new_session=True, env=job)
print(loose.pid, foreign.pid, submitted.pid, flush=True)
if os.fork() == 0:
    ends = os.pipe()  # by the numbers that the sweeper's pipe had
    if os.fork() == 0:
        os.write(ends[1], bytes([os.fstat(ends[0]).st_nlink]))
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
print("forked", os.wait()[1], flush=True)
sys.stdin.read()
"""


def runs(os_pid: int) -> bool:
    try:
        return Path(f"/proc/{os_pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("job", [None, "6"])
def test_what_carries_the_mark_ends_with_a_worker(
    job: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not a job that the worker has submitted."""
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("JOB_ID", f"{job}.host")
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, f"{tmp_path.name}.0."],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdout is not None
        loose, foreign, submitted = map(int, worker.stdout.readline().split())
        assert worker.stdout.readline() == "forked 0\n"
        assert runs(loose)
        worker.kill()
    try:
        eventually(lambda: not runs(loose), 20)
        assert runs(foreign)
        assert runs(submitted)
    finally:
        subprocess.run(["kill", str(foreign), str(submitted)], check=True)
