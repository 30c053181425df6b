"""Workers in jobs at work: all of the core and of the parallel layer, between jobs too."""

import re
import signal

import pytest

from tests.helpers import eventually, mpi_flavour
from tests.slurm.cluster import Finished, Slurm
from tests.slurm.drivers import PRELUDE


def run(slurm: Slurm, text: str, timeout: float = 90) -> Finished:
    """Run a driver to its good end."""
    done = slurm.driver(PRELUDE + text, timeout=timeout)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    return done


def test_two_jobs_and_local_workers_work_together(slurm: Slurm) -> None:
    done = run(
        slurm,
        """
import operator
import numpy as np

local = addprocs(2)
one = addprocs(SlurmManager(3), nodes=3, ntasks_per_node=1)
two = addprocs(SlurmManager(2), nodelist="n2")
everyone = local + one + two
assert h.workers() == everyone and h.nprocs() == 8

# From each to each, and about each other.
assert everywhere.call(h.myid) == {pid: pid for pid in h.procs()}
def reach(pids):
    return [remotecall_fetch(h.myid, pid) for pid in pids]
answers = [h.remotecall(reach, pid, h.procs()) for pid in everyone]
assert all(answer.fetch(timeout=30) == h.procs() for answer in answers)
assert everywhere.call(h.procs) == {pid: h.procs() for pid in h.procs()}
assert everywhere.call(h.nworkers, pids=everyone) == dict.fromkeys(everyone, 7)
hosts = {row.pid: row.host for row in h.status()}
assert [hosts[pid] for pid in everyone] == ["login", "login", "n1", "n2", "n3", "n2", "n2"], hosts
assert h.procs(two[0]) == [one[1], *two] and set(h.procs(1)) == {1, *local}
assert remotecall_fetch(h.procs, one[0], two[0]) == h.procs(two[0])
table = str(h.status())
assert "SlurmManager" in table and "LocalManager" in table and "n3" in table, table
assert {row.job_id for row in h.status() if row.pid in one} != {None}

# A channel of one job, filled from another, drained by a local worker.
channel = h.RemoteChannel(3, one[0])
filling = h.remotecall(lambda ch: [h.put(ch, i) for i in range(20)], two[1], channel)
assert remotecall_fetch(lambda ch: [h.take(ch) for _ in range(10)], local[0], channel) == \\
    list(range(10))
assert [channel.take(timeout=20) for _ in range(10)] == list(range(10, 20))
filling.wait()
h.close(channel)
try:
    remotecall_fetch(lambda ch: h.take(ch), two[0], channel)
except h.RemoteException as exc:  # the call's own error is what it let through
    assert isinstance(exc.cause, h.ChannelClosed), exc
else:
    raise AssertionError("closed, and yet taken from")

assert h.pmap(lambda x: x * x, range(60)) == [x * x for x in range(60)]
used = set(h.pmap(lambda x: (time.sleep(0.02), h.myid())[1], range(80), batch_size=1))
assert used == set(everyone), used
assert h.distributed(range(100), operator.add)(lambda i: i) == 4950
# In order of pid: the operation need not commute.
assert h.reduce(operator.add, lambda: [h.myid()], pids=everyone) == everyone
total = h.reduce(operator.add, lambda: np.full(100_000, float(h.myid())), pids=everyone)
assert total.shape == (100_000,) and (total == sum(everyone)).all()
parts = h.scatter(list(range(14)))
assert h.gather(parts) == [[2 * i, 2 * i + 1] for i in range(7)]
assert h.spmd(lambda: h.comm().allreduce(h.myid()), pids=one) == [sum(one)] * 3
both = [h.spmd.submit(lambda: h.comm().allgather(h.myid()), pids=pids) for pids in (one, two)]
assert [future.result(30) for future in both] == [[one] * 3, [two] * 2]

everywhere("import math; shared = math.pi")
assert remotecall_fetch(lambda: shared, two[0]) == shared
everywhere("later = 42", later=True)
(late,) = addprocs(SlurmManager(1))
assert remotecall_fetch(lambda: later, late) == 42

# Errors, and an interrupt.
try:
    remotecall_fetch(lambda: 1 / 0, two[0])
except ZeroDivisionError as exc:
    assert exc.pid == two[0] and "lambda" in exc.traceback
sleeping = h.remotecall(time.sleep, one[2], 600)
until(lambda: {row.pid: row.running for row in h.status()}[one[2]] == 1)
h.interrupt(one[2])
try:
    sleeping.fetch(timeout=20)
except h.RemoteException as exc:
    assert isinstance(exc.cause, KeyboardInterrupt), exc
assert remotecall_fetch(h.myid, one[2]) == one[2]

# What workers print arrives once, in whole lines, from where it was said.
for pid in everyone:
    remotecall_fetch(lambda: print("out of", h.myid()), pid)
    remotecall_fetch(lambda: print("err of", h.myid(), file=sys.stderr), pid)
remotecall_fetch(lambda: os.system(f"echo a child of {h.myid()}"), two[1])
print("everyone:", *everyone)

# One goes, the others stay; the last of a job takes the job along.
(job_of_one,) = {row.job_id for row in h.status() if row.pid in one}
rmprocs(one[1])
assert one[1] not in h.workers() and reach(one[::2]) == one[::2]
assert remotecall_fetch(reach, two[0], one[::2]) == one[::2]
try:
    h.remotecall(h.myid, one[1])
except h.ProcessExitedException as exc:
    assert exc.pid == one[1]
rmprocs(one)
until(lambda: f"{job_of_one} RUNNING" not in queue())
assert len(queue()) == 2 and reach(two) == two
h.shutdown()
assert h.procs() == [1]
nothing_left()
(pid,) = addprocs(SlurmManager(1))  # and again
assert pid > late and remotecall_fetch(h.myid, pid) == pid
""",
        timeout=120,
    )
    everyone = re.search(r"^everyone: (.*)$", done.out, re.MULTILINE)
    assert everyone is not None
    for pid in everyone[1].split():
        assert done.out.count(f"From worker {pid}:\tout of {pid}\n") == 1, done.out
        assert done.err.count(f"From worker {pid}:\terr of {pid}\n") == 1, done.err
    assert len(re.findall(r"From worker (\d+):\ta child of \1\n", done.out)) == 1, done.out
    eventually(lambda: not slurm.jobs(), 10)


