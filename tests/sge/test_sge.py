"""`SGEManager` and the command line against a real Grid Engine of two hosts."""

import pytest

from tests import containers
from tests.helpers import eventually
from tests.sge.cluster import GridEngine
from tests.slurm.cluster import Finished

PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
import hpcdist as h
from hpcdist import LaunchError, ProcessExitedException, SGEManager
from hpcdist import addprocs, remotecall, remotecall_fetch, rmprocs, spmd

RUNS = Path.home() / ".hpcdist" / "jobs"

def until(look, timeout=60):
    begin = time.monotonic()
    while not (found := look()):
        crowding = min(5, max(1, os.getloadavg()[0] / (3 * os.cpu_count())))
        assert time.monotonic() < begin + timeout * crowding, ("did not come true", found, queue())
        time.sleep(0.1)
    return found

def shown(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

def queue():
    return [line.split()[0] for line in shown("qstat").splitlines()[2:]]

def refused(kind, *words, n=1, **params):
    try:
        pids = addprocs(SGEManager(n), **params)
    except kind as exc:
        missing = [word for word in words if word not in str(exc)]
        assert not missing, (missing, params, str(exc))
        return exc
    raise AssertionError(f"{params} gave {pids}")

def nothing_left():
    until(lambda: not queue())
    until(lambda: not RUNS.exists() or not list(RUNS.iterdir()))
"""


# What MPI leaves where Grid Engine kills it: by SIGKILL, all at once.
KILLED = ("/dev/shm/sm_segment.*", "/dev/shm/mpich_*", "/tmp/ompi.*")


def run(sge: GridEngine, text: str, timeout: float = 120) -> Finished:
    """Run a driver to its good end."""
    done = sge.driver(PRELUDE + text, timeout=timeout)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    return done


def test_one_world_on_two_hosts(sge: GridEngine) -> None:
    done = run(
        sge,
        """
pids = addprocs(SGEManager(3), pe="spread", h_rt="00:10:00", setup="export A='1 2'")
rows = [row for row in h.status() if row.pid in pids]
assert {row.host for row in rows} == {"n1", "n2"} and [row.rank for row in rows] == [0, 1, 2]
(job,) = {row.job_id for row in rows}
assert queue() == [job]
details = shown("qstat", "-j", job)
assert "h_rt=600" in details and "spread range: 3" in details, details
assert remotecall_fetch(lambda: (os.environ["A"], os.getcwd()), pids[2]) == ("1 2", os.getcwd())
assert spmd(lambda: h.comm().allreduce(h.comm().rank), pids=pids) == [3, 3, 3]
remotecall_fetch(print, pids[2], "hello")
rmprocs(pids)
nothing_left()

# Workers that are no world: a death is one worker's.
pids = addprocs(SGEManager(3), pe="spread", isolation="process")
try:
    remotecall_fetch(lambda: os.kill(os.getpid(), signal.SIGKILL), pids[1])
except ProcessExitedException as exc:
    assert exc.pid == pids[1], exc
else:
    raise AssertionError("it lives")
assert [remotecall_fetch(h.myid, pid) for pid in (pids[0], pids[2])] == [pids[0], pids[2]]
rmprocs(h.workers())
nothing_left()
""",
    )
    assert "From worker 4:\thello\n" in done.out


def test_many_small_jobs(sge: GridEngine) -> None:
    """Those of one size are one job array, whose tasks start, and end, each by itself."""
    run(
        sge,
        """
going = h.launch(SGEManager(5), split=2, pe="spread")
pids = going.wait()
assert len(going.jobs) == 3, going.jobs
(array,) = {job.partition(".")[0] for job in going.jobs if "." in job}
(single,) = [job for job in going.jobs if "." not in job]
assert sorted(going.jobs) == sorted([f"{array}.1", f"{array}.2", single]), going.jobs
assert sorted(queue()) == sorted([array, array, single]), queue()
rows = {job: [row for row in h.status() if row.job_id == job] for job in going.jobs}
for task in (f"{array}.1", f"{array}.2"):  # a launcher that reaches the other host
    assert [row.rank for row in rows[task]] == [0, 1], rows
    assert {row.host for row in rows[task]} == {"n1", "n2"}, rows
assert remotecall_fetch(lambda q: remotecall_fetch(h.myid, q), pids[0], pids[4]) == pids[4]

first, second = ([row.pid for row in rows[f"{array}.{k}"]] for k in (1, 2))
shown("qdel", f"{array}.2")
try:
    remotecall(time.sleep, second[0], 100).fetch()
except ProcessExitedException as exc:
    until(lambda: "CANCELLED" in exc.why)
else:
    raise AssertionError("it lives")
assert [remotecall_fetch(h.myid, pid) for pid in first] == first
until(lambda: sorted(queue()) == sorted([array, single]))
rmprocs(h.workers())
nothing_left()

# A queued array, and one whose tasks fail.
waiting = h.launch(SGEManager(32), split=16, h=True)
until(lambda: len(waiting.jobs) == 2)
until(lambda: str(waiting.state) == "HELD" or waiting.reason)
waiting.cancel()
refused(LaunchError, "FAILED, exit code 1", "setup failed on n", "at: false", n=4, split=2,
        setup=["false"])
nothing_left()
""",
    )


def test_workers_run_in_a_container(sge: GridEngine) -> None:
    run(
        sge,
        containers.PRELUDE
        + """
pids = addprocs(SGEManager(2), pe="spread", setup=[f"PATH={os.environ['PATH']}"],
                container="app.sif", wrapper=["nice", "-n", "5"])
assert {row.host for row in h.status()[1:]} == {"n1", "n2"}
assert h.everywhere.call(inside, pids=pids) == dict.fromkeys(pids, expected(nice=5))
assert spmd(lambda: h.comm().allreduce(1), pids=pids) == [2, 2]
rmprocs(pids)
nothing_left()
""",
    )


@pytest.mark.any_mpi
def test_what_is_refused_is_told_in_grid_engine_s_words(sge: GridEngine) -> None:
    run(
        sge,
        """
refused(LaunchError, 'parallel environment "nope" does not exist', "loose, mpi, spread",
        "pe= chooses", n=2, pe="nope")
refused(LaunchError, 'unknown resource "nosuch"', nosuch=3)
refused(LaunchError, 'unknown queue "nope"', q="nope")
refused(LaunchError, "no suitable queues", n=64, w="e")
refused(ValueError, "pe='mpi 3'", "SGEManager(2)", n=2, pe="mpi 3")
exc = refused(LaunchError, "can never start: can't open output file", "/nonexistent/log",
              "No such file or directory", o="/nonexistent/log")
assert len(exc.jobs) == 1 and exc.jobs[0].isdigit(), exc.jobs
refused(LaunchError, "FAILED, exit code 1", "setup failed on n", "at: false", "one\\n",
        setup=["echo one", "false"])
nothing_left()
""",
    )


@pytest.mark.any_mpi
def test_an_answer_that_gets_lost(sge: GridEngine) -> None:
    sge.file("bin/qsub", '#!/bin/sh\n/usr/bin/qsub "$@" >/dev/null; echo eaten\n', 0o755)
    run(
        sge,
        """
os.environ["PATH"] = os.path.abspath("bin") + ":" + os.environ["PATH"]
pids = addprocs(SGEManager(1))
(job,) = {row.job_id for row in h.status() if row.pid in pids}
assert queue() == [job], queue()
rmprocs(pids)
nothing_left()
""",
    )


@pytest.mark.any_mpi
def test_waiting(sge: GridEngine) -> None:
    run(
        sge,
        """
going = h.launch(SGEManager(64))  # more than there are slots
until(lambda: "only offers 16 slots" in (going.reason or ""))
assert str(going.state) == "PENDING", going.state
going.cancel()
nothing_left()
refused(LaunchError, "queue_timeout=3", n=64, queue_timeout=3)
nothing_left()
""",
    )


@pytest.mark.any_mpi
def test_a_deleted_job_is_told(sge: GridEngine) -> None:
    sge.expected += KILLED
    run(
        sge,
        """
pids = addprocs(SGEManager(3), pe="spread")
(job,) = {row.job_id for row in h.status() if row.pid in pids}
futures = [remotecall(time.sleep, pid, 600) for pid in pids]
shown("qdel", job)
def why():
    try:
        futures[0].fetch()
    except ProcessExitedException as exc:
        return exc.why
until(lambda: f"its job {job} ended" in why() and ("CANCELLED" in why() or "SIGKILL" in why()))
until(lambda: not h.workers() or h.workers() == [1])
nothing_left()
""",
    )


@pytest.mark.any_mpi
def test_out_of_time(sge: GridEngine) -> None:
    sge.expected += KILLED
    run(
        sge,
        """
pids = addprocs(SGEManager(1), h_rt=4)
future = remotecall(time.sleep, pids[0], 600)
def why():
    try:
        future.fetch()
    except ProcessExitedException as exc:
        return exc.why
until(lambda: "TIMEOUT" in why())
nothing_left()
""",
    )


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(3)"])
def test_the_job_ends_with_its_driver(sge: GridEngine, end: str) -> None:
    sge.expected.append(".hpcdist/jobs/*/*")
    text = f"""
pids = addprocs(SGEManager(3), pe="spread")
h.remote_do(time.sleep, pids[2], 600)
assert len(queue()) == 1
{end}
"""
    done = sge.driver(PRELUDE + text, timeout=120)
    assert done.rc in (3, 137, -9), f"{done.out}\n{done.err}"
    eventually(lambda: not sge.jobs(), timeout=60, message="the job goes on")


DRIVER = """
import sys
import hpcdist as h
h.init()
assert h.nworkers() == 2, h.nworkers()
print(sorted(h.everywhere.call(h.myid).values()), sys.argv[1:])
sys.exit(5)
"""


@pytest.mark.any_mpi
def test_the_command_line(sge: GridEngine) -> None:
    sge.expected.append(".hpcdist/jobs/*/*")
    sge.file("driver.py", DRIVER)
    cli = ("hpcdist", "submit", "driver.py", "-n", "3", "--scheduler", "sge", "--pe", "spread")
    shown = sge.login(*cli, "--dry-run")
    assert shown.rc == 0, shown
    assert "\n#$ -pe spread 3\n" in shown.out, shown
    done = sge.login(*cli, "--wait", "--", "a", "b", timeout=120)
    job = done.out.strip()
    assert done.rc == 5, done
    assert job.isdigit(), done
    assert f"job {job}: FAILED, exit code 5" in done.err, done
    listed = sge.login("hpcdist", "jobs").out
    assert job in listed, listed
    assert "FAILED" in listed, listed
    (log,) = (sge.path("..") / ".hpcdist" / "jobs").glob("*/log")
    assert "[1, 2, 3] ['a', 'b']" in log.read_text(), log.read_text()

    eventually(lambda: not sge.jobs(), timeout=60, message="it is still listed")

    sge.file("sleeper.py", "import time; import hpcdist as h; h.init(); time.sleep(600)\n")
    job = sge.login("hpcdist", "submit", "sleeper.py", "-n", "1", "--scheduler", "sge").out.strip()
    assert [found.id for found in sge.jobs()] == [job]
    listed = sge.login("hpcdist", "jobs").out
    assert job in listed, listed
    done = sge.login("hpcdist", "cancel", job)
    assert done.rc == 0, done
    assert f"cancelled: {job}" in done.err, done
    eventually(lambda: not sge.jobs(), timeout=60, message="it goes on")
    done = sge.login("hpcdist", "cancel", "4711")
    assert done.rc == 1, done
    assert "4711" in done.err, done
    done = sge.login("hpcdist", "jobs", "--clear", timeout=60)
    assert done.rc == 0, done


@pytest.mark.slow
def test_the_doctor(sge: GridEngine) -> None:
    done = sge.login(
        "hpcdist", "doctor", "--scheduler", "sge", "--run", "--pe", "spread", timeout=120
    )
    assert done.rc == 0, done
    assert "jobs ask for spread" in done.out
    assert "2 ranks are one world, on n" in done.out
    done = sge.login("hpcdist", "doctor", "--scheduler", "sge", "--pe", "nope", timeout=120)
    assert done.rc == 1, done
    assert "there is no parallel environment nope" in done.out
    done = sge.login("hpcdist", "doctor", "--scheduler", "sge", "--pe", "loose", timeout=120)
    assert "lets no other host be reached" in done.out


def test_a_job_stays_for_the_next_launch(sge: GridEngine) -> None:
    done = run(
        sge,
        """
options = {"pe": "spread", "h_rt": "00:10:00", "linger": 60}
with h.cluster(SGEManager(3), **options) as pids:
    (job,) = queue()
until(lambda: list(RUNS.glob("*/lingering")))
listed = shown(sys.executable, "-m", "hpcdist", "jobs")
assert f"{job} " in listed and " LINGERING " in listed, listed
pids = addprocs(SGEManager(3), **options)
assert queue() == [job], queue()
assert spmd(lambda: h.comm().allreduce(h.comm().rank), pids=pids) == [3, 3, 3]
h.shutdown(release=True)
nothing_left()
""",
    )
    assert " left) instead of queueing" in done.err, done


def test_jobs_come_with_work_and_stay_for_the_next_driver(sge: GridEngine) -> None:
    """`adapt=` and `linger=` together: what is given back ends, what a driver leaves lingers."""
    done = run(
        sge,
        """
options = {"h_rt": "00:10:00", "isolation": "process", "adapt": (0, 2), "linger": 120}

def item(k):
    seen = Path("begun") / str(h.myid())
    seen.touch()
    if k < 4:  # until all workers of both jobs have one
        until(lambda: len(list(seen.parent.iterdir())) >= 4)
    return k, os.environ["JOB_ID"]

def jobs_of(n):
    return {job for _, job in h.pmap(item, range(n), batch_size=1)}

Path("begun").mkdir()
with h.cluster(SGEManager(2), **options) as pids:
    assert pids == [] and queue() == []
    first = jobs_of(40)
    assert len(first) == 2, first
until(lambda: len(list(RUNS.glob("*/lingering"))) == 2)
assert set(queue()) == first

again = h.launch(SGEManager(2), **options, idle=2)
assert jobs_of(4) <= first
until(lambda: again.pids == [] and again.workers_wanted == 0)
again.cancel()
until(lambda: len(queue()) < 2)  # what is given back ends; one that was not needed lingers on
for job in queue():  # or it has just ended
    subprocess.run([sys.executable, "-m", "hpcdist", "cancel", job])
until(lambda: not queue())
shown(sys.executable, "-m", "hpcdist", "jobs", "--clear")
nothing_left()
""",
    )
    assert " left) instead of queueing" in done.err, done
