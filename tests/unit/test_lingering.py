"""A job waits for its next driver: the keeper's side, the driver's side, and what is refused."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcdist import PBSManager, SGEManager, SlurmManager
from hpcdist._keeper import lingering
from hpcdist._schedulers import job, takeover
from hpcdist._schedulers.batch_manager import BatchManager
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.takeover import Takeover, identity, lingering_jobs
from tests.helpers import eventually

ASKED = {"time": "5", "n": "2"}
_WAITING = """
import sys
from hpcdist._keeper import lingering
lingering.wait(sys.argv[1], lambda told: print("reached"))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs of the test's own."""
    monkeypatch.setenv("HPCDIST_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lingering_run(number: str, seconds: float = 60, ends: float | None = None) -> str:
    """Make the folder of a job that lingers."""
    folder = job.run_folder(None, job.new_name())
    job.write_manifest(folder, {"name": "x", "scheduler": "slurm", "jobs": [[number, None]]})
    lingering.begin(folder, {"seconds": seconds, "asked": ASKED}, ends)
    return folder


def claims(folder: str) -> list[Path]:
    return [path for path in Path(folder).glob("claim-*") if path.suffix != ".new"]


# What is refused


@pytest.mark.parametrize("linger", [0, -1, True, "600", float("nan"), float("inf"), [5]])
def test_a_time_that_is_none(place: Path, linger: Any) -> None:
    with pytest.raises(ValueError, match="linger= is a number of seconds above 0"):
        SlurmManager(2).job_script(linger=linger)


@pytest.mark.parametrize(
    ("manager", "params"),
    [
        (SlurmManager(2), {"t": 5}),
        (PBSManager(2), {"walltime": "0:05:00"}),
        (SGEManager(2), {"h_rt": 300}),
    ],
)
def test_longer_than_the_walltime(
    place: Path, manager: BatchManager, params: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"linger=301 is longer .* may run for 300 s"):
        manager.prepare(manager.settings_of({**params, "linger": 301}))
    made = manager.prepare(manager.settings_of({**params, "linger": 300}))
    assert made.linger == 300
    assert manager.prepare(manager.settings_of(params)).linger is None


def test_a_program_has_its_driver_with_it(place: Path) -> None:
    with pytest.raises(ValueError, match="linger= is for workers"):
        SlurmManager(2).program_script(["driver.py"], linger=5)


def test_in_an_allocation_there_is_no_queue(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    manager = SlurmManager(2)
    assert manager.prepare(manager.settings_of({"linger": 300, "launcher": "srun"})).linger is None


# The keeper


def test_the_first_claim_that_is_answered_gets_the_job(tmp_path: Path) -> None:
    folder = str(tmp_path)
    lingering.begin(folder, {"seconds": 60, "asked": ASKED}, None)
    for name in "abcd":
        lingering.write_private(lingering.claim_path(folder, name), {"run": name})
    Path(lingering.claim_path(folder, "b")).write_text("no JSON")
    (tmp_path / "claim-x.new").write_text("half")

    def reach(told: dict[str, Any]) -> str:
        if told["run"] == "a":
            raise ConnectionError("gone")
        return f"line to {told['run']}"

    heard = signal.getsignal(signal.SIGTERM)
    try:
        assert lingering.wait(folder, reach) == ({"run": "c"}, "line to c")
    finally:
        signal.signal(signal.SIGTERM, heard)
    assert json.loads((tmp_path / "join").read_text()) == {"run": "c"}
    assert stat.S_IMODE((tmp_path / "join").stat().st_mode) == 0o600
    assert sorted(os.listdir(folder)) == ["claim-x.new", "join"]


def waiting(folder: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-c", _WAITING, folder]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def test_a_driver_may_take_its_claim_back_as_soon_as_it_is_answered(tmp_path: Path) -> None:
    folder = str(tmp_path)
    lingering.begin(folder, {"seconds": 60, "asked": ASKED}, None)
    claim = Path(lingering.claim_path(folder, "a"))
    told = {"run": "a"}
    lingering.write_private(str(claim), told)

    def reach(_: object) -> Any:
        claim.unlink()
        return "line to a"

    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert lingering.wait(folder, reach) == (told, "line to a")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert json.loads((tmp_path / "join").read_text()) == told
    assert lingering.read_state(folder) is None


def test_it_ends_when_its_time_is_over(tmp_path: Path) -> None:
    lingering.begin(str(tmp_path), {"seconds": 0.01, "asked": ASKED}, None)
    done = waiting(str(tmp_path))
    assert (done.communicate(timeout=30)[0], done.returncode) == ("", 0)
    assert os.listdir(tmp_path) == []


def test_it_ends_when_it_is_told_to(tmp_path: Path) -> None:
    lingering.begin(str(tmp_path), {"seconds": 600, "asked": ASKED}, None)
    os.utime(tmp_path, (0, 0))
    done = waiting(str(tmp_path))
    eventually(lambda: tmp_path.stat().st_mtime > 1)  # it has looked
    done.terminate()
    assert (done.communicate(timeout=30)[0], done.returncode) == ("", 128 + signal.SIGTERM)
    assert os.listdir(tmp_path) == []


def test_it_waits_no_longer_than_the_job_lives(tmp_path: Path) -> None:
    now = time.time()
    seconds = lingering.begin(str(tmp_path), {"seconds": 600, "asked": ASKED}, now + 100)
    assert 0 < seconds <= 98
    state = lingering.read_state(str(tmp_path))
    assert state is not None
    assert state["ends"] == now + 100
    assert state["until"] <= now + 98


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"asked": {}, "until": "soon"}', "{" * 2000])
def test_a_spoilt_state_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / lingering.STATE).write_text(text)
    assert lingering.read_state(str(tmp_path)) is None


# The driver


class World:
    """What a takeover needs of a world."""

    def __init__(self) -> None:
        self.folder = job.run_folder(None, job.new_name())
        self.job: JobId | None = None
        self.up = self.closed = False
        self.submitted_at = 0.0
        self.join = {"world": 1}

    def move_to(self, folder: str, number: JobId | None) -> bool:
        if not self.up:
            self.folder, self.job = folder, number
        return not self.up


class Try:
    """A takeover under way on a thread."""

    def __init__(self, mine: dict[str, str], ends: float | None = None) -> None:
        self.world = World()
        self.own = self.world.folder
        self.said: list[str] = []
        self.wanted = True
        self.found: Any = "not yet"
        made = Takeover("slurm", lambda: self.wanted, lambda number: ends, self.said.append)

        def take() -> None:
            self.found = made.take(self.world, mine)  # type: ignore[arg-type]

        self.thread = threading.Thread(target=take)
        self.thread.start()

    def end(self) -> "Try":
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self


@pytest.fixture
def attempt(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Try]]:
    monkeypatch.setattr(takeover, "_GRACE", 0.1)
    made: list[Try] = []

    def begin(mine: dict[str, str] = ASKED, ends: float | None = None) -> Try:
        made.append(Try(mine, ends))
        return made[-1]

    yield begin
    for each in made:
        each.wanted = False
        each.end()