def test_tasks_of_several_ranks_on_several_hosts(slurm: Slurm) -> None:
    run(
        slurm,
        """
pids = addprocs(SlurmManager(4), nodes=2, ntasks_per_node=2)
hosts = {row.pid: row.host for row in h.status()}

def who(k):
    h.comm().Barrier()
    return h.comm().allgather(h.myid())

sizes = [2, 2, 4, 1, 3, 2] * 5
futures = [h.spmd.submit(who, k, ranks=ranks) for k, ranks in enumerate(sizes)]
found = [future.result(60) for future in futures]
assert [len(set(pids)) for pids in found] == sizes, found
pairs = [{hosts[pid] for pid in pids} for pids in h.pmap(who, range(40), ranks=2)]
assert all(len(pair) == 1 for pair in pairs), pairs
assert set.union(*pairs) == set(hosts.values()) - {hosts[1]}, pairs
try:
    h.spmd.submit(who, 0, ranks=5)
except ValueError as exc:
    assert "has 4" in str(exc)
else:
    raise AssertionError("five ranks of four")
""",
    )


def test_a_large_value_crosses_to_each_job_once(slurm: Slurm) -> None:
    run(
        slurm,
        """
import numpy as np

def sent():
    rows = [line.split() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    # The login node is also the switch of this cluster: what it sends itself goes out by br0.
    return sum(int(row[9]) for row in rows if row[0] == "br0:")

pids = addprocs(SlurmManager(8), nodes=2, ntasks_per_node=4)
h.bcast(np.zeros(1000)).free()
value = np.arange(1 << 23, dtype=np.float64)  # 64 MB
before = sent()
spread = h.bcast(value)
crossed = sent() - before
print("crossed", crossed / value.nbytes)
assert crossed < 1.1 * value.nbytes, crossed / value.nbytes
seen = everywhere.call(lambda v: (float(v.sum()), v.flags.writeable), spread, pids=pids)
assert set(seen.values()) == {(float(value.sum()), False)}, seen
assert sent() - before < 1.1 * value.nbytes
spread.free()

# Between jobs: the other one gets it once too.
two = addprocs(SlurmManager(2))
before = sent()
with h.bcast(value, pids=[*pids, *two]) as spread:
    assert all(everywhere.call(lambda v: len(v), spread, pids=[*pids, *two]).values())
    print("to two jobs crossed", (sent() - before) / value.nbytes)
    assert sent() - before < 2.2 * value.nbytes
""",
        timeout=120,
    )


