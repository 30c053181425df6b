"""`addprocs(PBSManager(n), …)`: worlds over two hosts that no ssh connects."""

from tests import containers
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


def test_many_small_jobs_are_a_job_array(pbs: Pbs) -> None:
    run(
        pbs,
        """
going = h.launch(PBSManager(5), split=2, place="scatter", select="2:ncpus=1:mpiprocs=1")
pids = going.wait()
tasks = [job for job in going.jobs if "[" in job]
(single,) = set(going.jobs) - set(tasks)
array = tasks[0].partition("[")[0]
assert tasks == [f"{array}[0].head", f"{array}[1].head"], going.jobs
of = {job: [row for row in h.status() if row.job_id == job] for job in going.jobs}
for job in tasks:  # a launcher that reaches the other host
    assert [(row.rank, row.host) for row in of[job]] == [(0, "n1"), (1, "n2")], of
assert remotecall_fetch(lambda q: remotecall_fetch(h.myid, q), pids[0], pids[4]) == pids[4]

first, second = ([row.pid for row in of[job]] for job in tasks)
subprocess.run(["qdel", tasks[1]], check=True)
try:
    remotecall(time.sleep, second[0], 100).fetch()
except ProcessExitedException as exc:
    until(lambda: "CANCELLED" in exc.why)
else:
    raise AssertionError("it lives")
assert [remotecall_fetch(h.myid, pid) for pid in first] == first
rmprocs(h.workers())
until(lambda: not list(RUNS.iterdir()))
refused(LaunchError, "FAILED, exit code 1", "setup failed on n", "at: false", n=4, split=2,
        setup=["false"])
until(lambda: not list(RUNS.iterdir()))
""",
    )


def test_workers_run_in_a_container(pbs: Pbs) -> None:
    run(
        pbs,
        containers.PRELUDE
        + """
pids = addprocs(PBSManager(2), place="scatter", setup=[f"PATH={os.environ['PATH']}"],
                container="app.sif", container_args=["--nv"], wrapper=["nice", "-n", "5"])
assert len({row.host for row in h.status()[1:]}) == 2
assert h.everywhere.call(inside, pids=pids) == dict.fromkeys(pids, expected(nice=5))
assert h.spmd(lambda: h.comm().allreduce(1), pids=pids) == [2, 2]
rmprocs(pids)
until(lambda: not list(RUNS.iterdir()))
""",
    )
