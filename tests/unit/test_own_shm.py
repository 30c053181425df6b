"""Runs side by side do not see each other's shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Containers may forbid it, even to root.
ALLOWED = os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"]).returncode == 0
MAKE_AND_LIST = ["sh", "-c", "touch /dev/shm/hpcdist-theirs; ls /dev/shm"]


@pytest.mark.skipif(not ALLOWED, reason="no /dev/shm of its own here: it takes root")
def test_a_run_has_shared_memory_of_its_own() -> None:
    ours = Path("/dev/shm/hpcdist-ours")
    ours.touch()
    try:
        command = [sys.executable, "-m", "tests._own_shm", *MAKE_AND_LIST]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        there = os.listdir("/dev/shm")
    finally:
        ours.unlink()
    assert done.stdout.split() == ["hpcdist-theirs"]
    assert "hpcdist-theirs" not in there
