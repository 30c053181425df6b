"""A batch launch from submission to its end, with Slurm's programs replaced on PATH.

What a real Slurm does is tested in tests/slurm; here are answers it cannot be made to give.
"""

import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdist import _config
from hpcdist._cli.runs import named
from hpcdist._cli.runs import runs as runs_of_user
from hpcdist._cluster import world as world_of_launch
from hpcdist._keeper.leash import Leash
from hpcdist._runtime.node import here
from hpcdist._schedulers import job, job_watch, options, slurm
from hpcdist._schedulers.batch_manager import BatchManager
from hpcdist._schedulers.commands import SubmitError
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.slurm import SlurmManager
from hpcdist._schedulers.verdict import JobState
from tests.helpers import eventually


class World:
    """What a batch manager needs of a world."""

    def __init__(self, launch: Any, expected: int, folder: str) -> None:
        self.launch = launch
        self.expected = expected
        self.folder = folder
        self.job: Any = None
        self.verdict: Any = None
        self.command = ""
        self.up = False
        self.closed = False
        self.stays = False
        self.renews = False
        self.end: Any = None
        self.submitted_at = 0.0
        self.join: dict[str, Any] = {}

    def save_join(self, **changes: Any) -> None:
        self.join.update(changes)


class Launch:
    """What a batch manager needs of a launch."""

    def __init__(self, manager: SlurmManager, **params: Any) -> None:
        self.node = here.node
        self.plan = manager.prepare(manager.settings_of(params))
        self.settings = self.plan.settings
        self.manager = manager
        self.worlds = [
            World(self, size, manager.make_folder(self.plan)) for size in self.plan.sizes
        ]
        self.pending = True
        self.pids: list[int] = []
        self.failed: tuple[str, str, list[str]] | None = None
        self.reason: str | None = None
        self.estimated_start: Any = None
        self.leash = Leash()
        self.threads: list[threading.Thread] = []

    def background(self, work: Callable[[], object]) -> None:
        def run() -> None:
            with self.leash.held():
                work()

        thread = threading.Thread(target=run)
        self.threads.append(thread)
        thread.start()

    def every(self, work: Callable[[], float]) -> None:
        def loop() -> None:
            while self.pending:
                time.sleep(work())

        self.background(loop)

    def fail(
        self, what: Any, phase: str = "", tail: Sequence[str] = (), world: World | None = None
    ) -> None:
        least = self.settings.min_workers
        if world is not None and least is not None:
            others = [w for w in self.worlds if w is not world and not w.closed]
            if sum(w.expected for w in others) >= least:
                world.closed = True
                return
        self.failed = (str(what), phase, list(tail))
        self.cancel()

    def changed(self) -> None:
        """Nobody waits for it."""

    @property
    def goes_on(self) -> bool:
        return self.pending

    def cancel(self) -> None:
        self.pending = False
        for world in self.worlds:
            world.closed = True
        self.background(lambda: self.manager.cancel_jobs(self))

    def close(self) -> None:
        self.pending = False
        for thread in self.threads:
            thread.join(20)


