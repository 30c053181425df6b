"""Traces: what is noted, on which clock, and what is done where there is no room for it."""

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist._cli.trace_page import page
from hpcdist._cli.trace_summary import summarize
from hpcdist._cluster.tracing import Clock, estimate
from hpcdist._events import chrome, records
from hpcdist._events.chrome import Ended, Frame, Person, convert
from hpcdist._events.records import CALL, SENT, WAIT, Recorder
from hpcdist._runtime.node import Node
from hpcdist._worker.services import EVERY_PROCESS
from hpcdist.testing import Simulation
from tests.trace_format import faults_of

MS = 1_000_000


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation(nodes=3, seed=3) as made:
        yield made


def pause(seconds: float) -> None:
    hpcdist.sleep(seconds)


def traced(path: str) -> None:
    with hpcdist.trace(path):
        for pid in (2, 3, 2):
            hpcdist.remotecall_fetch(pause, pid, 1.0)
        hpcdist.pmap(abs, range(100))
        hpcdist.everywhere("pass")


def slices(events: list[dict[str, Any]], name: str) -> list[tuple[int, float, float]]:
    found = [e for e in events if e["ph"] == "X" and e["name"] == name]
    return sorted((e["ts"], e["pid"], e["dur"]) for e in found)


def test_all_that_happens_is_in_the_file(sim: Simulation, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    sim.node(1).run(traced, str(path))
    events = json.loads(path.read_text())
    assert faults_of(events) == []
    assert {e["pid"] for e in events} == {1, 2, 3}
    assert {e["cat"] for e in events if "cat" in e} >= {"call", "wait", "message", "tree", "map"}
    items = sum(e["args"]["items"] for e in events if e.get("cat") == "map")
    assert items == 100
    assert sum(e["ph"] == "s" for e in events) >= 3  # those of the three waits
    assert not (tmp_path / "run.json.part").exists()


@pytest.mark.parametrize("jump", [3600.0, -0.5])
def test_clocks_are_aligned(sim: Simulation, tmp_path: Path, jump: float) -> None:
    sim.jump(3, jump)
    path = tmp_path / "run.json"
    sim.node(1).run(traced, str(path))
    events = json.loads(path.read_text())
    calls = slices(events, "pause")
    waits = slices(events, "wait for 2: pause") + slices(events, "wait for 3: pause")
    assert [pid for _, pid, _ in calls] == [2, 3, 2]
    for (began, pid, took), (asked, _, waited) in zip(calls, sorted(waits), strict=True):
        assert asked < began, pid
        assert began + took < asked + waited, pid


def test_the_smallest_doubt_counts_and_ages() -> None:
    far = estimate(0, 2000, 51_000, same_host=False)
    assert far == Clock(50_000, 1000, 2000)
    assert far.doubt_at(2000) == 1000
    assert far.doubt_at(2000 + 10**9) == 1000 + 20_000
    # One host has one clock; where the answers contradict that, they are believed.
    assert estimate(0, 2000, 1900, same_host=True) == Clock(0, 0, 2000)
    assert estimate(0, 2000, 51_000, same_host=True) == far


def test_a_trace_ends_with_its_block(sim: Simulation, tmp_path: Path) -> None:
    sim.node(1).run(traced, str(tmp_path / "run.json"))
    sim.advance(1)
    for pid in (1, 2, 3):
        node = sim.node(pid).node
        assert "submit" not in vars(node.turns)
        assert "wait" not in vars(node)
        assert all("flush" not in vars(peer) for peer in node.peers.values())
        assert not node.service(Recorder).records
    sim.node(1).run(traced, str(tmp_path / "again.json"))
    assert faults_of(json.loads((tmp_path / "again.json").read_text())) == []


def traced_with_a_death(path: str) -> None:
    with hpcdist.trace(path):
        hpcdist.remotecall(pause, 3, 1000.0)
        hpcdist.sleep(10)


def test_a_death_is_in_the_file(sim: Simulation, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    task = sim.node(1).start(traced_with_a_death, str(path))
    sim.advance(5)
    sim.kill(3)
    task.result()
    events = json.loads(path.read_text())
    assert faults_of(events) == []
    (lost,) = [e for e in events if e["name"] == "lost"]
    assert lost["pid"] == 3
    assert summarize(events).lost


def traced_beside_one_that_stops(path: str) -> None:
    with hpcdist.trace(path):
        hpcdist.remotecall_fetch(pause, 3, 1.0)
        hpcdist.remotecall_fetch(pause, 2, 30.0)


def test_one_that_does_not_answer_holds_nothing_up(
    sim: Simulation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = sim.node(1).start(traced_beside_one_that_stops, str(tmp_path / "run.json"))
    sim.advance(5)
    sim.stop(3)
    sim.advance(20)
    sim.go_on(3)  # late answers count
    sim.advance(2)
    sim.stop(3)
    task.result()
    assert sim.now < 40
    assert "workers [3] do not answer" in capsys.readouterr().err
    events = json.loads((tmp_path / "run.json").read_text())
    assert faults_of(events) == []
    assert [pid for _, pid, _ in slices(events, "pause")] == [3, 2]
    sim.go_on(3)
    sim.advance(5)
    assert "submit" not in vars(sim.node(3).node.turns)  # it was told, and is at rest


def test_one_trace_at_a_time(sim: Simulation, tmp_path: Path) -> None:
    def both() -> None:
        with hpcdist.trace(tmp_path / "a.json"), hpcdist.trace(tmp_path / "b.json"):
            pass

    with pytest.raises(RuntimeError, match="goes on already"):
        sim.node(1).run(both)
    assert faults_of(json.loads((tmp_path / "a.json").read_text())) == []

    def elsewhere() -> None:
        with hpcdist.trace(tmp_path / "c.json"):
            pass

    with pytest.raises(RuntimeError, match="Only process 1"):
        sim.node(2).run(elsewhere)


def test_a_file_that_cannot_be_made(sim: Simulation, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        sim.node(1).run(traced, str(tmp_path / "none" / "run.json"))


def test_a_full_disk_is_said_once(
    sim: Simulation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json.part").symlink_to("/dev/full")
    sim.node(1).run(traced, str(tmp_path / "run.json"))
    said = capsys.readouterr().err
    assert said.count("No space left") == 1
    assert "run.json ends here" in said


def test_what_does_not_fit_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_ROOM", 10)
    node = Node()
    node.serve(EVERY_PROCESS)
    recorder = node.service(Recorder)
    for k in range(25):
        recorder.note((SENT, k, 2, 100))
    left_out, blob = recorder.take()
    assert (left_out, len(pickle.loads(blob))) == (15, 10)
    assert recorder.take()[0] == 0


# --- the file and its page ---------------------------------------------------------------------


def made(*frames: Any) -> list[dict[str, Any]]:
    spool = io.BytesIO(b"".join(pickle.dumps(frame) for frame in (0, *frames)))
    events: list[dict[str, Any]] = json.loads("".join(convert(spool)))
    assert faults_of(events) == []
    return events


def example() -> list[dict[str, Any]]:
    two = [
        (CALL, 77, 1 * MS, 5 * MS, 45 * MS, "long <b>", None, 1, 8),
        (WAIT, 77, 10 * MS, 20 * MS, 3, "short", 2, 5),
        (CALL, 77, 46 * MS, 46 * MS, 50 * MS, "short", "1, 2", 1, 9),
        (SENT, 50 * MS, 1, 5000),
    ]
    return made(
        Person(1, "process 1"),
        Person(2, "worker 2"),
        Frame(2, 5 * MS, 7, pickle.dumps([(r[0], *_shifted(r[1:])) for r in two])),
        Ended(2, 100 * MS, "killed by signal 9"),
    )


def _shifted(leaves: tuple[Any, ...]) -> tuple[Any, ...]:
    """The clock of worker 2 is 5 ms ahead."""
    return tuple(leaf + 5 * MS if isinstance(leaf, int) and leaf >= MS else leaf for leaf in leaves)


def test_the_events_of_records() -> None:
    events = example()
    long, short = (e for e in events if e["ph"] == "X" and e["cat"] == "call")
    assert (long["ts"], long["dur"], long["args"]["queued_us"]) == (5000.0, 40_000.0, 4000.0)
    assert short["args"]["arguments"] == "1, 2"
    assert [e["ts"] for e in events if e.get("cat") == "queued"] == [1000.0, 5000.0]
    assert any("7 records left out" in e["name"] for e in events)


def arrows(*records: tuple[Any, ...]) -> list[tuple[str, int, float]]:
    frames = [Frame(pid, 0, 0, pickle.dumps([record])) for pid, record in enumerate(records, 1)]
    return [(e["ph"], e["pid"], e["ts"]) for e in made(*frames) if e["ph"] in ("s", "f")]


def test_an_arrow_leads_from_a_wait_to_its_call() -> None:
    wait = (WAIT, 7, 2 * MS, 9 * MS, 2, "f", 1, 30)
    call = (CALL, 7, 1 * MS, 3 * MS, 8 * MS, "f", None, 1, 30)
    assert arrows(wait, call) == [("s", 1, 2000.0), ("f", 2, 3000.0)]
    assert arrows(call, wait) == [("s", 2, 2000.0), ("f", 1, 3000.0)]  # whichever is known first
    # The caller was held up, and waits only since the call runs: no arrow points back in time.
    assert arrows((*wait[:2], 5 * MS, *wait[3:]), call) == [("s", 1, 5000.0), ("f", 2, 5000.0)]
    assert arrows((*wait[:2], 8 * MS, *wait[3:]), call) == []
    assert arrows((*wait[:-1], 31), call) == []
    assert arrows((*wait[:-2], 0, 0), (*call[:-1], 0)) == []


def test_ends_of_arrows_that_stay_alone_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chrome, "_ENDS_MOST", 3)
    ends = chrome._Arrows()
    for ident in range(10):
        assert not list(ends.call((1, ident), chrome._Place(2, 1, 1.0, 5.0)))
    assert [key[1] for key in ends._calls] == [7, 8, 9]
    assert len(list(ends.wait((1, 9), chrome._Place(1, 1, 0.0, 6.0)))) == 2


def test_what_a_trace_tells() -> None:
    summary = summarize(example())
    (_, use) = summary.uses
    assert (use.pid, use.calls, use.busy, use.waiting) == (2, 2, 34_000.0, 10_000.0)
    assert use.share == pytest.approx(0.34)
    assert [each.name for each in summary.longest] == ["long <b>", "short"]
    assert [(w.pid, w.name, w.total) for w in summary.waits] == [(2, "wait for 3: short", 10_000.0)]
    assert [(q.name, q.total) for q in summary.queued] == [("long <b>", 4000.0)]
    assert summary.pairs == [(2, 1, 1, 5000)]
    assert (summary.left_out, summary.lost) == (7, [(2, 100_000.0, "killed by signal 9")])


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = page(summarize(example()), "run <1>.json")
    assert "<title>run &lt;1&gt;.json</title>" in text
    assert "long &lt;b&gt;" in text
    assert "long <b>" not in text  # neither in the tables nor in the data
    for word in ("http:", "https:", "src=", "@import", "url("):
        assert word not in text
    for title in ("Timeline", "How busy", "longest", "waited for", "sent where"):
        assert title in text


def test_a_page_of_nothing() -> None:
    assert "Nothing." in page(summarize([]), "empty")


def test_no_trace_at_all() -> None:
    with pytest.raises(ValueError, match="no trace"):
        list(convert(io.BytesIO(b"")))


def test_the_part_of_a_trace_that_was_broken_off() -> None:
    whole = b"".join(pickle.dumps(f) for f in (0, Person(1, "process 1"), Person(2, "worker 2")))
    events = json.loads("".join(convert(io.BytesIO(whole[:-3]))))
    assert {event["pid"] for event in events} == {1}
