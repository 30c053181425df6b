"""The keeper and its launch: real processes, and real MPI where the environment has one."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcdist._keeper import folders, installed_mpi
from hpcdist._keeper.installed_mpi import MpiNotFound, find_mpi, identify, launch_op, scrubbed
from hpcdist._keeper.keeper_link import KeeperLink
from hpcdist._keeper.pmi import PmiServer
from hpcdist._keeper.processes import Lines, signal_number

DEADLINE = 20.0

# A worker that does what the join file's list for its rank says, one word after the other.
FAKE_WORKER = """
import json, os, signal, subprocess, sys, time


def rank():
    return int(os.environ.get("HPCDIST_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])


def work(join):
    with open(join) as file:
        plan = json.load(file)
    me = rank()
    if plan["mpirun"]:
        from hpcdist._keeper.processes import adopt_output
        assert adopt_output(plan["dir"], me)
        sys.stdout.reconfigure(line_buffering=True)
    if plan["mpi"]:
        import mpi4py
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
    comm = None
    for word in plan["ranks"][me]:
        if word == "mpi":
            from mpi4py import MPI
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
            comm = MPI.COMM_WORLD
            comm.Set_errhandler(MPI.ERRORS_RETURN)
            assert comm.size == len(plan["ranks"]), comm.size
            comm.Barrier()
            from hpcdist._keeper.processes import segments_of
            for path in segments_of(os.getpid()):
                print("segment", path)
            print("up", os.getpid())
            while not os.path.exists(plan["all"]):
                time.sleep(0.005)
        elif word == "ring":
            # The ranks that are left pass a token over point-to-point messages.
            left = plan["left"]
            at = left.index(me)
            send = comm.isend(me, left[(at + 1) % len(left)], 7)
            got = comm.recv(source=left[at - 1], tag=7)
            send.wait()
            print("ring", got)
        elif word == "child":
            child = subprocess.Popen(["sleep", "60"])
            print("child", child.pid)
        elif word == "stuck":
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
            print("stuck", os.getpid())
            time.sleep(60)
        elif word == "sleep":
            print("sleeping", os.getpid())
            time.sleep(60)
        elif word == "wait":
            # Until the test makes the file: the join file's neighbour "go".
            while not os.path.exists(plan["go"]):
                time.sleep(0.005)
        elif word == "grow":
            there = bytearray(64_000_000)
            there[::4096] = bytes(len(there[::4096])).replace(bytes(1), b"x")
            del there
        elif word == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif word == "raise":
            raise ValueError("bad luck")
        elif word.startswith("exit"):
            sys.stdout.flush()
            os._exit(int(word[4:]))
        elif word.startswith("say "):
            os.write(1, word[4:].encode())
        elif word.startswith("err "):
            os.write(2, word[4:].encode())
    time.sleep(60)
"""


def mpi_here() -> installed_mpi.Mpi | None:
    try:
        return find_mpi()
    except MpiNotFound:
        return None


MPI = mpi_here()
HOWS = ["plain"] + ([MPI.how] if MPI is not None and MPI.how is not None else [])
needs_mpi = pytest.mark.skipif(len(HOWS) < 2, reason="no MPI that keeps deaths apart")
MPI_HOW = HOWS[-1]


class World:
    """A keeper under test, with everything it has said so far."""

    def __init__(self, tmp: Path, how: str, ranks: list[list[str]], left: list[int]) -> None:
        self.how = how
        self.go = tmp / "go"
        self.all = tmp / "all"
        self.dir = tmp / "world"
        self.dir.mkdir(mode=0o700)
        self.join = self.dir / "join.json"
        plan = {
            "dir": str(self.dir),
            "go": str(self.go),
            "all": str(self.all),
            "left": left,
            "mpi": how != "plain",
            "mpirun": how == "mpirun",
            "ranks": ranks,
        }
        self.join.write_text(json.dumps(plan))
        (tmp / "fake_worker.py").write_text(FAKE_WORKER)
        self.ranks = ranks
        self.size = len(ranks)
        code = f"import fake_worker; fake_worker.work({str(self.join)!r})"
        self.op = launch_op(
            how,  # type: ignore[arg-type]
            self.size,
            join=str(self.join),
            directory=str(self.dir),
            mpi=MPI,
            worker="fake_worker",
            command=[sys.executable, "-c", code] if how == "mpirun" else [],
            env={"PYTHONPATH": os.pathsep.join([str(tmp), *sys.path])},
            path=[str(tmp)],
        )
        self.events: list[dict[str, Any]] = []
        self.ended = False
        self.keeper = KeeperLink()

    def start(self) -> World:
        self.keeper.send(self.op)
        if self.how != "plain" and all("mpi" in words[:1] for words in self.ranks):
            self.up("up")
            self.all.touch()
        return self

    def pump(self, timeout: float) -> None:
        select.select([self.keeper], [], [], timeout)
        try:
            self.events += self.keeper.receive()
        except EOFError:
            self.ended = True

    def until(self, true: Callable[[], Any], *, within: float = DEADLINE) -> Any:
        deadline = time.monotonic() + within
        while not (answer := true()):
            left = deadline - time.monotonic()
            waiting = left > 0 and not self.ended
            assert waiting, f"waited in vain; events: {self.events}"
            self.pump(left)
        return answer

    def of(self, kind: str, rank: int | None = None) -> list[dict[str, Any]]:
        return [e for e in self.events if e["ev"] == kind and rank in (None, e.get("rank"))]

    def text(self, rank: int | None, fd: int = 1) -> str:
        return "".join(
            e["text"]
            for e in self.events
            if e["ev"] == "out" and e["rank"] == rank and e["fd"] == fd
        )

    def word(self, rank: int, name: str) -> str:
        """What a rank printed behind `name`, once it has."""

        def found() -> str | None:
            for line in self.text(rank).splitlines():
                if line.startswith(name + " "):
                    return line.split()[1]
            return None

        answer: str = self.until(found)
        return answer

    def up(self, word: str) -> dict[int, int]:
        """Wait until every rank has printed `word` and its pid; register them."""
        pids = {rank: int(self.word(rank, word)) for rank in range(self.size)}
        for rank, pid in pids.items():
            self.keeper.send({"op": "registered", "rank": rank, "os_pid": pid})
        return pids

    def segments(self) -> set[str]:
        """The named MPI segments the ranks had mapped."""
        text = "".join(event["text"] for event in self.of("out"))
        return {line.split()[1] for line in text.splitlines() if line.startswith("segment ")}

    def status(self, rank: int) -> int | None:
        exits = self.until(lambda: self.of("exit", rank))
        status: int | None = exits[0]["status"]
        return status

    def peak_rss(self, rank: int) -> int | None:
        exits = self.until(lambda: self.of("exit", rank))
        peak: int | None = exits[0]["peak"]
        return peak

    def finish(self, grace: float = 0.0) -> float:
        began = time.monotonic()
        self.keeper.send({"op": "end", "grace": grace})
        self.until(lambda: self.of("ended"))
        took = time.monotonic() - began
        assert self.events[-1]["ev"] == "ended"
        assert self.keeper.wait(5.0) == 0
        return took


Launch = Callable[..., World]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    worlds: list[World] = []

    def start(
        how: str, *ranks: list[str], left: list[int] | None = None, option: str = ""
    ) -> World:
        world = World(tmp_path, how, list(ranks), left or list(range(len(ranks))))
        if option:
            world.op["argv"][1:1] = [option]
        worlds.append(world)
        return world.start()

    yield start
    for world in worlds:
        world.keeper.close()
        world.keeper.wait(5.0)
        assert not world.dir.exists()
        for event in world.of("started"):
            assert not alive(event["os_pid"])
        assert not [path for path in world.segments() if os.path.exists(path)]


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def session(leader: int) -> list[int]:
    members = []
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        with contextlib.suppress(OSError):
            if os.getsid(pid) == leader:
                members.append(pid)
    return members


def until_dead(pids: list[int], within: float) -> None:
    deadline = time.monotonic() + within
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "still there: " + str(list(filter(alive, pids)))
        select.select([], [], [], 0.005)


@pytest.mark.parametrize("how", HOWS)
def test_exit_codes_and_output_arrive_before_the_end(launch: Launch, how: str) -> None:
    mpi = ["mpi"] if how != "plain" else []
    world = launch(how, [*mpi, "say one\ntwo", "exit3"], [*mpi, "err x\u00e9\n", "exit0"])
    # prterun drops the report of a rank when the last ones leave together: None is "unknown".
    unknown = {None} if how == "mpirun" else set()
    assert world.status(0) in {3} | unknown
    assert world.status(1) in {0} | unknown
    assert world.text(0).endswith("one\ntwo")
    assert world.text(1, fd=2) == "x\u00e9\n"
    exit_at = world.events.index(world.of("exit", 0)[0])
    assert all(
        world.events.index(event) < exit_at for event in world.of("out", 0) if event["rank"] == 0
    )
    world.finish()


@pytest.mark.parametrize("how", [how for how in HOWS if how != "mpirun"])
def test_an_end_tells_how_much_memory_there_was(launch: Launch, how: str) -> None:
    """Also what was given back, and of a rank that was killed."""
    mpi = ["mpi"] if how != "plain" else []
    world = launch(how, [*mpi, "grow", "sleep"], [*mpi, "sleep"])
    pids = {rank: int(world.word(rank, "sleeping")) for rank in (0, 1)}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    grown, small = world.peak_rss(0), world.peak_rss(1)
    assert grown is not None
    assert small is not None
    assert grown - small > 50_000_000
    world.finish()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("death", ["segv", "exit3", "exit0", "SIGKILL"])
def test_one_death_stays_one(launch: Launch, how: str, death: str) -> None:
    mpi = ["mpi"] if how != "plain" else []
    last = "sleep" if death == "SIGKILL" else death
    ring = ["ring"] if how != "plain" else []
    others = [*mpi, "say up2\n", "wait", *ring, "sleep"]
    world = launch(how, others, [*mpi, last], others, left=[0, 2])
    if death == "SIGKILL":
        pid = int(world.word(1, "sleeping"))
        world.keeper.send({"op": "registered", "rank": 1, "os_pid": pid})
        world.keeper.send({"op": "kill", "rank": 1, "signal": signal.SIGKILL})
    expected = {"segv": -signal.SIGSEGV, "exit3": 3, "exit0": 0, "SIGKILL": -signal.SIGKILL}
    assert world.status(1) == expected[death]
    world.go.touch()
    if ring:
        assert (world.word(0, "ring"), world.word(2, "ring")) == ("2", "0")
    assert world.word(0, "sleeping")
    assert world.word(2, "sleeping")
    assert not world.of("exit", 0) + world.of("exit", 2) + world.of("failed")
    assert world.finish() < 2.0


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["sleep", "stuck"])
def test_the_link_s_end_is_the_world_s_end(launch: Launch, how: str, kind: str) -> None:
    mpi = ["mpi"] if how != "plain" else []
    world = launch(how, [*mpi, kind], [*mpi, kind])
    pids = list(world.up({"sleep": "sleeping", "stuck": "stuck"}[kind]).values())
    began = time.monotonic()
    world.keeper.close()
    world.keeper.wait(5.0)
    assert time.monotonic() - began < 4.0
    until_dead(pids, 0.5)
    assert not world.dir.exists()


@pytest.mark.parametrize("how", HOWS)
def test_orderly_end_waits_for_those_who_leave(launch: Launch, how: str) -> None:
    mpi = ["mpi"] if how != "plain" else []
    world = launch(how, *[[*mpi, "say here 1\n", "wait", "exit0"]] * 2)
    assert world.word(0, "here")
    assert world.word(1, "here")
    world.keeper.send({"op": "end", "grace": 10.0})
    world.go.touch()
    world.until(lambda: world.of("ended"), within=5.0)
    assert {world.status(0), world.status(1)} <= ({0, None} if how == "mpirun" else {0})


@pytest.mark.parametrize("how", HOWS)
def test_a_rank_s_children_go_with_it(launch: Launch, how: str) -> None:
    world = launch(how, [*(["mpi"] if how != "plain" else []), "child", "sleep"])
    child = int(world.word(0, "child"))
    world.up("sleeping")
    world.keeper.send({"op": "kill", "rank": 0, "signal": signal.SIGKILL})
    assert world.status(0) == -signal.SIGKILL
    until_dead([child], 2.0)
    world.finish()


@pytest.mark.parametrize("how", HOWS)
def test_a_killed_keeper_takes_its_ranks_along(launch: Launch, how: str) -> None:
    world = launch(how, ["sleep"], ["sleep"])
    pids = list(world.up("sleeping").values())
    world.keeper.process.kill()
    until_dead(pids, 5.0)
    world.keeper.wait(5.0)
    # The launcher removes its files first; nobody is left to clean up the rest but us.
    until_dead(session(world.keeper.process.pid), 5.0)
    shutil.rmtree(world.dir)


@pytest.mark.parametrize("how", HOWS)
def test_sigterm_is_an_end_and_ctrl_c_is_not(launch: Launch, how: str) -> None:
    world = launch(how, ["sleep"])
    pids = list(world.up("sleeping").values())
    for number in (signal.SIGINT, signal.SIGHUP):
        world.keeper.process.send_signal(number)
    world.keeper.send({"op": "kill", "rank": 0, "signal": signal.SIGTERM})
    assert world.status(0) == -signal.SIGTERM
    world.keeper.process.terminate()
    world.until(lambda: world.of("ended"), within=5.0)
    until_dead(pids, 0.5)


def test_much_output_waits_for_a_slow_reader(launch: Launch) -> None:
    size = 20 * 1024 * 1024
    world = launch("plain", ["say " + "x" * size, "exit0"])
    world.until(lambda: world.of("started"))
    assert world.status(0) == 0
    assert len(world.text(0)) == size
    world.finish()


@needs_mpi
def test_a_death_before_the_world_is_up_fails_the_launch(launch: Launch) -> None:
    world = launch(MPI_HOW, ["mpi", "sleep"], ["err why\n", "raise"], ["mpi", "sleep"])
    failed = world.until(lambda: world.of("failed"))[0]["text"]
    assert "rank 1 ended (exit code 1) before the world was up" in failed
    assert "bad luck" in failed
    world.until(lambda: world.of("ended"), within=5.0)


def test_a_worker_that_cannot_be_imported_fails_the_launch(tmp_path: Path) -> None:
    with_world(tmp_path, "no_such_module_of_ours", "no_such_module_of_ours")


def with_world(tmp_path: Path, worker: str, expected: str) -> None:
    keeper = KeeperLink()
    directory = tmp_path / "world"
    directory.mkdir()
    op = launch_op("plain", 1, join="", directory=str(directory), worker=worker)
    keeper.send(op)
    events: list[dict[str, Any]] = []
    with contextlib.suppress(EOFError):
        while True:
            select.select([keeper], [], [], DEADLINE)
            events += keeper.receive()
    keeper.wait(5.0)
    keeper.close()
    assert [event["ev"] for event in events] == ["launching", "failed", "ended"]
    assert expected in events[1]["text"]


@pytest.mark.skipif("mpirun" not in HOWS, reason="no Open MPI")
def test_a_launcher_that_refuses_says_why(launch: Launch) -> None:
    world = launch("mpirun", ["sleep"], option="--no-such-option")
    failed = world.until(lambda: world.of("failed"))[0]["text"]
    assert "before any rank was up" in failed
    assert "no-such-option" in failed
    world.until(lambda: world.of("ended"))


@needs_mpi
def test_find_mpi_names_this_environment_s(tmp_path: Path) -> None:
    assert MPI is not None
    assert os.access(MPI.mpiexec, os.X_OK)
    assert find_mpi() is find_mpi(sys.executable)
    assert "mpi4py.MPI" not in sys.modules


def test_mpi_not_found_says_what_to_install() -> None:
    with pytest.raises(MpiNotFound, match="pip install mpi4py mpich"):
        find_mpi("/no/such/python")


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("mpiexec (OpenRTE) 4.1.6\n\nReport bugs to", ("openmpi", (4, 1, 6))),
        ("mpirun (Open MPI) 5.0.11", ("openmpi", (5, 0, 11))),
        ("HYDRA build details:\n    Version:        5.0.2\n    Release", ("mpich", (5, 0, 2))),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18 Build", ("intel", (2021, 18))),
        ("something else 1.0", None),
    ],
)
def test_identify(text: str, family: object) -> None:
    assert identify(text) == family


def test_scrubbed_keeps_the_configuration() -> None:
    dirty = {"PMIX_RANK": "0", "HYDI_CONTROL_FD": "1", "SLURM_JOB_ID": "1", "SLURM_CONF": "c"}
    assert scrubbed(dirty | {"PATH": "p"}) == {"SLURM_CONF": "c", "PATH": "p"}


def test_lines_are_whole_unless_too_long_or_last() -> None:
    lines = Lines()
    assert lines.feed(b"a\nb\xc3") == "a\n"
    assert lines.feed(b"\xa9") == ""
    assert lines.feed(b"x" * 70_000).startswith("b\u00e9xxx")
    assert lines.feed(b"end", last=True) == "end"


def test_every_signal_is_known_by_its_description() -> None:
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        assert signal_number(signal.strsignal(number) or "") == number


def test_pmi_barrier_and_values() -> None:
    server = PmiServer(2, "kvs")
    assert server.feed(0, b"cmd=put kvsname=kvs key=a value=b=c d\ncmd=ba") == [
        (0, b"cmd=put_result rc=0 msg=success\n")
    ]
    assert server.feed(0, b"rrier_in\n") == []
    assert server.feed(1, b"cmd=barrier_in\n") == [
        (0, b"cmd=barrier_out rc=0\n"),
        (1, b"cmd=barrier_out rc=0\n"),
    ]
    assert server.feed(1, b"cmd=get kvsname=kvs key=a\n")[0][1].endswith(b" value=b=c d\n")
    assert b"rc=-1" in server.feed(1, b"cmd=get kvsname=kvs key=none\n")[0][1]
    assert server.complete() == []
    assert server.feed(0, b"cmd=barrier_in\n") == []
    assert server.leave(1) == [(0, b"cmd=barrier_out rc=0\n")]


def test_pmi_refuses_to_spawn() -> None:
    server = PmiServer(1, "kvs")
    request = b"mcmd=spawn\nnprocs=1\nexecname=x\nendcmd\n"
    assert server.feed(0, request) == [(0, b"cmd=spawn_result rc=1 errmsg=not_supported\n")]
    assert server.feed(0, b"cmd=get_appnum\n") == [(0, b"cmd=appnum rc=0 appnum=0\n")]


def test_pmi_barrier_does_without_the_dead_only_once_the_world_is_up() -> None:
    server = PmiServer(2, "kvs")
    assert server.leave(1) == []
    assert server.feed(0, b"cmd=barrier_in\n") == []
    assert server.complete() == [(0, b"cmd=barrier_out rc=0\n")]


def test_pmi_of_two_hosts_meets_at_its_barriers() -> None:
    hosts = [PmiServer(3, "kvs", [2, 1], number) for number in (0, 1)]
    assert [list(server.ranks) for server in hosts] == [[0, 1], [2]]
    asked = b"cmd=get kvsname=kvs key=PMI_process_mapping\n"
    for server in hosts:
        rank = server.ranks[0]
        assert server.feed(rank, asked)[0][1].endswith(b" value=(vector,(0,1,2),(1,1,1))\n")
        assert server.feed(rank, b"cmd=put kvsname=kvs key=k%d value=v\n" % rank)
        assert server.news() is None
        assert server.feed(rank, b"cmd=barrier_in\n") == []
    assert hosts[0].news() is None, "its second rank is missing"
    assert hosts[1].news() == {"k2": "v"}
    assert hosts[1].news() is None, "told once"
    assert hosts[0].feed(1, b"cmd=barrier_in\n") == []
    assert hosts[0].news() == {"k0": "v"}
    released = [server.meet({"k0": "v", "k2": "v"}) for server in hosts]
    assert [[rank for rank, _ in each] for each in released] == [[0, 1], [2]]
    assert hosts[0].feed(1, b"cmd=get kvsname=kvs key=k2\n")[0][1].endswith(b" value=v\n")
    assert hosts[1].feed(2, b"cmd=barrier_in\n") == []
    assert hosts[1].news() == {}, "the next barrier is one of its own"


def test_it_hears_that_it_is_to_end_while_it_starts_ranks(tmp_path: Path) -> None:
    world = World(tmp_path, "plain", [["sleep"]] * 300, list(range(300)))
    try:
        world.start()
        world.until(lambda: world.of("started"))
        world.finish()
    finally:
        world.keeper.close()
        world.keeper.wait(5.0)
    begun = world.of("started")
    assert len(begun) < 300
    until_dead([event["os_pid"] for event in begun], 5.0)


def test_a_folder_that_is_filled_while_it_is_removed_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a rank that has been killed, and whose end is not there yet."""
    folder = tmp_path / "world"
    folder.mkdir()
    tries: list[str] = []
    rmtree = shutil.rmtree

    def remove(path: str, *, ignore_errors: bool) -> None:
        tries.append(path)
        if len(tries) > 2:  # else there is something new in it
            rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(folders, "_PATIENCE", 60.0)
    monkeypatch.setattr(folders.shutil, "rmtree", remove)
    folders.remove(str(folder))
    assert len(tries) == 3
    assert not folder.exists()