class Slurm:
    """Programs on PATH, in shell, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self("srun", "printf 'MPI plugin types are...\\n\\tnone\\n\\tpmi2\\n'")
        self("sbatch", "echo 7")
        self("squeue", "true")
        self("sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
        self("scontrol", "echo Invalid job id specified >&2; exit 1")
        self("scancel", "true")

    def __call__(self, name: str, text: str) -> None:
        path = self.folder / f"{name}.new"
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.folder}/calls\n{text}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        path.rename(self.folder / name)

    def calls(self, name: str) -> list[str]:
        try:
            lines = (self.folder / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [line.partition(" ")[2] for line in lines if line.split()[0] == name]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HPCDIST_DIR", str(tmp_path / "state"))
    for name, value in {
        "REST": 0.02,
        "TICK": 0.02,
        "FIRST_POLL": 0.05,
        "POLL_EVERY": 0.1,
    }.items():
        monkeypatch.setattr(job_watch, name, value)
    monkeypatch.setattr(job_watch, "PATIENCE", (0.0, 0.05))
    _config.forget()
    slurm._flavours.cache_clear()
    yield Slurm(folder)
    slurm._flavours.cache_clear()
    _config.forget()


@pytest.fixture
def launched(fake: Slurm) -> Iterator[Callable[..., Launch]]:
    made: list[Launch] = []

    def launch(n: int = 2, **params: Any) -> Launch:
        manager = SlurmManager(n)
        made.append(Launch(manager, **{"mpi": "pmi2", **params}))
        manager.start(made[-1])
        return made[-1]

    yield launch
    for launch_ in made:
        launch_.close()


def failure(launch: Launch) -> str:
    eventually(lambda: launch.failed is not None)
    assert launch.failed is not None
    return launch.failed[0]


# Submitting


def test_a_job_is_submitted_and_written_down(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("squeue", "echo '7|PENDING|2099-01-01T14:05:00|N/A||Priority'")
    launch = launched(partition="debug")
    world = launch.worlds[0]
    eventually(lambda: launch.reason == "Priority")
    assert world.job == "7"
    assert fake.calls("sbatch") == [f"--parsable {world.folder}/script.sh"]
    assert "#SBATCH --partition=debug" in Path(world.folder, "script.sh").read_text()
    assert os.stat(world.folder).st_mode & 0o777 == 0o700
    (facts,) = job.read_manifests()
    assert (facts["jobs"], facts["scheduler"], facts["n"]) == ([JobId("7")], "slurm", 2)
    note = launch.manager.note(launch)
    assert note.startswith("job 7 queued: Priority, estimated start ")
    assert note.endswith("14:05")
    assert launch.estimated_start.tzinfo is not None
    record = Path(world.folder, "commands.jsonl").read_text().splitlines()
    assert json.loads(record[0])["out"] == "7\n"


def test_banners_clusters_and_the_cluster_in_every_command(
    fake: Slurm, launched: Callable[..., Launch]
) -> None:
    fake("sbatch", "echo 30 days left; echo '7;big'; echo warning >&2")
    launch = launched()
    eventually(lambda: fake.calls("squeue") != [])
    assert launch.worlds[0].job.cluster == "big"
    assert fake.calls("squeue")[0].startswith("-M big ")
    launch.cancel()
    launch.close()
    assert fake.calls("scancel") == ["-M big -Q 7"]


def test_a_wrapper_that_knows_no_parsable(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake(
        "sbatch",
        'case "$*" in *--parsable*) echo "unrecognized option --parsable" >&2; exit 2;; esac\n'
        "echo Submitted batch job 9",
    )
    launch = launched()
    eventually(lambda: launch.worlds[0].job == "9")
    assert len(fake.calls("sbatch")) == 2


def test_a_refusal_is_told_in_its_words(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("sbatch", "echo 'sbatch: error: Invalid qos' >&2; exit 1")
    launch = launched()
    assert failure(launch) == "sbatch: error: Invalid qos"
    assert launch.failed is not None
    assert launch.failed[1] == "submitting the job"
    assert len(fake.calls("sbatch")) == 1
    launch.close()
    assert fake.calls("scancel") == []


def test_a_submission_that_gave_no_answer_is_looked_for(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "SUBMIT_DEADLINE", 0.3)
    fake("sbatch", f'echo "$2" >{fake.folder}/script; sleep 60')
    fake("squeue", f'case "$*" in *%o*) echo "12|$(cat {fake.folder}/script)";; esac')
    launch = launched()
    eventually(lambda: launch.worlds[0].job == "12")
    assert len(fake.calls("sbatch")) == 1


def test_a_submission_of_which_there_is_no_trace(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "SUBMIT_DEADLINE", 0.3)
    fake("sbatch", "sleep 60")
    said = failure(launched())
    assert "sbatch did not answer within 0.3 s" in said
    assert "no job of" in said


def process_of(path: Path) -> int:
    """Wait until a program has written down its pid."""
    return int(eventually(lambda: path.exists() and path.read_text(), 20))


def runs(os_pid: int) -> bool:
    try:
        return Path(f"/proc/{os_pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_queue_timeout_holds_for_a_submission_that_hangs(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_watch, "ANSWER", 0.1)
    fake("sbatch", f"echo $$ >{fake.folder}/pid; sleep 1000")
    launch = launched(queue_timeout=2)
    sbatch = process_of(fake.folder / "pid")
    assert failure(launch) == "the job could not be submitted within queue_timeout=2 s"
    launch.close()
    assert not runs(sbatch)
    assert fake.calls("scancel") == []


def test_a_submission_that_hangs_is_cancelled_with_the_job_it_has_made(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_watch, "ANSWER", 0.5)
    fake("squeue", f'case "$*" in *%o*) echo "12|$(cat {fake.folder}/script)";; esac')
    fake("sbatch", f'echo "$2" >{fake.folder}/script; echo $$ >{fake.folder}/pid; sleep 1000')
    launch = launched()
    sbatch = process_of(fake.folder / "pid")
    launch.cancel()
    launch.close()
    assert not runs(sbatch)
    assert fake.calls("scancel") == ["-Q 12"]


def test_a_question_of_a_launch_that_is_over_is_taken_back(
    fake: Slurm, launched: Callable[..., Launch]
) -> None:
    fake("squeue", f"echo $$ >{fake.folder}/pid; sleep 1000")
    launch = launched()
    squeue = process_of(fake.folder / "pid")
    launch.cancel()
    eventually(lambda: not runs(squeue))
    launch.close()


def test_an_answer_without_an_id(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("sbatch", "echo done, friend; echo hm >&2")
    said = failure(launched())
    assert "'done, friend'" in said
    assert "'hm'" in said


def test_without_slurm_there_is_a_sentence(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert "'sbatch' was not found on PATH" in failure(launched())


def test_sbatch_that_waits_for_the_job(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("sbatch", "echo 7; sleep 60")
    launch = launched(options=["--wait"])
    eventually(lambda: launch.worlds[0].job == "7")


def test_options_are_read_once(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, times = options.read, []
    monkeypatch.setattr(options, "read", lambda *a, **k: times.append(1) or read(*a, **k))
    launch = launched(20, split=1)
    eventually(lambda: all(world.job is not None for world in launch.worlds))
    for world in launch.worlds:
        launch.manager.forget_folder(world)
    assert len(times) == 1


def test_jobs_of_one_size_go_as_an_array(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake(
        "sbatch",
        f'n=$(cat {fake.folder}/n 2>/dev/null); echo 1 >>{fake.folder}/n; echo "7${{n:+0}}"',
    )
    launch = launched(5, split=2)
    eventually(lambda: launch.worlds[2].job is not None)
    assert [world.job for world in launch.worlds] == ["7_0", "7_1", "70"]
    first, second, third = launch.worlds
    assert os.path.samefile(os.path.join(first.folder, "tasks", "1"), second.folder)
    assert "--array=0-1" in Path(first.folder, "script.sh").read_text()
    assert "--ntasks=1" in Path(third.folder, "script.sh").read_text()
    eventually(lambda: fake.calls("squeue") != [])
    assert " -j 7,70 " in fake.calls("squeue")[0]


def test_an_array_is_no_longer_than_the_site_allows(
    fake: Slurm, launched: Callable[..., Launch]
) -> None:
    fake("scontrol", "echo 'MaxArraySize            = 2'")
    fake(
        "sbatch",
        f'n=$(cat {fake.folder}/n 2>/dev/null); echo 1 >>{fake.folder}/n; echo "7${{n:+0}}"',
    )
    launch = launched(6, split=2)
    eventually(lambda: launch.worlds[2].job is not None)
    assert [world.job for world in launch.worlds] == ["7_0", "7_1", "70"]
    assert fake.calls("scontrol") == ["show config"]


def test_the_command_line_knows_the_tasks_of_an_array_whatever_their_ids(
    fake: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brackets(SlurmManager):
        def task(self, array: JobId, index: int) -> JobId:
            return JobId(f"{array}[{index}]")

    manager = Brackets(5)
    launch = Launch(manager, mpi="pmi2", split=2)
    manager.start(launch)
    eventually(lambda: len(runs_of_user()) == 3)
    try:
        found = runs_of_user()
        first = launch.worlds[0].folder
        assert [run.job for run in found] == ["7[0]", "7[1]", "7"]
        assert [run.exit_folder for run in found[:2]] == [f"{first}/tasks/0", f"{first}/tasks/1"]
        assert found[2].exit_folder == launch.worlds[2].folder
        assert len(named(found[:2], "7")) == 2
        assert named(found, "") == []
        for job, array in (("26[0].head", "26[].head"), ("26.1", "26")):  # PBS, Grid Engine
            task = replace(found[0], job=JobId(job), array=array)
            for name in ("26", job, array):
                assert named([task], name) == [task]
    finally:
        launch.close()


# Waiting


def test_no_command_runs_once_all_are_up(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But one, to know when the job ends."""
    monkeypatch.setattr(job_watch, "POLL_EVERY", 0.1)
    fake("squeue", "echo '7|RUNNING|||n1|None'")
    launch = launched()
    following = launch.manager._followed[launch]
    eventually(lambda: launch.worlds[0].verdict is not None)
    due = following._due
    launch.worlds[0].up = True
    assert launch.manager.note(launch) == "job 7 running: 0 of 2 workers have registered"
    eventually(lambda: following._known_to_run and following._due > due)
    before = len(fake.calls("squeue"))
    time.sleep(1.2)
    assert len(fake.calls("squeue")) == before


