"""What a container has: /dev/shm of 64 MB, or of less."""

import os
import shutil
import subprocess
import sys

import pytest

from hpcdist._cluster.launch_errors import how_ended, shared_memory
from tests.helpers import mpi_flavour

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("unshare") is None, reason="it takes root to mount"
    ),
]


def with_room(size: str, text: str) -> "subprocess.CompletedProcess[str]":
    """Run a driver where /dev/shm is of this size."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec"
    command = ["unshare", "-m", "sh", "-c", f'{mount} "$0" -c "$1"', sys.executable, text]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def test_16_workers_fit_into_64_megabytes() -> None:
    """MPICH's wheel had UCX take 4 MB a rank that nobody used: SIGBUS, or SIGSEGV."""
    text = """
import hpcdist
hpcdist.addprocs(16, timeout=120)
print(hpcdist.spmd(lambda: hpcdist.comm().allreduce(1))[0])
"""
    done = with_room("64m", text)
    assert done.stdout == "16\n", done.stderr


@pytest.mark.skipif(
    mpi_flavour() == "openmpi", reason="it takes another way where there is no room"
)
def test_too_little_is_said_to_be() -> None:
    done = with_room("4m", "import hpcdist; hpcdist.addprocs(8)")
    assert done.returncode == 1
    assert "/dev/shm has 4 MB" in done.stderr, done.stderr


def test_a_death_by_sigbus_names_the_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    room = os.statvfs_result((4096, 4096, 16384, 100, 100, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: room)
    assert shared_memory().startswith("/dev/shm has 64 MB, of which 0 are free")
    assert how_ended(-7, here=True).startswith("killed by SIGBUS; /dev/shm has 64 MB")
    assert how_ended(-7, here=False) == "killed by SIGBUS"
    assert how_ended(-9, here=True) == "killed by SIGKILL"
