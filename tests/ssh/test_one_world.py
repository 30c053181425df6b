"""`isolation="world"`: one MPI world over all hosts, without a launcher; ends within it."""

import pytest

from tests.helpers import mpi_flavour
from tests.ssh.hosts import Hosts
from tests.ssh.test_addprocs_ssh import run

mpich_only = pytest.mark.skipif(mpi_flavour() == "openmpi", reason="Open MPI's worlds need prterun")


@mpich_only
def test_ranks_of_two_hosts_are_one_world(hosts: Hosts) -> None:
    run(
        hosts,
        """
pids = addprocs([("n1", 2), ("nickname", 2)], isolation="world")
assert pids == [2, 3, 4, 5], pids
names = [remotecall_fetch(socket.gethostname, p) for p in pids]
assert names == ["n1", "n1", "n2", "n2"], names
assert [s.rank for s in h.status() if s.pid != 1] == [0, 1, 2, 3]
for a in pids:
    for b in pids:
        assert remotecall_fetch(lambda b: remotecall_fetch(h.myid, b), a, b) == b
assert h.procs(2) == [2, 3]

def ring():
    import numpy
    comm = h.comm()
    ours, theirs = numpy.full(300_000, float(comm.rank)), numpy.empty(300_000)
    comm.Sendrecv(ours, (comm.rank + 1) % comm.size, recvbuf=theirs)
    return comm.size, float(theirs[-1]), comm.allreduce(comm.rank)

assert h.spmd(ring) == [(4, 3.0, 6), (4, 0.0, 6), (4, 1.0, 6), (4, 2.0, 6)]
assert h.bcast(b"x" * 5_000_000).fetch() == b"x" * 5_000_000
assert h.distributed(range(100), lambda a, b: a + b)(lambda i: i) == 4950
assert list(h.pmap(lambda i: i * i, range(500))) == [i * i for i in range(500)]
beside = addprocs([("n2", 1)])
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, 2), beside[0]) == 2
rmprocs(3)
assert h.spmd(lambda: h.comm().size, pids=[2, 4, 5]) == [3, 3, 3]
rmprocs(h.workers())
""",
    )


@mpich_only
def test_one_death_in_it_is_one_death(hosts: Hosts) -> None:
    run(
        hosts,
        """
a, b, c = addprocs([("n1", 2), "n2"], isolation="world")
assert h.spmd(lambda: h.comm().allreduce(1)) == [3, 3, 3]
os_pid = remotecall_fetch(os.getpid, a)
later = h.remotecall(time.sleep, a, 600)
remotecall_fetch(os.kill, b, os_pid, signal.SIGKILL)
exc = death_of(later)
assert exc.pid == a and exc.host == "n1" and "SIGKILL" in exc.why, (exc, exc.why)
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, c), b) == c
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, b), c) == b

# Its ssh: the host's workers end with it, and only they.
later = h.remotecall(time.sleep, b, 600)
subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "-f", " n1 "], check=True)
exc = death_of(later)
assert "the ssh connection to n1 ended" in exc.why, exc.why
assert h.workers() == [c]
assert remotecall_fetch(h.myid, c) == c
""",
    )


@mpich_only
def test_the_wheel_meets_over_a_network_that_works(hosts: Hosts) -> None:
    run(
        hosts,
        """
where = [("n1", 1), "n2"]
names = "MPIR_CVAR_CH4_NETMOD", "FI_PROVIDER"
for env, expected in ({}, ["ofi", "^sockets"]), ({"FI_PROVIDER": "tcp"}, ["ofi", "tcp"]):
    for pid in addprocs(where, isolation="world", env=env):
        assert remotecall_fetch(lambda: [os.environ.get(n) for n in names], pid) == expected
    rmprocs(h.workers())
""",
    )


@mpich_only
def test_hosts_of_an_mpi_manager(hosts: Hosts) -> None:
    run(
        hosts,
        """
pids = addprocs(h.MPIManager(3, hosts=["n1", "n2"]))
names = [remotecall_fetch(socket.gethostname, p) for p in pids]
assert names == ["n1", "n1", "n2"], names
assert h.spmd(lambda: h.comm().allreduce(1)) == [3, 3, 3]
assert h.status()[1].manager == "MPIManager"
rmprocs(pids)
""",
    )


@mpich_only
def test_a_host_that_fails_ends_the_launch_and_is_named(hosts: Hosts) -> None:
    run(
        hosts,
        """
try:
    addprocs(["n1", "nowhere.invalid", "n2"], isolation="world")
except LaunchError as exc:
    assert "nowhere.invalid" in str(exc), exc
else:
    raise AssertionError("it came up")
assert h.workers() == [1]
until(lambda: not subprocess.run(["pgrep", "-P", str(os.getpid()), "ssh"]).returncode == 0)
assert addprocs(["n1", "n2"], isolation="world") == [2, 3] or h.workers()
""",
    )


def test_what_excludes_each_other_is_told(hosts: Hosts) -> None:
    run(
        hosts,
        """
try:
    addprocs(["n1", "n2"], isolation="world", tunnel=True)
except ValueError as exc:
    assert "tunnel=True" in str(exc), exc
else:
    raise AssertionError("no word of it")
""",
    )


@pytest.mark.skipif(mpi_flavour() != "openmpi", reason="MPICH can")
def test_open_mpi_cannot_and_says_what_can(hosts: Hosts) -> None:
    run(
        hosts,
        """
try:
    addprocs(["n1", "n2"], isolation="world")
except LaunchError as exc:
    assert "Open MPI" in str(exc) and "isolation='auto'" in str(exc), exc
else:
    raise AssertionError("it came up")
assert h.workers() == [1]
""",
    )
