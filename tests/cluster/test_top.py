"""`hpcdist top`: it looks into this process, or into a driver of its own."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist._cluster.onlookers import Onlookers
from hpcdist._cluster.snapshots import Snapshots
from hpcdist._maps.under_way import under_way
from hpcdist._transport.contracts import Slot
from tests.helpers import eventually, patient

pytestmark = pytest.mark.any_mpi

ROOT = Path(__file__).resolve().parents[2]


def top(*args: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "hpcdist", "top", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patient(50),
        check=False,
    )


def here(*args: str, **env: str) -> str:
    """Look into this process."""
    done = top(str(os.getpid()), *args, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def busy(end: str) -> None:
    while not os.path.exists(end):
        time.sleep(0.01)


def take(channel: Any) -> Any:
    return channel.take()


def names() -> list[str | None]:
    """The function that each worker is in, once its module is loaded there."""
    snapshots = Snapshots.here()
    looked = Slot()
    progress = snapshots.node.progress
    progress.call_later(0, lambda: snapshots.gather(lambda: snapshots.node.complete(looked)))
    snapshots.node.wait(looked)
    return [row["call"] for row in snapshots.facts()["workers"]]


@pytest.fixture
def end(pids: list[int], tmp_path: Path) -> Iterator[str]:
    """The file that ends `busy`; one worker is in it, with a call behind, another waits."""
    path = tmp_path / "end"
    channel: Any = hpcdist.RemoteChannel(1)
    calls = [
        hpcdist.remotecall(busy, pids[0], str(path)),
        hpcdist.remotecall(len, pids[0], "x"),
        hpcdist.remotecall(take, pids[1], channel),
    ]
    eventually(lambda: names() == ["busy", "take", None])
    yield str(path)
    path.touch()
    channel.put(None)
    for call in calls:
        call.wait()


def test_the_picture_for_programs(pids: list[int], end: str) -> None:
    seen = json.loads(here("--json"))
    assert seen["driver"]["os_pid"] == os.getpid()
    first, second, third = seen["workers"]
    assert [row["pid"] for row in seen["workers"]] == pids
    assert (first["state"], first["call"], first["queued"]) == ("busy", "busy", 1)
    assert (second["state"], second["call"], second["queued"]) == ("waiting", "take", 0)
    assert (third["state"], third["call"], third["running"]) == ("idle", None, 0)
    for row in (first, second, third):
        assert row["host"] == seen["driver"]["host"]
        assert row["rss"] > 1_000_000
        assert row["bytes_in"] > 0
        assert row["bytes_out"] > 0
        assert row["time_left"] is None
    assert first["age"] > 0
    pairs = {(pair["from"], pair["to"]): pair["bytes"] for pair in seen["pairs"]}
    assert pairs[1, pids[0]] > 0
    assert pairs[pids[0], 1] > 0


def test_the_picture_for_people(pids: list[int], end: str) -> None:
    text = here("--once")
    assert "3 workers: 1 busy, 1 idle, 1 waiting" in text
    assert re.search(rf"(?m)^ *{pids[0]}  busy +busy +[\d.]+s +1 ", text)
    assert re.search(rf"(?m)^ *{pids[1]}  waiting +take ", text)


def test_a_narrow_terminal(pids: list[int]) -> None:
    lines = here("--once", COLUMNS="20").splitlines()
    assert max(map(len, lines)) <= 20
    assert any(line.split()[:1] == [str(pids[0])] for line in lines)


def test_the_function_of_a_map_is_named(pids: list[int], tmp_path: Path) -> None:
    path = tmp_path / "end"
    with hpcdist.Executor(hpcdist.WorkerPool([pids[0]])) as pool:
        found = pool.map(busy, [str(path)])
        try:
            eventually(lambda: names()[0] == "busy")
            assert json.loads(here("--json"))["workers"][0]["call"] == "busy"
        finally:
            path.touch()
        list(found)


def held(go: str, k: int) -> int:
    if k >= 4:
        busy(go)
    return k


def test_maps_are_shown_with_what_is_left_of_them(pids: list[int], tmp_path: Path) -> None:
    go = tmp_path / "go"
    done: list[list[int]] = []
    mapping = threading.Thread(
        target=lambda: done.append(hpcdist.pmap(held, [str(go)] * 40, range(40), batch_size=1))
    )
    mapping.start()
    try:
        eventually(lambda: [m for m in under_way(Snapshots.here().node) if m.done == 4])
        (shown,) = json.loads(here("--json"))["maps"]
    finally:
        go.touch()
        mapping.join()
    assert done == [[*range(40)]]
    assert (shown["function"], shown["done"], shown["total"]) == ("held", 4, 40)
    assert shown["to_go"] == pytest.approx(36 / shown["rate"])


def test_nothing_is_gathered_while_nobody_looks(pids: list[int]) -> None:
    here("--json")
    eventually(lambda: not Onlookers.here()._under_way)
    assert not Snapshots.here()._seen


def test_what_there_is_not(pids: list[int]) -> None:
    done = top("1")
    assert done.returncode == 1
    assert "process 1 is no driver of yours" in done.stderr
    done = top("nonsense", "--once")
    assert done.returncode == 1
    assert "no driver and no job nonsense" in done.stderr
    assert str(os.getpid()) in done.stderr  # those there are
    done = top(str(os.getpid()))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--once" in done.stderr


def test_a_driver_of_another_version(monkeypatch: pytest.MonkeyPatch, pids: list[int]) -> None:
    from hpcdist._cli import onlooking

    monkeypatch.setattr(onlooking, "PROTOCOL", 99)
    with pytest.raises(onlooking.NotFound, match="another version of hpcdist"):
        onlooking.find(str(os.getpid()))


DRIVER = """
import sys, time
import hpcdist

