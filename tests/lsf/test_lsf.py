"""`LSFManager` and the command line; LSF's programs are ones of ours, which run jobs here."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished
from tests.helpers import eventually
from tests.lsf import replay

PRELUDE = """
import os, signal, subprocess, sys, time
import hpcdist as h
from hpcdist import LaunchError, LSFManager, ProcessExitedException
from hpcdist import addprocs, remotecall, remotecall_fetch, rmprocs, spmd

def until(look, timeout=60):
    end = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < end, ("did not come true", found)
        time.sleep(0.1)
    return found

def refused(*words, n=1, **params):
    try:
        pids = addprocs(LSFManager(n), **params)
    except LaunchError as exc:
        missing = [word for word in words if word not in str(exc)]
        assert not missing, (missing, params, str(exc))
        return exc
    raise AssertionError(f"{params} gave {pids}")
"""
Run = Callable[..., Finished]


class Lsf:
    """The replayed LSF, seen from outside."""

    def __init__(self, folder: Path) -> None:
        self.jobs_folder = folder / "lsf"
        self.home = folder / "home"
        programs = folder / "bin"
        for made in (self.jobs_folder, self.home, programs):
            made.mkdir()
        replay.install(programs)
        self.env = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "REPLAY_LSF": str(self.jobs_folder),
            "HPCDIST_DIR": str(self.home),
        }

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return all jobs, by their numbers."""
        found = [json.loads(path.read_text()) for path in self.jobs_folder.glob("*.json")]
        return {str(job["id"]): job for job in found}

    def living(self) -> list[str]:
        """Return the jobs that have not ended."""
        return [ident for ident, job in self.jobs().items() if job["stat"] in ("PEND", "RUN")]

    def runs(self) -> list[Path]:
        """Return the folders of runs that are still there."""
        return list((self.home / "jobs").glob("*"))


@pytest.fixture
def lsf(tmp_path: Path) -> Iterator[Lsf]:
    """An LSF; a test that leaves a job behind fails."""
    cluster = Lsf(tmp_path)
    yield cluster
    left = cluster.living()
    for ident in left:
        (cluster.jobs_folder / f"{ident}.kill").touch()
    eventually(lambda: not cluster.living(), timeout=30, message="jobs will not end")
    assert not left, f"jobs left behind: {left}"


def run(script: Run, lsf: Lsf, text: str, fault: str = "") -> Finished:
    """Run a driver to its good end."""
    done = script(PRELUDE + text, env=lsf.env | {"REPLAY_LSF_FAULT": fault}, timeout=120)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    return done


def hpcdist(script: Run, lsf: Lsf, *args: str) -> Finished:
    """Run the command line."""
    text = "import sys; from hpcdist._cli.main import main; sys.exit(main())"
    return script(text, args=args, env=lsf.env, timeout=120)


def test_a_world_from_its_start_to_its_end(script: Run, lsf: Lsf) -> None:
    done = run(
        script,
        lsf,
        """
pids = addprocs(LSFManager(2), q="normal", W=30, setup="export A='1 2'")
rows = [row for row in h.status() if row.pid in pids]
assert [(row.job_id, row.rank) for row in rows] == [("1", 0), ("1", 1)], rows
seen = remotecall_fetch(lambda: (os.environ["A"], os.environ["LSB_JOBID"]), pids[1])
assert seen == ("1 2", "1"), seen
assert spmd(lambda: h.comm().allreduce(h.comm().rank), pids=pids) == [1, 1]
remotecall_fetch(print, pids[1], "hello")
rmprocs(pids)
""",
    )
    assert "From worker 3:\thello\n" in done.out
    eventually(lambda: not lsf.living() and not lsf.runs(), timeout=30, message="it stays")


def test_jobs_apart_in_an_lsf_without_json(script: Run, lsf: Lsf) -> None:
    run(
        script,
        lsf,
        """
going = h.launch(LSFManager(3), split=2, isolation="process")
pids = going.wait()
assert sorted(going.jobs) == ["1", "2"], going.jobs
try:
    remotecall_fetch(lambda: os.kill(os.getpid(), signal.SIGKILL), pids[0])
except ProcessExitedException:
    pass
assert [remotecall_fetch(h.myid, pid) for pid in pids[1:]] == pids[1:]
rmprocs(h.workers())
""",
        fault="old",
    )
    eventually(lambda: not lsf.living(), timeout=30, message="it stays")


