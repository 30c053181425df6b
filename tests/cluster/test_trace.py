"""`trace()` and `HPCDIST_TRACE` with real processes, and `hpcdist trace`."""

import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from tests.helpers import eventually, patient
from tests.trace_format import faults_of

pytestmark = pytest.mark.any_mpi

ROOT = Path(__file__).resolve().parents[2]
Event = dict[str, Any]


def events_of(path: Path) -> list[Event]:
    events: list[Event] = json.loads(path.read_text())
    assert faults_of(events) == []
    return events


def page_of(path: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "hpcdist", "trace", str(path), *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=patient(50),
        check=False,
    )


def double(x: Any) -> Any:
    return 2 * x


def take(channel: Any) -> Any:
    return channel.take()


def hold_up() -> None:
    """Take until the caller waits for us."""
    hpcdist.remotecall_fetch(until_main_waits, 1)


def until_main_waits() -> None:
    eventually(lambda: "progress.py:wait" in stack_of_main())


def stack_of_main() -> list[str]:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    codes = [frame.f_code for frame, _ in traceback.walk_stack(frame)]
    return [f"{Path(code.co_filename).name}:{code.co_name}" for code in codes]


async def doze() -> int:
    return 1


@pytest.fixture(scope="module")
def run(pids: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace of a bit of everything."""
    path = tmp_path_factory.mktemp("trace") / "run.json"
    with hpcdist.trace(path, arguments=True):
        channel: Any = hpcdist.RemoteChannel(1)
        waiting = hpcdist.remotecall(take, pids[0], channel)
        behind = hpcdist.remotecall(double, pids[0], 21)  # runs while the other waits
        assert behind.fetch() == 42
        channel.put(1)
        waiting.wait()
        for where in (1, pids[1], 1, pids[1], 1, pids[1], 1):  # each between two of process 1's
            hpcdist.remotecall_fetch(double, where, 1)
        hpcdist.remotecall_fetch(len, pids[2], bytes(300_000))
        assert hpcdist.remotecall_fetch(doze, pids[2]) == 1
        hpcdist.remotecall_fetch(hold_up, pids[1])
        hpcdist.pmap(double, range(50))
    return path


def test_calls_are_on_one_clock(run: Path, pids: list[int]) -> None:
    """Each call begins after the one before it was answered, wherever they run: to 100 us.

    That holds on any load, as a call's beginning is noted before it runs. Its end is noted when
    the answer has left, a wait's beginning when the call has: whoever is held up there notes it
    late, or finds the answer there and does not wait at all.
    """
    events = events_of(run)
    calls = [e for e in events if e.get("cat") == "call" and e["name"] == "double"]
    fences, mine = (
        sorted((e for e in calls if e["pid"] == pid), key=lambda e: float(e["ts"]))
        for pid in (1, pids[1])
    )
    assert [e["args"]["arguments"] for e in mine] == ["1", "1", "1"]
    assert [e["args"]["arguments"] for e in fences] == ["1", "1", "1", "1"]
    waits = [e for e in events if e["name"] == f"wait for {pids[1]}: double"]
    for before, call, after in zip(fences, mine, fences[1:], strict=False):
        assert before["ts"] - 100 < call["ts"] < after["ts"] + 100
        for wait in waits:
            if before["ts"] < wait["ts"] < after["ts"]:
                assert call["ts"] < wait["ts"] + wait["dur"] + 100


def test_what_a_call_waits_for(run: Path, pids: list[int]) -> None:
    events = events_of(run)
    (call,) = [e for e in events if e.get("cat") == "call" and e["name"] == "take"]
    waits = [e for e in events if e.get("cat") == "wait" and e["pid"] == pids[0]]
    inside = [e for e in waits if call["ts"] <= e["ts"] <= call["ts"] + call["dur"]]
    assert any(e["args"].get("for") == 1 for e in inside)


def test_an_arrow_leads_from_a_wait_to_its_call(run: Path, pids: list[int]) -> None:
    events = events_of(run)
    (call,) = [e for e in events if e.get("cat") == "call" and e["name"] == "hold_up"]
    (wait,) = [e for e in events if e["name"] == f"wait for {pids[1]}: hold_up"]
    arrows = [
        (s, f)
        for s in events
        for f in events
        if (s["ph"], f["ph"]) == ("s", "f") and s["id"] == f["id"]
    ]
    mine = [(s, f) for s, f in arrows if is_in(s, wait) and f["pid"] == pids[1]]
    assert any(is_in(f, call) for _, f in mine)


def is_in(event: Event, slice_: Event) -> bool:
    same = (event["pid"], event["tid"]) == (slice_["pid"], slice_["tid"])
    return same and bool(slice_["ts"] <= event["ts"] <= slice_["ts"] + slice_["dur"])


def test_messages_maps_and_coroutines(run: Path, pids: list[int]) -> None:
    events = events_of(run)
    sent = [e for e in events if e.get("cat") == "message" and e["pid"] == 1]
    assert sum(e["args"]["bytes"] for e in sent if e["args"]["to"] == pids[2]) > 300_000
    assert sum(e["args"]["items"] for e in events if e.get("cat") == "map") == 50
    assert [e["pid"] for e in events if e["ph"] == "b" and e["name"] == "doze"] == [pids[2]]


def test_the_page(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.html"
    done = page_of(run, "-o", str(out))
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stderr
    text = out.read_text()
    assert "double" in text
    assert "http" not in text


def test_what_is_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for content in (b"hello", b"{}", b"[1]", b"", pickle.dumps(os.system), b"\x80\x05\xff"):
        file.write_bytes(content)
        done = page_of(file)
        assert done.returncode == 1, content
        assert "no trace" in done.stderr
        assert "Traceback" not in done.stderr
    assert page_of(tmp_path / "none.json").returncode == 1
    assert not (tmp_path / "x.html").exists()


def test_a_call_that_goes_on_at_the_end(pids: list[int], tmp_path: Path) -> None:
    """Also one that has been answered, but not noted yet."""
    channel: Any = hpcdist.RemoteChannel(1)
    for file in ("one.json", "two.json"):
        with hpcdist.trace(tmp_path / file):
            goes_on = hpcdist.remotecall(take, pids[0], channel)
            assert hpcdist.remotecall_fetch(double, pids[0], 1) == 2  # it has begun, and waits
        channel.put(1)
        goes_on.wait()
        calls = [e for e in events_of(tmp_path / file) if e.get("cat") == "call"]
        assert [e["pid"] for e in calls if e["name"] == "take"] == [pids[0]]


WHOLE = """
import hpcdist

def work():
    return 1

pids = hpcdist.addprocs(2)
hpcdist.remotecall_fetch(work, pids[0])
hpcdist.shutdown()
"""


def test_a_whole_program(script: Callable[..., Any], tmp_path: Path) -> None:
    """Workers that leave hand out what they have, however short the program was."""
    path = tmp_path / "whole.json"
    done = script(WHOLE, env={"HPCDIST_TRACE": str(path)})
    assert (done.rc, done.err) == (0, "")
    events = events_of(path)
    assert [e["pid"] for e in events if e.get("cat") == "call" and e["name"] == "work"] == [2]


def test_a_file_that_cannot_be_made_stops_no_program(script: Callable[..., Any]) -> None:
    done = script(WHOLE, env={"HPCDIST_TRACE": "/proc/none/x.json"})
    assert done.rc == 0
    assert done.err.count("no trace") == 1


KILLED = """
import sys
import hpcdist

def toil(how):
    return how

pids = hpcdist.addprocs(1)
with hpcdist.trace(sys.argv[1], arguments=True):
    hpcdist.remotecall_fetch(toil, pids[0], "hard")
    print("up", flush=True)
    sys.stdin.read()
"""


def test_a_driver_that_was_killed(tmp_path: Path) -> None:
    file, path = tmp_path / "driver.py", tmp_path / "run.json"
    file.write_text(KILLED)
    part = tmp_path / "run.json.part"
    with subprocess.Popen(
        [sys.executable, str(file), str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        eventually(lambda: b"'hard'" in part.read_bytes())  # so says who ran it, not who called
        process.kill()
    assert page_of(part, "-o", str(tmp_path / "run.html")).returncode == 0
    assert "<td>toil</td>" in (tmp_path / "run.html").read_text()