def work():
    time.sleep(600)

pids = hpcdist.addprocs(1)
hpcdist.remotecall(work, pids[0])
print("up", flush=True)
sys.stdin.read()
"""


@contextmanager
def driver(tmp_path: Path, **env: str) -> Iterator["subprocess.Popen[str]"]:
    file = tmp_path / "driver.py"
    file.write_text(DRIVER)
    with subprocess.Popen(
        [sys.executable, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


@contextmanager
def terminal(columns: int, *args: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """`hpcdist top` on a terminal of so many columns; its process and our end of it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcdist", "top", *args],
        env={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        | {"PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def shows(fd: int, pattern: str) -> Callable[[], bool]:
    """Return what tells whether a terminal has shown a text since."""
    text = ""

    def look() -> bool:
        nonlocal text
        while select.select([fd], [], [], 0)[0]:
            try:
                data = os.read(fd, 65536)
            except OSError:  # the other end is closed
                break
            text += data.decode(errors="replace")
            if not data:
                break
        return re.search(pattern, text) is not None

    return look


def test_a_driver_that_is_a_job(tmp_path: Path) -> None:
    """By its run's folder alone, as from another host."""
    folder = tmp_path / "home" / "jobs" / "hpcdist-run"
    folder.mkdir(parents=True)
    home = {"HPCDIST_DIR": str(tmp_path / "home")}
    facts = {"folder": str(folder), "kind": "program", "jobs": [["77", None]], "n": 2, "when": 1.0}
    (folder / "manifest.json").write_text(json.dumps({**facts, "name": "hpcdist-run"}))
    with driver(tmp_path, HPCDIST_RUN=str(folder)):
        done = top("77", "--json", **home)
        assert done.returncode == 0, done.stderr
        assert [row["call"] for row in json.loads(done.stdout)["workers"]] == ["work"]
        (folder / "exit").write_text("0 0 host")
        assert "job 77 has ended" in top("77", "--once", **home).stderr


@pytest.mark.parametrize("columns", [20, 80])
def test_a_driver_that_dies_while_it_is_watched(tmp_path: Path, columns: int) -> None:
    with driver(tmp_path) as process, terminal(columns, str(process.pid)) as (shown, fd):
        eventually(shows(fd, r" 2 +(busy +)?work"))
        process.kill()
        eventually(shows(fd, "the driver has ended"))
        assert shown.wait(30) == 0


def test_keys(pids: list[int], end: str) -> None:
    with terminal(100, str(os.getpid())) as (shown, fd):
        eventually(shows(fd, "by pid"))
        os.write(fd, b"s")
        eventually(shows(fd, "by cpu"))
        os.write(fd, b"/take\n")
        eventually(shows(fd, r"-- \S+: 1 waiting"))
        os.write(fd, b" ")
        eventually(shows(fd, "HELD"))
        os.write(fd, f"k{pids[0]}\n".encode())
        eventually(shows(fd, "no such process"))  # held
        os.write(fd, b"\x1b")
        eventually(shows(fd, "k stacks"))
        os.write(fd, b" ")
        eventually(shows(fd, "space hold  by cpu  /take\x1b"))  # held no more
        os.write(fd, f"k{pids[0]}\n".encode())
        eventually(shows(fd, r"in busy\b"))
        os.write(fd, b"q")
        assert shown.wait(30) == 0


def test_workers_that_join_at_once_open_one_window(
    pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_into = Onlookers.here()
    made: list[Any] = []
    threads: list[threading.Thread] = []

    class Opening:
        """A window while which is opened another worker joins."""

        asked = -1

        def __init__(self) -> None:
            made.append(self)
            if len(made) == 1:
                threads.append(threading.Thread(target=looked_into._open, args=(pids[1],)))
                threads[0].start()
                threads[0].join(0.5)  # it is through, or waits for us

    monkeypatch.setattr("hpcdist._cluster.onlookers.Window", Opening)
    monkeypatch.setattr(looked_into, "_window", None)
    monkeypatch.setattr(looked_into.node.progress, "register", lambda *args: None)
    looked_into._open(pids[0])
    threads[0].join()
    assert len(made) == 1