def test_a_job_is_taken_over(attempt: Callable[..., Try]) -> None:
    folder = lingering_run("41")
    trial = attempt(ends=time.time() + 750.4)
    (claim,) = eventually(lambda: claims(folder))
    assert claim.name == f"claim-{os.path.basename(trial.own)}"
    assert json.loads(claim.read_text()) == {"world": 1}
    assert stat.S_IMODE(claim.stat().st_mode) == 0o600
    trial.world.up = True  # its keeper has dialled in
    trial.end()
    assert trial.found.job == "41"
    assert (trial.world.folder, trial.world.job) == (folder, "41")
    (said,) = trial.said
    assert said.startswith("took over job 41 (12:")
    assert said.endswith(" left) instead of queueing")
    assert not os.path.exists(trial.own)


def test_another_driver_gets_it(attempt: Callable[..., Try]) -> None:
    folder = lingering_run("41")
    trial = attempt()
    (claim,) = eventually(lambda: claims(folder))
    claim.unlink()
    trial.end()
    assert trial.found is None
    assert (trial.world.folder, trial.world.job) == (trial.own, None)
    assert trial.said == ["job 41 lingers, and was not taken over: another driver has got it"]


def test_a_job_that_does_not_answer(
    attempt: Callable[..., Try], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "_PATIENCE", 0.2)
    folder = lingering_run("41")
    trial = attempt().end()
    assert trial.found is None
    assert trial.said == ["job 41 lingers, and was not taken over: it does not answer"]
    assert claims(folder) == []


def test_a_launch_that_is_cancelled_withdraws_its_claim(attempt: Callable[..., Try]) -> None:
    folder = lingering_run("41")
    trial = attempt()
    eventually(lambda: claims(folder))
    trial.wanted = False
    trial.end()
    assert (trial.found, trial.said, claims(folder)) == (None, [], [])
    assert trial.world.folder == trial.own


def test_other_options_are_told(attempt: Callable[..., Try]) -> None:
    lingering_run("41")
    trial = attempt({"time": "5", "n": "3", "partition": "debug"}).end()
    assert trial.said == [
        "job 41 lingers, and was not taken over: n is '2' there and '3' here; "
        "partition is not set there and 'debug' here"
    ]


def test_only_jobs_that_wait_are_found(place: Path) -> None:
    old, dead, late, soon = (lingering_run(number) for number in ("1", "2", "3", "4"))
    now = time.time()
    lingering.begin(old, {"seconds": -1, "asked": ASKED}, None)
    Path(dead, "exit").write_text("0 1 n1")
    lingering.begin(late, {"seconds": 50, "asked": ASKED}, now + 9000)
    lingering.begin(soon, {"seconds": 50, "asked": ASKED}, now + 900)
    assert [found.job for found in lingering_jobs("slurm")] == ["3", "4"]
    assert lingering_jobs("pbs") == []


def test_tasks_of_an_array_are_found_in_their_own_folders(place: Path) -> None:
    folders = [job.run_folder(None, job.new_name()) for _ in range(2)]
    os.mkdir(os.path.join(folders[0], "tasks"))
    for number, folder in enumerate(folders):
        os.symlink(folder, os.path.join(folders[0], "tasks", str(number)))
    jobs = [["7_0", None], ["7_1", None]]
    job.write_manifest(folders[0], {"scheduler": "slurm", "jobs": jobs, "array": "7"})
    lingering.begin(folders[1], {"seconds": 50, "asked": ASKED}, None)
    (found,) = lingering_jobs("slurm")
    assert (found.job, found.folder, found.together) == ("7_1", folders[1], tuple(folders))


def test_what_makes_two_launches_one(place: Path) -> None:
    def of(n: int = 2, **params: Any) -> dict[str, str]:
        manager = SlurmManager(n)
        plan = manager.prepare(manager.settings_of({"mpi": "pmi2", **params}))
        return identity(plan, n, plan.launcher(n))

    first = of(t=5, linger=60, env={"A": "1"}, setup=["true"])
    same = of(time="5", env={"A": "1"}, setup=["true"], keep=True, timeout=5, tag="x")
    assert takeover.differences(first, same) == []
    other = of(3, t=5, env={"A": "2"}, exclusive=True)
    told = "; ".join(takeover.differences(first, other))
    for word in ("n is '2' there and '3' here", "env is", "exclusive is not set", "setup is"):
        assert word in told
