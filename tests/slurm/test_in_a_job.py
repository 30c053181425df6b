"""A driver that is a rank of an MPI launch over two nodes: `srun` or `mpiexec python driver.py`."""

import re
from textwrap import dedent
from typing import Any

import pytest

from tests.helpers import eventually, mpi_flavour, patient
from tests.slurm.cluster import Finished, Slurm
from tests.slurm.mpi import ENVIRONMENT, PMI, WRONG_PMI, mpiexec

pytestmark = pytest.mark.timeout(120)

BEGIN = """
import ctypes, os, signal, socket, sys, time
import hpcdist
from hpcdist import Future, RemoteChannel, myid, nprocs, procs, workers
from hpcdist import remotecall, remotecall_fetch, remote_do, fetch, rmprocs

hpcdist.init()
far = workers()[-1]
assert remotecall_fetch(socket.gethostname, far) != socket.gethostname()
"""

CORE = """
assert myid() == 1 and workers() == [2, 3, 4] and nprocs() == 4
assert [remotecall_fetch(myid, pid) for pid in procs()] == procs()
assert len({remotecall_fetch(socket.gethostname, pid) for pid in procs()}) == 2
for one in workers():
    for other in workers():
        assert remotecall_fetch(remotecall_fetch, one, myid, other) == other
big = os.urandom(1 << 20) * 20
assert remotecall_fetch(len, far, big) == len(big)
assert remotecall_fetch(lambda data: data[::-1], far, big) == big[::-1]

future = Future(far)
remote_do(future.put, 2, "from 2")
assert future.fetch() == remotecall_fetch(fetch, 3, future) == "from 2"
channel = RemoteChannel(2, pid=far)
def produce(channel):
    for k in range(50):
        channel.put(k)
    channel.close()
remotecall(produce, 2, channel)
assert list(channel) == list(range(50))
try:
    remotecall_fetch(divmod, far, 1, 0)
except ZeroDivisionError as error:
    assert str(far) in str(error) or far == error.pid
else:
    raise AssertionError("no error")
(beside,) = hpcdist.addprocs(1)
assert [remotecall_fetch(remotecall_fetch, far, myid, p) for p in (2, beside)] == [2, beside]
assert remotecall_fetch(remotecall_fetch, beside, myid, far) == far
rmprocs(beside)
print("good")
"""

PARALLEL = """
import operator
from hpcdist import distributed, everywhere, pmap, spmd

assert pmap(lambda x: x * x, range(200)) == [x * x for x in range(200)]
assert pmap(lambda x: x + 1, range(500), batch_size=20) == list(range(1, 501))

@distributed(range(10_000), operator.add)
def total(k):
    return k
assert total == sum(range(10_000))

everywhere("import math\\nanswer = 6 * 7")
assert [remotecall_fetch(lambda: answer, pid) for pid in workers()] == [42, 42, 42]

def together():
    comm = hpcdist.comm()
    return comm.allreduce(comm.rank), comm.size
assert set(spmd(together)) == {(3, 3)}
print("good")
"""


def run(
    slurm: Slurm, how: str, text: str, *args: str, timeout: float = 45, env: Any = None
) -> Finished:
    """Run a driver as rank 0 of four, two on each of two nodes."""
    driver = [slurm.python, slurm.program(text), *args]
    shape = ["--nodes=2", "--ntasks-per-node=2", "--nodelist=n1,n2"]
    environment = {**ENVIRONMENT, **(env or {})}
    if how == "srun":
        return slurm.login("srun", *PMI, *shape, *driver, timeout=timeout, env=environment)
    command = ["salloc", "--quiet", *shape, *mpiexec(4), *driver]
    return slurm.login(*command, timeout=timeout, env=environment)


HOW = pytest.mark.parametrize("how", ["srun", "mpiexec"])


@HOW
def test_core(how: str, slurm: Slurm) -> None:
    done = run(slurm, how, BEGIN + CORE)
    assert (done.rc, done.out) == (0, "good\n"), done
    assert "Traceback" not in done.err
    assert "WARN" not in done.err


@HOW
def test_parallel(how: str, slurm: Slurm) -> None:
    done = run(slurm, how, BEGIN + PARALLEL)
    assert (done.rc, done.out) == (0, "good\n"), done


def test_a_block(slurm: Slurm) -> None:
    text = """
        import hpcdist, os, socket
        from hpcdist import MPIManager, remotecall_fetch

        for turn in range(2):
            with hpcdist.cluster(MPIManager()) as pids:
                if pids is not None:
                    print(*[remotecall_fetch(socket.gethostname, pid) for pid in pids])
        print("after", flush=True)
    """
    done = run(slurm, "srun", dedent(text))
    assert done.rc == 0, done.err
    assert sorted(done.out.split("\n")) == ["", *["after"] * 4, *["n1 n2 n2"] * 2]


def test_output_comes_with_its_worker(slurm: Slurm) -> None:
    text = """
for pid in workers():
    remotecall_fetch(print, pid, "one\\ntwo")
    remotecall_fetch(lambda: print("three", file=sys.stderr), pid)
"""
    done = run(slurm, "srun", BEGIN + text)
    assert done.rc == 0, done.err
    lines = [f"From worker {pid}:\t{word}" for pid in (2, 3, 4) for word in ("one", "two")]
    assert done.out.splitlines() == lines
    for pid in (2, 3, 4):
        assert f"From worker {pid}:\tthree\n" in done.err


