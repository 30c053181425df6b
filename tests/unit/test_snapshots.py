"""What process 1 gathers while somebody looks, in a simulated cluster."""

from collections.abc import Iterator
from typing import Any

import pytest

import hpcdist
from hpcdist._cluster.snapshots import Snapshots
from hpcdist.testing import Simulation


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation(nodes=4, seed=7) as made:
        yield made


def gathered(sim: Simulation) -> dict[int, dict[str, Any]]:
    """Gather twice, a second apart; return what is known then."""
    snapshots = sim.node(1).node.service(Snapshots)
    done: list[int] = []

    def gather() -> None:
        node = snapshots.node
        node.progress.call_later(0, lambda: snapshots.gather(lambda: done.append(1)))

    for wanted in (1, 2):
        sim.node(1).run(gather)
        sim.advance(1)
        assert len(done) == wanted
    facts = snapshots.facts()
    return {row["pid"]: row for row in [facts["driver"], *facts["workers"]]}


def work(seconds: float) -> None:
    hpcdist.sleep(seconds)


def pass_on() -> None:
    """Wait for another worker, within a call."""
    hpcdist.remotecall_fetch(work, 3, 1000)


def test_idle_workers(sim: Simulation) -> None:
    rows = gathered(sim)
    assert sorted(rows) == [1, 2, 3, 4]
    for row in rows.values():
        assert (row["state"], row["call"], row["running"], row["queued"]) == ("idle", None, 0, 0)


def test_calls_and_for_how_long_they_run(sim: Simulation) -> None:
    sim.node(1).run(hpcdist.remotecall, pass_on, 2)
    sim.advance(10)
    rows = gathered(sim)
    assert (rows[2]["state"], rows[2]["call"]) == ("waiting", "pass_on")
    assert (rows[3]["state"], rows[3]["call"]) == ("waiting", "work")
    assert 10 < rows[2]["age"] < 14


def test_bytes_are_counted_where_they_are_sent(sim: Simulation) -> None:
    before = gathered(sim)
    sim.node(2).run(hpcdist.remotecall_fetch, len, 3, bytes(100_000))
    after = gathered(sim)
    assert 100_000 < after[2]["bytes_out"] - before[2]["bytes_out"] < 110_000
    assert 100_000 < after[3]["bytes_in"] - before[3]["bytes_in"] < 110_000
    assert after[4]["bytes_in"] - before[4]["bytes_in"] < 10_000


def test_one_that_does_not_answer_is_shown_as_such(sim: Simulation) -> None:
    gathered(sim)
    sim.stop(3)
    gathered(sim)
    sim.advance(5)
    rows = gathered(sim)
    assert rows[3]["state"] == "unresponsive"
    assert rows[2]["state"] == "idle"
    sim.go_on(3)
    sim.advance(1)
    assert gathered(sim)[3]["state"] == "idle"


def test_the_dead_are_left_out(sim: Simulation) -> None:
    gathered(sim)
    sim.kill(3)
    sim.advance(1)
    assert sorted(gathered(sim)) == [1, 2, 4]
    assert not sim.node(1).node.service(Snapshots)._awaited