@pytest.mark.any_mpi
def test_what_is_refused_is_told_in_lsf_s_words(script: Run, lsf: Lsf) -> None:
    run(
        script,
        lsf,
        """
refused("nope: No such queue. Job not submitted.", q="nope")
refused("EXIT, exit code 1", "setup failed on", "at: false", "one\\n", setup=["echo one", "false"])
""",
    )
    assert lsf.living() == []


@pytest.mark.any_mpi
def test_an_answer_that_gets_lost(script: Run, lsf: Lsf) -> None:
    run(script, lsf, "pids = addprocs(LSFManager(1))\nrmprocs(pids)\n", fault="garbage")
    assert list(lsf.jobs()) == ["1"]


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    ("fault", "words"),
    [("pending", "New job is waiting for scheduling"), ("down", "queue_timeout=4")],
)
def test_a_job_that_does_not_start(script: Run, lsf: Lsf, fault: str, words: str) -> None:
    text = f"refused('queue_timeout=4', {words!r}, queue_timeout=4, setup='sleep 600')\n"
    run(script, lsf, text, fault=fault)
    eventually(lambda: not lsf.living(), timeout=30, message="it was not cancelled")


@pytest.mark.any_mpi
def test_a_killed_job_is_told(script: Run, lsf: Lsf) -> None:
    run(
        script,
        lsf,
        """
pids = addprocs(LSFManager(2))
future = remotecall(time.sleep, pids[1], 600)
subprocess.run(["bkill", "1"], check=True)
def why():
    try:
        future.fetch()
    except ProcessExitedException as exc:
        return exc.why
until(lambda: "its job 1 ended: TERM_OWNER" in why())
""",
    )


def test_the_job_ends_with_its_driver(script: Run, lsf: Lsf) -> None:
    text = """
pids = addprocs(LSFManager(2))
h.remote_do(time.sleep, pids[1], 600)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = script(PRELUDE + text, env=lsf.env, timeout=120)
    assert done.rc == -signal.SIGKILL, done
    eventually(lambda: not lsf.living(), timeout=60, message="the job goes on")


DRIVER = """
import sys
import hpcdist as h
h.init()
print(sorted(h.everywhere.call(h.myid).values()), sys.argv[1:])
sys.exit(5)
"""


def test_the_command_line(script: Run, lsf: Lsf, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(DRIVER)
    cli = ("submit", "job.py", "-n", "2", "--scheduler", "lsf", "-q", "normal")
    done = hpcdist(script, lsf, *cli, "--dry-run")
    assert "\n#BSUB -q normal\n" in done.out, done
    done = hpcdist(script, lsf, *cli, "--wait", "--", "a", "b")
    assert (done.rc, done.out) == (5, "1\n"), done
    assert "job 1: EXIT, exit code 5" in done.err or "FAILED, exit code 5" in done.err, done
    (log,) = (lsf.home / "jobs").glob("*/log")
    assert "[1, 2] ['a', 'b']" in log.read_text(), log.read_text()

    (tmp_path / "sleeper.py").write_text(
        "import time; import hpcdist as h; h.init(); time.sleep(600)\n"
    )
    done = hpcdist(script, lsf, "submit", "sleeper.py", "-n", "1", "--scheduler", "lsf")
    assert done.out == "2\n", done
    eventually(lambda: lsf.jobs()["2"]["stat"] == "RUN", timeout=30)
    listed = hpcdist(script, lsf, "jobs").out
    assert "RUNNING" in listed, listed
    done = hpcdist(script, lsf, "cancel", "2")
    assert done.rc == 0, done
    eventually(lambda: not lsf.living(), timeout=60, message="it goes on")
    done = hpcdist(script, lsf, "cancel", "2")
    assert "TERM_OWNER" in done.err, done


def test_the_doctor(script: Run, lsf: Lsf) -> None:
    done = hpcdist(script, lsf, "doctor", "--scheduler", "lsf", "-q", "normal")
    assert "the cluster replay answers" in done.out, done
    assert "Open:Active" in done.out, done