ENDS = {
    "end": ("pass", 0, ""),
    "exit": ("sys.exit(3)", 3, ""),
    "exception": ("raise LookupError('lost')", 1, "LookupError: lost"),
    "remote-exception": ("remotecall_fetch(divmod, far, 1, 0)", 1, "ZeroDivisionError"),
}


@HOW
@pytest.mark.parametrize("end", ENDS)
def test_the_exit_code_is_the_drivers(how: str, end: str, slurm: Slurm) -> None:
    text, code, words = ENDS[end]
    done = run(slurm, how, BEGIN + text)
    assert done.rc == code, done
    assert words in done.err
    assert ("Traceback" in done.err) == bool(words)


def test_a_job_fails_with_its_driver(slurm: Slurm) -> None:
    driver = slurm.program(BEGIN + "raise LookupError('lost')")
    launch = " ".join(["srun", *PMI, slurm.python, driver])
    job = slurm.submit(f"#!/bin/sh\n{launch}\n", "--nodes=2", "--ntasks=4", env=ENVIRONMENT)
    end = slurm.ended(job)
    assert (end.state, end.rc) == ("FAILED", 1), end
    assert "LookupError: lost" in end.out


BUSY = {
    "computing": "exec('while True: pass')",
    "asleep": "time.sleep(600)",
    "stuck-in-C": "ctypes.PyDLL(None).usleep(600_000_000)",
}


@HOW
@pytest.mark.parametrize("work", BUSY)
def test_a_busy_worker_elsewhere_holds_nobody_up(how: str, work: str, slurm: Slurm) -> None:
    text = f"""
def occupy(started):
    started.put(1)
    {BUSY[work]}
started = RemoteChannel(1)
remotecall(occupy, far, started)
started.take()
sys.exit(3)
"""
    done = run(slurm, how, BEGIN + text)
    if work == "stuck-in-C":  # only the launcher can end it, which says so by its own exit code
        assert done.rc != 0
        assert "worker 4 on n2 is stuck" in done.err
    else:
        assert done.rc == 3, done.err
    assert done.seconds < patient(30)


@HOW
def test_workers_end_with_a_driver_that_is_killed(how: str, slurm: Slurm) -> None:
    text = "remotecall(time.sleep, far, 600)\ntime.sleep(0.2)\nos.kill(os.getpid(), 9)"
    done = run(slurm, how, BEGIN + text)
    assert done.rc != 0
    assert done.seconds < patient(30)
    eventually(lambda: not slurm.processes(), timeout=10)


@pytest.mark.skipif(mpi_flavour() == "openmpi", reason="srun with Open MPI ends all with any")
@pytest.mark.parametrize("death", ["os._exit(5)", "os.kill(os.getpid(), 9)"])
def test_a_rank_that_dies_elsewhere_is_one_worker_less(death: str, slurm: Slurm) -> None:
    text = f"""
try:
    remotecall_fetch(lambda: {death}, far)
except hpcdist.ProcessExitedException as error:
    print(error.pid, error.host)
print(workers(), hpcdist.pmap(lambda x: 2 * x, range(4)))
"""
    done = run(slurm, "srun", BEGIN + text)
    assert done.out == "4 n2\n[2, 3] [0, 2, 4, 6]\n"
    assert done.rc != 0
    assert done.seconds < patient(30)


def test_a_rank_that_dies_ends_nothing_silently(slurm: Slurm) -> None:
    text = "remotecall_fetch(lambda: os.kill(os.getpid(), 9), far)"
    for how in ("srun", "mpiexec"):
        done = run(slurm, how, BEGIN + text)
        assert done.rc != 0
        assert done.seconds < patient(30)


def test_a_cancelled_job_leaves_nothing(slurm: Slurm) -> None:
    driver = slurm.program(BEGIN + "print('up', flush=True)\ntime.sleep(600)")
    launch = " ".join(["srun", *PMI, slurm.python, driver])
    job = slurm.submit(f"#!/bin/sh\n{launch}\n", "--nodes=2", "--ntasks=4", env=ENVIRONMENT)
    eventually(lambda: "up" in slurm.read(f"slurm-{job}.out"), timeout=30)
    slurm.login("scancel", job)
    assert slurm.ended(job).state == "CANCELLED"


@pytest.mark.parametrize("option", WRONG_PMI)
def test_a_launcher_that_does_not_match_is_told_of(option: str, slurm: Slurm) -> None:
    # Open MPI's: each task a world of its own, all of one host sharing a folder that none removes.
    slurm.expected += ["/tmp/ompi.*", "/dev/shm/sm_segment.*"]
    driver = slurm.program("import hpcdist\nhpcdist.init()\nprint('went on')")
    command = ["srun", f"--mpi={option}", "--nodes=2", "--ntasks=4", slurm.python, driver]
    done = slurm.login(*command, env=ENVIRONMENT)
    assert done.rc != 0
    assert "went on" not in done.out
    assert re.search(r"RuntimeError: .*one of 4 ranks.* world has 1", done.err), done.err
    assert f"`srun {PMI[0]}`" in done.err


def test_idle_ranks_do_not_spin(slurm: Slurm) -> None:
    text = """
def used():
    return time.process_time()
time.sleep(1)
before = [remotecall_fetch(used, pid) for pid in procs()]
time.sleep(4)
print(*[(remotecall_fetch(used, p) - b) / 4 for p, b in zip(procs(), before)])
"""
    done = run(slurm, "srun", BEGIN + text)
    assert done.rc == 0, done.err
    assert max(map(float, done.out.split())) < 0.25, done.out
