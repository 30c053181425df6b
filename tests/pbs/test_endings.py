"""How workers, drivers and jobs end, and what those who go on see of it."""

import signal

import pytest

from tests import helpers
from tests.helpers import eventually
from tests.pbs.cluster import Pbs
from tests.pbs.drivers import PRELUDE, run, says

STUCK = """
import ctypes

def stuck(flag):
    open(flag, "w").close()
    ctypes.PyDLL(None).sleep(600)  # in C, and with the interpreter's lock held

def hold(pids):
    futures = [remotecall(stuck, pid, f"stuck.{pid}") for pid in pids]
    until(lambda: all(os.path.exists(f"stuck.{pid}") for pid in pids))
    return futures

def why_in_time(future, word):
    error = future.exception(timeout=40)
    until(lambda: word in error.why)
    return error.why
"""
HEAD = PRELUDE + STUCK
# With the job's shell PBS kills everything at once, and leaves nobody the time to clear up.
_LEFT_BY_A_KILL = ["/dev/shm/*_segment.*", "/dev/shm/mpich_shm_*"]


TOO_LONG = (
    HEAD
    + """
pid, = addprocs(PBSManager(1))
waiting = remotecall(time.sleep, pid, 600)
say(job=next(row.job_id for row in h.status() if row.pid == pid))
say(why=why_in_time(waiting, "TIMEOUT"))
"""
)


def test_with_its_driver_a_job_ends(pbs: Pbs) -> None:
    pbs.expected.append(".hpcdist/jobs/*/*")  # nobody is left to clear it away
    driver = pbs.start(
        pbs.python,
        pbs.program(
            HEAD
            + "pids = addprocs(PBSManager(4), mpiprocs=2)\nhold([pids[0], pids[2]])\n"
            + "say(ready=True)\ntime.sleep(600)"
        ),
    )
    says(driver, "ready")
    driver.kill()
    driver.wait(20)
    eventually(lambda: not pbs.jobs(), 30)
    eventually(lambda: not pbs.processes("n1", "n2"), 30)
    assert not [name for name in pbs.files() if name.endswith("/join")]


def test_a_job_that_is_deleted(pbs: Pbs) -> None:
    pbs.expected += _LEFT_BY_A_KILL
    said = run(
        pbs,
        """
pids = addprocs(PBSManager(4), mpiprocs=2)
number = next(row.job_id for row in h.status() if row.pid == pids[0])
waiting = [remotecall(time.sleep, pid, 600) for pid in pids]
subprocess.run(["qdel", number], check=True)
why = []
for future in waiting:
    error = future.exception(timeout=40)
    assert isinstance(error, ProcessExitedException), error
    until(lambda: "CANCELLED" in error.why)
    why.append(error.why)
assert h.procs() == [1]
say(number=number, why=why)
rmprocs(addprocs(PBSManager(1)))
""",
    )
    for why in said["why"]:
        assert f"its job {said['number']} ended: CANCELLED" in why
    assert pbs.job(said["number"]).substate == 91


def test_a_job_that_takes_too_long(pbs: Pbs) -> None:
    pbs.expected += _LEFT_BY_A_KILL
    driver = pbs.start(pbs.python, pbs.program(TOO_LONG))
    job = says(driver, "job")
    pbs.server.exceed_walltime(job)
    assert f"its job {job} ended: TIMEOUT (exceeded resource walltime)" in says(driver, "why")
    assert driver.wait(30).rc == 0, driver.err


def test_the_death_of_a_worker(pbs: Pbs) -> None:
    """One death stays one death where the MPI can; else the world ends, and its job with it."""
    apart = helpers.mpi_flavour() == "openmpi"
    said = run(
        pbs,
        """
def die():
    os.kill(os.getpid(), 9)

def loss(pid):
    error = remotecall(die, pid).exception(timeout=40)
    assert isinstance(error, ProcessExitedException), error
    return error.why

pids = addprocs(PBSManager(4), mpiprocs=2)
if sys.argv[1] == "True":
    why = [loss(pids[1]), loss(pids[3])]
    left = [pids[0], pids[2]]
    assert h.workers() == left
    assert h.spmd(lambda: h.comm().allreduce(1), pids=left) == [2, 2]
    rmprocs(left[0])
    assert remotecall_fetch(h.myid, left[1]) == left[1]
else:
    why = [loss(pids[1])]
    until(lambda: h.workers() == [1])
say(why=why)
""",
        str(apart),
    )
    assert set(said["why"]) == {"killed by SIGKILL"}


def test_workers_that_are_no_world(pbs: Pbs) -> None:
    said = run(
        pbs,
        STUCK
        + """
def die():
    os.kill(os.getpid(), 9)

pids = addprocs(PBSManager(4), mpiprocs=2, isolation="process")
assert rows(pids) == [("n1", 0), ("n1", 1), ("n2", 2), ("n2", 3)], rows(pids)
why = [remotecall(die, pid).exception(timeout=40).why for pid in (pids[0], pids[3])]
assert remotecall_fetch(lambda q: remotecall_fetch(h.myid, q), pids[1], pids[2]) == pids[2]
remotecall_fetch(print, pids[2], "hello")
future, = hold([pids[2]])  # on the other host
rmprocs(pids[2])
why.append(future.exception(timeout=40).why)
assert h.workers() == [pids[1]]
say(why=why)
""",
    )
    assert said["why"] == ["killed by SIGKILL", "killed by SIGKILL", "removed"]
    assert "From worker 4:\thello" in said["out"]


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_driver_that_is_told_to_end(pbs: Pbs, number: signal.Signals) -> None:
    pbs.expected.append(".hpcdist/jobs/*/*")
    driver = pbs.start(
        pbs.python, pbs.program(HEAD + "addprocs(PBSManager(2))\nsay(up=1)\ntime.sleep(600)")
    )
    says(driver, "up")
    driver.send(number)
    assert driver.wait(20).rc == -number
    eventually(lambda: not pbs.jobs(), 30)


def test_a_job_stays_for_the_next_launch(pbs: Pbs) -> None:
    text = """
options = {"mpiprocs": 2, "walltime": "0:10:00", "linger": 60}
with h.cluster(PBSManager(4), **options) as pids:
    job = h.status()[1].job_id
until(lambda: list(RUNS.glob("*/lingering")))
pids = addprocs(PBSManager(4), **options)
assert {row.job_id for row in h.status() if row.pid in pids} == {job}
assert h.spmd(lambda: h.comm().allreduce(h.comm().rank), pids=pids) == [6] * 4
h.shutdown(release=True)
until(lambda: not list(RUNS.iterdir()))
"""
    done = run(pbs, text)
    assert " left) instead of queueing" in done["err"], done