def test_polls_keep_their_distance(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_watch, "POLL_EVERY", 0.5)
    fake("squeue", "echo '7|PENDING|||n1|Priority'")
    launched()
    time.sleep(1.3)
    assert 1 <= len(fake.calls("squeue")) <= 3


def test_all_launches_of_a_process_share_the_turns_to_ask(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = here.node.service(job_watch.Pace)
    monkeypatch.setattr(job_watch, "POLL_EVERY", 600.0)
    monkeypatch.setattr(job_watch, "FIRST_POLL", 0.0)
    monkeypatch.setattr(pace, "_free_at", {})
    turns: list[bool] = []
    take = pace.take
    monkeypatch.setattr(pace, "take", lambda name: (turns.append(take(name)), turns[-1])[1])
    fake("squeue", "echo '7|PENDING|N/A|N/A||Resources'")
    for _ in range(4):
        launched()
    # Each of the others would have liked to more than once.
    eventually(lambda: fake.calls("squeue") and turns.count(False) >= 12)
    assert turns.count(True) == 1
    assert len(fake.calls("squeue")) == 1


def test_a_reason_that_can_never_start(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("squeue", "echo '7|PENDING|N/A|N/A||QOSMaxWallDurationPerJobLimit'")
    launch = launched()
    assert failure(launch) == "job 7 can never start: QOSMaxWallDurationPerJobLimit"
    eventually(lambda: fake.calls("scancel") == ["-Q 7"])


def test_queue_timeout(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("squeue", "echo '7|PENDING|N/A|N/A||Resources'")
    launch = launched(queue_timeout=2)
    assert failure(launch) == "job 7 did not start within queue_timeout=2 s: Resources"
    eventually(lambda: fake.calls("scancel") == ["-Q 7"])


def test_a_launch_that_is_given_up_says_why_though_others_have_had_the_turns_to_ask(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_watch, "POLL_EVERY", 600.0)
    monkeypatch.setattr(here.node.service(job_watch.Pace), "_free_at", {})  # and back, at the end
    fake("squeue", "echo '7|PENDING|N/A|N/A||Resources'")
    first = launched()
    eventually(lambda: first.reason == "Resources")
    assert failure(launched(queue_timeout=2)).endswith("queue_timeout=2 s: Resources")


def test_a_running_job_is_not_in_the_queue(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("squeue", "echo '7|RUNNING|||n1|None'")
    launch = launched(queue_timeout=2)
    time.sleep(3.0)
    assert launch.failed is None


def test_a_job_that_dies_is_told_with_its_log(fake: Slurm, launched: Callable[..., Launch]) -> None:
    launch = launched()
    world = launch.worlds[0]
    Path(world.folder, "log").write_text("".join(f"line {i}\n" for i in range(100)))
    Path(world.folder, "exit").write_text("7 1795238191 n1\n")
    assert failure(launch) == "job 7 ended before its workers had registered: FAILED, exit code 7"
    assert launch.failed is not None
    assert launch.failed[2][-1] == "line 99"
    assert fake.calls("scancel") == []  # it has ended


def test_a_terminal_word_is_asked_about(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("squeue", "echo '7|FAILED|||n1|NonZeroExitCode'")
    fake("sacct", "echo '7|FAILED|9:0|||n1'")
    assert failure(launched()).endswith("FAILED, exit code 9")


def test_not_listed_is_no_success(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    said = failure(launched())
    assert "no longer lists job 7" in said


def test_not_listed_but_remembered(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("sacct", "echo '7|CANCELLED by 1000|0:0|||n1'")
    assert failure(launched()).endswith("registered: CANCELLED by 1000")


def test_a_scheduler_out_of_reach_changes_nothing(
    fake: Slurm, launched: Callable[..., Launch]
) -> None:
    fake("squeue", "echo '7|PENDING|||n1|Priority'")
    launch = launched()
    eventually(lambda: launch.worlds[0].verdict is not None)
    fake("squeue", "echo Unable to contact slurm controller >&2; exit 1")
    eventually(lambda: "Unable to contact" in (launch.reason or ""))
    assert launch.failed is None
    assert launch.worlds[0].verdict.state is JobState.QUEUED
    fake("squeue", "echo '7|RUNNING|||n1|None'")
    eventually(lambda: launch.worlds[0].verdict.state is JobState.RUNNING)


# The end


def test_a_cancel_waits_for_the_submission_in_flight(
    fake: Slurm, launched: Callable[..., Launch]
) -> None:
    fake("sbatch", "sleep 0.5; echo 7")
    launch = launched()
    eventually(lambda: fake.calls("sbatch") != [])
    launch.cancel()
    launch.close()
    assert fake.calls("scancel") == ["-Q 7"]


def test_nothing_is_submitted_after_a_cancel(fake: Slurm, launched: Callable[..., Launch]) -> None:
    fake("sbatch", "sleep 0.5; echo 7")
    launch = launched(3, split=2)
    eventually(lambda: fake.calls("sbatch") != [])
    launch.cancel()
    launch.close()
    assert len(fake.calls("sbatch")) == 1
    assert fake.calls("scancel") == ["-Q 7"]


def test_cancelling_twice_is_once(fake: Slurm, launched: Callable[..., Launch]) -> None:
    launch = launched()
    eventually(lambda: launch.worlds[0].job is not None)
    launch.cancel()
    launch.cancel()
    launch.close()
    assert fake.calls("scancel") == ["-Q 7"]


def test_only_the_jobs_of_closed_worlds_are_cancelled(
    fake: Slurm, launched: Callable[..., Launch]
) -> None:
    launch = launched(4, split=2)
    eventually(lambda: launch.worlds[1].job is not None)
    launch.worlds[1].closed = True
    launch.manager.cancel_jobs(launch)
    assert fake.calls("scancel") == ["-Q 7_1"]


def test_a_job_that_can_be_done_without_is_cancelled(
    fake: Slurm, launched: Callable[..., Launch]
) -> None:
    fake("squeue", "echo '7_0|RUNNING|||n1|None'; echo '7_1|PENDING||||BadConstraints'")
    launch = launched(4, split=2, min_workers=2)
    eventually(lambda: fake.calls("scancel") == ["-Q 7_1"])
    assert launch.failed is None


def test_folders_go_when_nobody_needs_them(fake: Slurm, launched: Callable[..., Launch]) -> None:
    launch = launched(5, split=2)
    eventually(lambda: launch.worlds[2].job is not None)
    first, second, third = launch.worlds
    launch.manager.forget_folder(first)
    assert os.path.isdir(first.folder)  # the second task's script lies in it
    launch.manager.forget_folder(third)
    assert not os.path.exists(third.folder)
    launch.manager.forget_folder(second)
    assert not os.path.exists(first.folder)
    assert not os.path.exists(second.folder)


def test_the_end_of_the_process_waits_for_a_folder_that_is_being_removed() -> None:
    begun, may_end = threading.Event(), threading.Event()
    removed: list[object] = []

    def forget_folder(world: object) -> None:
        begun.set()
        may_end.wait(60)
        removed.append(world)

    jobs_of = SimpleNamespace(forget_folder=forget_folder)
    launch: Any = SimpleNamespace(manager=None, settings=None, jobs_of=jobs_of, node=here.node)
    world = world_of_launch.World(launch, None)
    world.folder = "/no/such"
    world.close()
    threads = [threading.Thread(target=world.forget) for _ in range(2)]
    threads[0].start()
    try:
        assert begun.wait(60)
        threads[1].start()  # as at the exit of process 1, while a failed launch clears up
        threads[1].join(0.2)
        assert threads[1].is_alive()
        assert not world.ended()
    finally:
        may_end.set()
    for thread in threads:
        thread.join(60)
    assert removed == [world]
    assert world.ended()


def test_ranks_in_a_job_that_stays_have_time_to_end() -> None:
    """Grid Engine ends a job in which ranks on other nodes had to be killed."""
    launch: Any = SimpleNamespace(manager=None, settings=None, jobs_of=None, node=here.node)
    said: list[dict[str, Any]] = []
    for stays in (False, True):
        world = world_of_launch.World(launch, None)
        world.keeper = SimpleNamespace(send=said.append)  # type: ignore[assignment]
        world.stays = stays
        world.close()
    assert [op["stay"] for op in said] == [False, True]
    assert said[1]["grace"] >= 5 * said[0]["grace"]


def test_folders_are_kept_if_asked(fake: Slurm, launched: Callable[..., Launch]) -> None:
    launch = launched(keep=True)
    launch.manager.forget_folder(launch.worlds[0])
    assert os.path.isdir(launch.worlds[0].folder)


def test_the_join_file_says_how_the_world_is_started(
    fake: Slurm, launched: Callable[..., Launch]
) -> None:
    launch = launched(isolation="process", mpi=None)
    eventually(lambda: launch.worlds[0].join != {})
    join = launch.worlds[0].join
    assert (join["how"], join["mpi"]) == ("other", False)
    assert "{step}" in join["end"]
    assert "srun --mpi=none" in launch.worlds[0].command


def test_the_end_of_a_world(fake: Slurm, launched: Callable[..., Launch]) -> None:
    launch = launched()
    world = launch.worlds[0]
    assert launch.manager.end_of(World(launch, 1, "/no/such")) is None
    eventually(lambda: world.job is not None)
    world.up = True
    fake("scancel", "exit 0")
    assert "so it was cancelled" in (launch.manager.end_of(world) or "")
    fake("sacct", "echo '7|COMPLETED|0:0|||n1'")
    assert launch.manager.end_of(world) is None
    fake("sacct", "echo '7|OUT_OF_MEMORY|0:125|||n1'")
    assert (launch.manager.end_of(world) or "").startswith("OUT_OF_MEMORY")


def test_a_script_that_was_asked_to_end_waits_for_the_schedulers_word(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_watch, "PATIENCE", (0.0,) * 7)
    launch = launched()
    world = launch.worlds[0]
    eventually(lambda: world.job is not None)
    world.up = True
    # PBS lists a job as running for seconds after all its processes got SIGTERM, the keeper first.
    Path(world.folder, "exit").write_text("143 1795936663 n1 \n")
    fake(
        "sacct",
        f"echo >>{fake.folder}/asked; case $(wc -l <{fake.folder}/asked) in\n"
        "[123456]) echo '7|RUNNING|0:0|||n1';; *) echo '7|CANCELLED by 1000|0:15|||n1';; esac",
    )
    fake("scontrol", "echo Invalid job id specified >&2; exit 1")
    assert (launch.manager.end_of(world) or "").startswith("CANCELLED")


SHOWN = "echo 'JobId=7 JobName=x'; echo '   JobState={} Reason=TimeLimit Dependency=(null)'"
SILENT = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


@pytest.mark.parametrize(
    ("code", "before"),
    [
        (0, SHOWN.format("COMPLETING")),
        (1, SHOWN.format("COMPLETING")),
        (0, SILENT),
        (1, SILENT),  # its launcher was killed before it was
    ],
    ids=["done, completing", "failed, completing", "done, no answer", "failed, no answer"],
)
def test_a_time_limit_that_the_script_never_heard_of(
    fake: Slurm,
    launched: Callable[..., Launch],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    before: str,
) -> None:
    monkeypatch.setattr(job_watch, "PATIENCE", (0.0,) * 7)
    launch = launched()
    world = launch.worlds[0]
    eventually(lambda: world.job is not None)
    world.up = True
    # Slurm signals the ranks first; the script ends before it gets its signal, and just after the
    # first question.
    fake(
        "scontrol",
        f"echo {code} 1795936663 n1 >{world.folder}/exit\n"
        f"echo >>{fake.folder}/asked; case $(wc -l <{fake.folder}/asked) in\n"
        f"[12]) {before};; *) {SHOWN.format('TIMEOUT')};; esac",
    )
    assert launch.manager.end_of(world) == "TIMEOUT (TimeLimit)"


def test_a_script_that_failed_by_itself_is_believed_before_the_last_question(
    fake: Slurm, launched: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_watch, "PATIENCE", (0.0,) * 7)
    launch = launched()
    world = launch.worlds[0]
    eventually(lambda: world.job is not None)
    world.up = True
    Path(world.folder, "exit").write_text("7 1795936663 n1\n")
    assert launch.manager.end_of(world) == "FAILED, exit code 7"
    assert len(fake.calls("sacct")) == job_watch.OF_FAILURES


def test_a_job_on_a_lost_node_is_cancelled_until_it_is_gone(
    fake: Slurm,
    launched: Callable[..., Launch],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(job_watch, "PURSUE_EVERY", 0.2)
    launch = launched()
    world = launch.worlds[0]
    eventually(lambda: world.job is not None)
    world.up = True
    fake("squeue", "echo '7|RUNNING|N/A|N/A|n1|None'")
    fake("scancel", "echo scancel: error: no contact >&2; exit 1")
    here.node.start()
    said = launch.manager.end_of(world) or ""
    assert "does not answer, and it could not be cancelled yet" in said
    assert "no contact" in said
    assert "no contact; trying again" in caplog.text  # at once
    fake("scancel", "exit 0")
    eventually(lambda: len(fake.calls("scancel")) >= 3)
    fake("squeue", "echo '7|CANCELLED|N/A|N/A|n1|None'")
    asked = len(fake.calls("squeue"))
    eventually(lambda: len(fake.calls("squeue")) > asked)


@pytest.mark.parametrize(
    "scheduler", [slurm.Slurm, 8, type("Nameless", (slurm.Slurm,), {"name": ""})()]
)
def test_a_batch_manager_wants_a_scheduler(scheduler: Any) -> None:
    with pytest.raises(TypeError, match="a Scheduler that has a name"):
        BatchManager(scheduler, 8)


# Programs, and jobs by their ids


def test_a_program_is_submitted_without_a_keeper(fake: Slurm) -> None:
    manager = SlurmManager(4)
    made = manager.submit_program(["driver.py", "a b"], mpi="pmi2", t=5)
    script = Path(made.folder, "script.sh").read_text()
    assert made.job == "7"
    assert "keeper" not in script
    assert "srun --mpi=pmi2 --ntasks=4 " in script
    assert "driver.py 'a b' &" in script
    assert "--label" not in script
    (facts,) = job.read_manifests()
    assert (facts["jobs"], facts["kind"], facts["what"]) == (["7"], "program", "driver.py 'a b'")
    assert facts["logs"] == [f"{made.folder}/log"]
    shown = manager.program_script(["driver.py", "a b"], mpi="pmi2", t=5)
    assert shown.replace("hpcdist-run", made.name) == script


def test_a_refused_program_leaves_nothing(fake: Slurm, tmp_path: Path) -> None:
    fake("sbatch", "echo no >&2; exit 1")
    with pytest.raises(SubmitError, match="no"):
        SlurmManager(4).submit_program(["driver.py"], mpi="pmi2", job_dir=str(tmp_path / "runs"))
    assert os.listdir(tmp_path / "runs") == []
    assert os.listdir(tmp_path / "state" / "jobs") == []


def test_a_split_program_is_refused(fake: Slurm) -> None:
    with pytest.raises(ValueError, match="split="):
        SlurmManager(4).submit_program(["driver.py"], mpi="pmi2", split=2)


def test_a_run_elsewhere_is_known_until_it_is_cleared_away(fake: Slurm, tmp_path: Path) -> None:
    made = SlurmManager(1).submit_program(
        ["driver.py"], mpi="pmi2", job_dir=str(tmp_path / "my runs")
    )
    assert made.folder.startswith(str(tmp_path / "my runs"))
    assert len(job.read_manifests()) == 1
    job.forget(made.folder)
    assert job.read_manifests() == []


def test_the_state_of_a_job_that_only_its_folder_remembers(fake: Slurm, tmp_path: Path) -> None:
    (tmp_path / "exit").write_text("3 1795238191 n1\n")
    found = SlurmManager(1).state_of(JobId("9"), str(tmp_path))
    assert found is not None
    assert found.describe() == "FAILED, exit code 3"
    assert SlurmManager(1).state_of(JobId("9")) is None


def test_a_script_that_is_shown_makes_nothing(fake: Slurm, tmp_path: Path) -> None:
    SlurmManager(2).job_script(mpi="pmi2", job_dir=str(tmp_path / "runs"))
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "runs").exists()
    assert fake.calls("sbatch") == []


def test_the_flavour_is_asked_of_srun(fake: Slurm) -> None:
    assert SlurmManager(2).flavours() == {"none", "pmi2"}
    SlurmManager(2).flavours()
    assert fake.calls("srun") == ["--mpi=list"]