@pytest.mark.parametrize("end", ["exit", "raise", "ctrl-c", "kill"])
def test_nothing_is_left_when_the_driver_has_ended(slurm: Slurm, end: str) -> None:
    driver = slurm.start(
        slurm.python,
        slurm.program(
            PRELUDE
            + """
def spin():
    while True:
        pass

pids = addprocs(SlurmManager(4), nodes=2) + addprocs(SlurmManager(2), split=1)
h.remotecall(time.sleep, pids[0], 600)
h.remotecall(spin, pids[1])
h.remotecall(sum, pids[2], range(10**12))  # stuck in C
print("busy", flush=True)
if sys.argv[1] == "exit":
    sys.exit(3)
if sys.argv[1] == "raise":
    raise ValueError("so be it")
time.sleep(600)
"""
        ),
        end,
    )
    eventually(lambda: "busy" in driver.out or driver.process.poll() is not None, 30)
    assert "busy" in driver.out, driver.err
    if end == "ctrl-c":
        driver.send(signal.SIGINT)
    elif end == "kill":
        driver.send(signal.SIGKILL)
    done = driver.wait(30)
    assert done.rc == {"exit": 3, "raise": 1}.get(end, done.rc), done
    assert end != "exit" or done.err == "", done.err
    eventually(lambda: not slurm.jobs(), 30, message="jobs are left")
    if end == "kill":  # nobody was there to clear up
        slurm.expected.append(".hpcdist/jobs/*/*")
        slurm.expected.append(".hpcdist/jobs/*/*/*")


@pytest.mark.skipif(mpi_flavour() == "openmpi", reason="it is about MPICH's wheel")
def test_the_wheel_of_mpich_does_without_sockets(slurm: Slurm) -> None:
    """Left alone it takes libfabric's "sockets", with which MPI_Init stands still now and then."""
    run(
        slurm,
        """
for env, expected in ({}, "^sockets"), ({"FI_PROVIDER": "tcp"}, "tcp"):
    pids = addprocs(SlurmManager(6), nodes=3, env=env)
    assert remotecall_fetch(lambda: os.environ["FI_PROVIDER"], pids[-1]) == expected
    assert h.spmd(lambda: h.comm().allreduce(1)) == [6] * 6
    rmprocs(pids)
os.environ["FI_PROVIDER"] = "tcp"
assert asked(addprocs(SlurmManager(1))[0], lambda: os.environ["FI_PROVIDER"]) == "tcp"
""",
    )


def test_many_workers_on_two_nodes(slurm: Slurm) -> None:
    # While Open MPI initialises, its ranks ask and ask: 64 of them take two cores for minutes.
    count = 64 if mpi_flavour() == "mpich" else 24
    run(
        slurm,
        f"count = {count}"
        """
begin = time.monotonic()
nice = ["nice"]  # or they would hold up all tests beside this one
pids = addprocs(
    SlurmManager(count), nodes=2, ntasks_per_node=count // 2, timeout=300, wrapper=nice
)
up = time.monotonic() - begin
assert len(pids) == count
begin = time.monotonic()
assert everywhere.call(h.myid, pids=pids) == {pid: pid for pid in pids}
print("up in", round(up, 1), "s; everywhere", round(time.monotonic() - begin, 2), "s")
assert len(h.pmap(lambda x: x, range(500))) == 500
begin = time.monotonic()
rmprocs(pids)
print("gone in", round(time.monotonic() - begin, 1), "s")
nothing_left()
""",
        timeout=400,
    )
