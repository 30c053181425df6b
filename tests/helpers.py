"""Small things that tests import by name: `from tests.helpers import eventually`."""

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = [
    "eventually",
    "faults_of_temporaries",
    "kill9",
    "mpi_environment",
    "mpi_flavour",
    "mpiexec",
    "patient",
]

T = TypeVar("T")

# What Open MPI 5 needs as root, and with more ranks than cores; MPICH takes no notice. The Makefile
# has the same table for the run inside a world.
_MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_btl": "sm,self,tcp",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def patient(seconds: float) -> float:
    """Return how long to wait for what takes a while on a machine with nothing else to do.

    Limits find what never ends: on a crowded machine all that does end takes as much longer.
    """
    cores = len(os.sched_getaffinity(0))
    return seconds * min(5.0, max(1.0, os.getloadavg()[0] / (3 * cores)))


def eventually(predicate: Callable[[], T], timeout: float = 30.0, message: str = "") -> T:
    """Wait until `predicate` returns something true, and return that.

    Wait on the condition, never for a fixed time: the test is then as quick as the machine and does
    not fail on a slow one.
    """
    begin = time.monotonic()
    pause = 0.001
    while not (value := predicate()):
        if time.monotonic() >= begin + timeout and time.monotonic() >= begin + patient(timeout):
            what = message or f"{getattr(predicate, '__qualname__', predicate)} did not become true"
            raise AssertionError(f"{what} (after {timeout:g} s; last value: {value!r})")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    return value


def kill9(os_pid: int) -> None:
    """Kill a process in the way nobody can handle."""
    os.kill(os_pid, signal.SIGKILL)


def mpiexec(ranks: int) -> list[str]:
    """Return the start of a command line that launches `ranks` ranks with our MPI."""
    return [str(_mpiexec_path()), "-n", str(ranks)]


def mpi_environment() -> dict[str, str]:
    """Return the variables under which `mpiexec` starts any number of ranks, as any user."""
    return dict(_MPI_ENVIRONMENT)


@functools.cache
def mpi_flavour() -> str:
    """Return "mpich", "openmpi", "intel", or "none" where there is no mpiexec."""
    try:
        command = [str(_mpiexec_path()), "--version"]
    except FileNotFoundError:
        return "none"
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    text = answer.stdout + answer.stderr
    # How the three introduce themselves: "HYDRA build details", "mpiexec (Open MPI) 5.0.11",
    # "Intel(R) MPI Library for Linux* OS".
    for word, flavour in (("Intel", "intel"), ("Open MPI", "openmpi"), ("HYDRA", "mpich")):
        if word in text:
            return flavour
    return "unknown"


def _mpiexec_path() -> Path:
    # Not resolved: in a virtual environment python is a link, and mpiexec lies beside the link.
    beside = Path(sys.executable).parent / "mpiexec"
    if beside.exists():
        return beside
    found = shutil.which("mpiexec")
    if found is None:
        raise FileNotFoundError(f"no mpiexec, neither at {beside} nor on PATH")
    return Path(found)


def faults_of_temporaries() -> int:
    """Count the page faults of a loop that makes eight temporary arrays of 800 KB each time."""
    import numpy

    def work() -> None:
        for _ in range(50):
            [numpy.arange(100_000.0) for _ in range(8)]

    work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def cpu_seconds(os_pid: int) -> float:
    """Return how much processor time a process has used, as the kernel counts it in nanoseconds.

    Not as `stat` does: that charges a whole tick, 10 ms, to one that happens to run at its end.
    """
    total = 0
    for thread in Path(f"/proc/{os_pid}/task").iterdir():
        try:
            total += int((thread / "schedstat").read_text().split()[0])
        except FileNotFoundError:  # it has just ended
            continue
    return total / 1e9
