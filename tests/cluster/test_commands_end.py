"""A scheduler's command that hangs ends with the program that waits for it."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi

LONG = 40.0

DRIVER = """
import hpcdist
hpcdist.addprocs(hpcdist.SlurmManager(2), mpi="pmi2")
"""


def runs(os_pid: int) -> bool:
    try:
        return Path(f"/proc/{os_pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_submission_ends_with_its_driver(number: int, status: int, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    for name, text in {
        "sbatch": f"sleep 1000 & echo $$ $! >{pid}.new; mv {pid}.new {pid}; wait",
        "squeue": "true",
    }.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environ = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], env=environ, stderr=subprocess.PIPE, text=True
    ) as driver:
        processes = eventually(lambda: pid.exists() and pid.read_text(), LONG).split()
        assert driver.stderr is not None
        if number == signal.SIGKILL:  # what has not yet taken its time is not yet guarded
            eventually(lambda: guarded(driver.pid, int(processes[0])), LONG)
        driver.send_signal(number)
        said = driver.communicate(timeout=LONG)[1]
    assert driver.returncode == status, said
    for process in processes:
        eventually(lambda process=process: not runs(int(process)))
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in said
        assert "sbatch did not answer before the launch ended" in said


def guarded(parent: int, command: int) -> bool:
    listed = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(parent)], capture_output=True, text=True
    )
    return f"sh {command}\n" in listed.stdout
