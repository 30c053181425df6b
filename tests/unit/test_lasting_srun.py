"""The srun that mpirun finds in a job of Slurm, with a script in place of the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdist._keeper import lasting_srun
from tests.helpers import eventually

REAL = """#!/bin/sh
printf '%s\n' "$*"
echo started >&2
"""


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The stand-in, in front of a script that each test completes."""
    real = tmp_path / "real"
    real.write_text(REAL)
    real.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}/none:{os.environ['PATH']}")
    path = lasting_srun.put_first(f"{tmp_path}/it's first", str(real))
    assert path.split(":")[:2] == [f"{tmp_path}/it's first", f"{tmp_path}/none"]
    return f"{tmp_path}/it's first/srun"


def more(tmp_path: Path, text: str) -> None:
    with open(tmp_path / "real", "a") as file:
        file.write(text)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_other_programs_are_started_as_they_are(srun: str, tmp_path: Path) -> None:
    more(tmp_path, "echo Node failure on n2 >&2\nexit 7\n")
    done = run(srun, "-n", "1", "it's mine")
    assert (done.returncode, done.stdout) == (7, "-n 1 it's mine\n")
    assert done.stderr == "started\nNode failure on n2\n"


@pytest.mark.parametrize("code", [0, 3])
def test_daemons_end_as_srun_does(srun: str, tmp_path: Path, code: int) -> None:
    more(tmp_path, f"exit {code}\n")
    done = run(srun, "-N1", "prted", "-x")
    assert (done.returncode, done.stderr) == (code, "started\n")
    assert done.stdout == "--no-kill --kill-on-bad-exit=0 --wait=0 -N1 prted -x\n"


def test_one_that_is_killed(srun: str, tmp_path: Path) -> None:
    more(tmp_path, "kill -KILL $$\n")
    assert run(srun, "prted").returncode == 128 + signal.SIGKILL


LAUNCHER = """
import subprocess, sys
process = subprocess.Popen([sys.argv[1], "prted"], start_new_session=True)
print(process.pid, flush=True)
sys.stdin.read()
"""


def test_after_a_lost_node_it_stays_as_long_as_mpirun(srun: str, tmp_path: Path) -> None:
    more(
        tmp_path, f"printf 'srun: error: Node fail' >&2\necho 'ure on n2' >&2\n: >{tmp_path}/over\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, srun],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        children = Path(f"/proc/{pid}/task/{pid}/children")
        # The real one has ended, and been waited for.
        eventually(lambda: (tmp_path / "over").exists() and not children.read_text())
        assert Path(f"/proc/{pid}").exists()
    eventually(lambda: not Path(f"/proc/{pid}").exists())


WAITS = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("ready", flush=True)
signal.sigwait([signal.SIGTERM])
sys.stderr.write("told\\n")
sys.exit(5)
"""


def test_signals_are_for_srun(srun: str, tmp_path: Path) -> None:
    # No trap of a shell: a signal that comes just before it waits is not seen.
    (tmp_path / "waits.py").write_text(WAITS)
    more(tmp_path, f"exec {sys.executable} -I -S {tmp_path}/waits.py\n")
    with subprocess.Popen(
        [srun, "prted"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        while b"ready" not in process.stdout.readline():
            pass
        process.terminate()
        assert process.stderr is not None
        assert process.stderr.read() == b"started\ntold\n"
        assert process.wait() == 5
