"""`addprocs(PBSManager(n), …)`: worlds over two hosts that no ssh connects."""

from tests.pbs.cluster import Pbs
from tests.pbs.drivers import run


def test_a_world_over_two_hosts(pbs: Pbs) -> None:
    said = run(
        pbs,
        """
pids = addprocs(PBSManager(4), mpiprocs=2, walltime="00:05:00", setup="export B='a b'")
assert rows(pids) == [("n1", 0), ("n1", 1), ("n2", 2), ("n2", 3)], rows(pids)
assert [remotecall_fetch(sizes, p) for p in pids] == [(4, rank) for rank in range(4)]
assert h.spmd(lambda: h.comm().allreduce(h.myid())) == [sum(pids)] * 4
assert remotecall_fetch(lambda q: remotecall_fetch(h.myid, q), pids[0], pids[3]) == pids[3]
def look():
    return os.getcwd(), os.environ["B"], os.environ["OMP_NUM_THREADS"]

seen = remotecall_fetch(look, pids[3])
assert seen == (os.getcwd(), "a b", "1"), seen
remotecall_fetch(print, pids[3], "hello")
rmprocs(pids)
until(lambda: not list(RUNS.iterdir()))
""",
    )
    assert "From worker 5:\thello" in said["out"]


def test_nodes_whose_names_have_a_domain(pbs: Pbs) -> None:
    pbs.server.domain = ".cluster"
    run(
        pbs,
        """
pids = addprocs(PBSManager(4), mpiprocs=2)
assert rows(pids) == [("n1", 0), ("n1", 1), ("n2", 2), ("n2", 3)], rows(pids)
rmprocs(pids)
until(lambda: not list(RUNS.iterdir()))
""",
    )
