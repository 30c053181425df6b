"""Jobs that wait, that can never start, that PBS refuses, and that end too early."""

import pytest

from tests.pbs.cluster import Pbs
from tests.pbs.drivers import PRELUDE, run, says


@pytest.mark.any_mpi
def test_a_job_waits_with_a_comment(pbs: Pbs) -> None:
    comment = "Not Running: Insufficient amount of resource: ncpus (R: 2 A: 0 T: 16)"
    pbs.server.closed = comment
    driver = pbs.start(
        pbs.python,
        pbs.program(
            PRELUDE
            + """
going = h.launch(PBSManager(2))
until(lambda: going.reason)
say(waits=[str(going.state), going.reason, going.jobs])
pids = going.wait()
say(up=pids, state=str(going.state), reason=going.reason)
rmprocs(pids)
""",
        ),
    )
    state, reason, jobs = says(driver, "waits")
    assert (state, reason) == ("PENDING", comment)
    assert jobs == [job.id for job in pbs.jobs()]
    pbs.server.open()
    assert says(driver, "state") == "RUNNING"
    assert driver.wait().rc == 0, driver.err


@pytest.mark.any_mpi
def test_what_can_never_run_is_told_and_taken_back(pbs: Pbs) -> None:
    run(
        pbs,
        """
never = "can never start: Can Never Run: Insufficient amount of resource: ncpus"
exc = refused(LaunchError, never, n=99)
assert len(exc.jobs) == 1, exc.jobs
refused(LaunchError, "Not enough total nodes available", n=6, mpiprocs=2)
""",
    )
    assert [call[0] for call in pbs.server.calls].count("qdel") == 2


@pytest.mark.any_mpi
def test_a_job_that_is_deleted_while_it_waits(pbs: Pbs) -> None:
    run(
        pbs,
        """
going = h.launch(PBSManager(2), h=True)
until(lambda: going.jobs and str(going.state) == "HELD")
subprocess.run(["qdel", *going.jobs], check=True)
try:
    going.wait()
except LaunchError as exc:
    assert "CANCELLED" in str(exc), exc
else:
    raise AssertionError("it came up")
refused(LaunchError, "did not start within queue_timeout=5 s", h=True, queue_timeout=5)
""",
    )


@pytest.mark.any_mpi
def test_what_pbs_refuses_is_told_in_its_words(pbs: Pbs) -> None:
    run(
        pbs,
        """
refused(LaunchError, "qsub: Unknown queue", "submitting the job", queue="nope")
refused(LaunchError, "Unknown resource Resource_List.nosuch", nosuch=3)
refused(LaunchError, "Illegal attribute or resource value", walltime="yesterday")
refused(LaunchError, "cannot be used with", select="1:ncpus=1", mem="1gb")
refused(LaunchError, "usage: qsub", G="x")
until(lambda: not list(RUNS.iterdir()))
""",
    )
    assert "qdel" not in [call[0] for call in pbs.server.calls]


@pytest.mark.any_mpi
def test_torque_is_refused_by_name(pbs: Pbs) -> None:
    pbs.server.version = "Version: 6.1.2\nCommit: 661e092552de43a785c15d39a3634a541d86898e\n"
    run(pbs, 'refused(LaunchError, "this is Torque", "Version: 6.1.2")')
    assert "qsub" not in [call[0] for call in pbs.server.calls]


def test_a_job_that_dies_at_its_start(pbs: Pbs) -> None:
    text = """
refused(LaunchError, "FAILED, exit code 1", "before\\n", "setup failed on n1", "at: false",
        setup=["echo before", "false"])
refused(LaunchError, "exit code 9", python="python", setup=["python() { exit 9; }"])
"""
    run(pbs, text)
    pbs.server.history = False
    run(pbs, text)


def test_where_no_host_but_the_first_can_be_reached(pbs: Pbs) -> None:
    """PBS says so in the output that it keeps itself."""
    pbs.server.unreachable = "n2"
    run(pbs, 'refused(LaunchError, "tm_spawn", n=4, mpiprocs=2, timeout=20)')


def test_options_reach_the_job(pbs: Pbs) -> None:
    run(
        pbs,
        """
odd = Path("a b'c").absolute()
odd.mkdir()
pids = addprocs(PBSManager(2), dir=odd, job_dir=odd / "jobs x", select="2:ncpus=1", place="scatter",
                env={"A": "x 'y'\\nz"}, setup='export B="$PWD"', N="mine")
assert list((odd / "jobs x").iterdir()), "the run's folder is where it was asked for"
assert [host for host, _ in rows(pids)] == ["n1", "n2"]
seen = remotecall_fetch(lambda: (os.getcwd(), os.environ["A"], os.environ["B"]), pids[1])
assert seen == (str(odd), "x 'y'\\nz", str(odd)), seen
rmprocs(pids)
pids = addprocs(PBSManager(3), mem="1gb")
assert {host for host, _ in rows(pids)} == {"n1"}
rmprocs(pids)
going = h.launch(PBSManager(4), split="node", mpiprocs=2)
pids = going.wait()
assert len(going.jobs) == 2 and len({row.world for row in h.status() if row.pid in pids}) == 2
rmprocs(pids)
until(lambda: not list((odd / "jobs x").iterdir()))
""",
    )
    names = [job.options["N"] for job in pbs.server.jobs.values()]
    assert "mine" in names


@pytest.mark.any_mpi
def test_faulty_json_is_read_all_the_same(pbs: Pbs) -> None:
    pbs.server.faulty = '                "LEAD": 005,\n                "Q": "\\\'",\n'
    run(
        pbs,
        """
refused(LaunchError, "Can Never Run", n=99)
pids = addprocs(PBSManager(1))
rmprocs(pids)
""",
    )
