"""What runs on workers: what a victim is at when its end comes, and the ends it makes itself."""

import ctypes
import importlib
import os
import pickle
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy

import hpcdist

__all__ = [
    "Fate",
    "Part",
    "SlowToPickle",
    "SlowToRead",
    "arm",
    "busy",
    "length",
    "make",
    "mend",
    "piece",
    "probe",
    "section",
    "stuck_in_c",
]

MB = 1_000_000
_ROOM = 30 * MB  # what a process without memory may still grow by
_UNLIMITED = resource.RLIM_INFINITY


class Fate:
    """What is to befall this process once the file `go` is there."""

    def __init__(self) -> None:
        self.cause = ""
        self.fired = False
        self._folder = Path()

    def arm(self, folder: str, cause: str) -> None:
        """Wait for the word, on a thread of its own."""
        self.cause, self._folder = cause, Path(folder)
        if cause == "MPI_Abort":
            from mpi4py import MPI  # noqa: F401 - initialised before, as a program's would be
        threading.Thread(target=self._wait, daemon=True).start()

    def mend(self) -> None:
        """Be as others again."""
        self.fired = False
        resource.setrlimit(resource.RLIMIT_AS, (_UNLIMITED, _UNLIMITED))

    def say_here(self) -> None:
        """Say that the moment has come, if this is the victim."""
        if self.cause:
            (self._folder / "here").touch()

    def probe(self) -> None:
        """Do what fails now, if its cause leaves the process alive."""
        if not self.fired:
            return
        if self.cause == "memory":
            bytearray(400 * MB)
        elif self.cause == "import":
            importlib.import_module("benchmarks.crashes.broken")
        elif self.cause == "disk":
            path = Path(os.environ["TMPDIR"], f"probe-{os.getpid()}")
            try:
                path.write_bytes(bytes(8 * MB))
            finally:
                path.unlink()

    def _wait(self) -> None:
        while not (self._folder / "go").exists():
            time.sleep(0.005)
        befall(self.cause)
        self.fired = True


def befall(cause: str) -> None:
    """End this process, or take away what it needs."""
    if cause == "os._exit":
        os._exit(7)
    elif cause == "MPI_Abort":
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(7)
    elif cause == "memory":
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, _UNLIMITED))
    elif cause.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, cause))


FATE = Fate()  # of this process


def arm(folder: str, cause: str) -> int:
    """Prepare a victim; return its number with the operating system."""
    FATE.arm(folder, cause)
    return os.getpid()


def mend() -> None:
    """Make a victim that lives as others are."""
    FATE.mend()


def probe() -> int:
    """Do what fails now on a victim."""
    FATE.probe()
    return hpcdist.myid()


class Part:
    """Bytes, which travel beside the pickle; a victim may fail to read it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _read, (pickle.PickleBuffer(self.data),)


def _read(data: Any) -> Part:
    FATE.probe()
    return Part(data)


class SlowToRead:
    """Is read for ever, by a victim."""

    def __reduce__(self) -> Any:
        return _read_slowly, ()


def _read_slowly() -> None:
    busy()


class SlowToPickle:
    """Is pickled for ever, by a victim."""

    def __reduce__(self) -> Any:
        busy()
        return str, ()


def busy() -> None:
    """Run Python until the end."""
    FATE.say_here()
    while True:
        FATE.probe()
        sum(range(2000))


def stuck_in_c() -> None:
    """Hold the interpreter's lock in C, a twentieth of a second at a time."""
    FATE.say_here()
    while True:
        ctypes.PyDLL(None).usleep(50_000)
        FATE.probe()


def slow_to_pickle() -> SlowToPickle:
    """Return what takes for ever to pickle."""
    return SlowToPickle()


def never(_: Any) -> None:
    """Take what cannot be read."""


def length(part: Part) -> int:
    """Tell how much has arrived."""
    return len(memoryview(part.data))


def make(nbytes: int) -> Part:
    """Make something large."""
    FATE.probe()
    return Part(bytearray(nbytes))


def piece() -> Any:
    """Return this worker's part of a sum."""
    FATE.probe()
    return numpy.ones(MB)


def first(array: Any) -> float:
    """Return the first number of an array."""
    return float(array[0])


def section() -> None:
    """Meet the others in a collective operation of MPI, again and again."""
    comm = hpcdist.comm()
    while True:
        comm.allreduce(1)
        FATE.say_here()
        FATE.probe()


def total() -> int:
    """Add up the ids of a section's members."""
    return int(hpcdist.comm().allreduce(hpcdist.myid()))


def busy_until(path: str) -> str:
    """Compute, and let others have a turn, until a file is there."""
    while not os.path.exists(path):
        sum(range(2000))
        hpcdist.sleep(0.002)
    return "undisturbed"


def square(x: int) -> int:
    """An item of a map."""
    return x * x


def numbers() -> tuple[int, int]:
    """Tell how much memory, and how many descriptors, this process has."""
    return resident(os.getpid()), len(os.listdir("/proc/self/fd"))


def resident(os_pid: int) -> int:
    """Return how much memory a process has, but for what it shares."""
    _, all_pages, shared, *_ = map(int, Path(f"/proc/{os_pid}/statm").read_text().split())
    return (all_pages - shared) * resource.getpagesize()
