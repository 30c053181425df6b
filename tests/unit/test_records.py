"""What of a worker's records is sent to process 1, and when."""

import logging

import pytest

import hpcdist
from hpcdist._monitor import crowds
from hpcdist._monitor.crowds import Crowds
from hpcdist._monitor.records import Sieve
from hpcdist._wire.messages import Line, Records
from hpcdist.testing import Simulation


class Clock:
    """A clock that is put forward by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def line(text: str) -> Line:
    return Line("a.logger", 20, text=text)


def test_records_pass_as_they_come() -> None:
    sieve = Sieve(Clock())
    assert [sieve.take(line(text)) for text in "abc"] == [[line(text)] for text in "abc"]
    assert not sieve.holds
    assert sieve.settle() == Records([], 0)


def test_equal_ones_in_a_row_are_folded() -> None:
    sieve = Sieve(Clock())
    assert sieve.take(line("a")) == [line("a")]
    later = line("a")._replace(created=7.0, thread="another")
    assert [sieve.take(later) for _ in range(5)] == [[]] * 5
    assert sieve.holds
    assert sieve.take(line("b")) == [later._replace(text="a (5 more like it)"), line("b")]
    assert not sieve.holds


def test_what_was_folded_is_told_in_a_while() -> None:
    clock = Clock()
    sieve = Sieve(clock)
    sieve.take(line("a"))
    sieve.take(line("a"))
    assert sieve.settle() == Records([line("a (1 more like it)")], 0)
    # Slow ones are not folded.
    assert sieve.take(line("a")) == [line("a")]
    clock.now += 1.0
    assert sieve.take(line("a")) == [line("a")]


def test_so_many_in_a_second_and_the_rest_is_counted() -> None:
    clock = Clock()
    sieve = Sieve(clock, most=10)
    sent = [found for k in range(25) for found in sieve.take(line(str(k)))]
    assert sent == [line(str(k)) for k in range(10)]
    assert sieve.holds
    assert sieve.settle() == Records([], 15)
    assert not sieve.holds
    clock.now += 1.0
    assert sieve.take(line("z")) == [line("z")]


# --- of several workers ------------------------------------------------------------------------


def test_what_many_workers_say_alike_is_one_record() -> None:
    clock = Clock()
    found = Crowds(clock)
    said = [
        line("a")._replace(created=float(pid), thread=str(pid), process=pid) for pid in range(9)
    ]
    assert [found.take(pid, said[pid]) for pid in range(2, 9)] == [False] * 3 + [True] * 4
    assert not found.take(8, said[8])  # its second one: the worker folds its own
    assert not found.take(8, line("b"))
    assert found.settle() == []
    clock.now += 1.0
    assert not found.take(8, said[8])  # a new crowd begins when this one has been told of
    assert found.settle() == [(said[8]._replace(text="4 more workers: a"), (5, 6, 7, 8))]
    assert not len(found)


def test_crowds_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowds, "_CROWDS_MOST", 3)
    found = Crowds(Clock())
    assert not any(found.take(pid, line(str(k))) for k in range(5) for pid in range(2, 5))
    assert len(found) == 3
    assert [found.take(9, line(str(k))) for k in range(5)] == [True] * 3 + [False] * 2
    assert len(found.settle(everything=True)) == 3


def same() -> None:
    logging.getLogger("kept.crowd").warning("all alike")


def test_workers_that_say_the_same() -> None:
    kept: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = kept.append  # type: ignore[method-assign, assignment]
    logging.getLogger("kept.crowd").addHandler(handler)

    def driver() -> None:
        stop = hpcdist.log_to("kept.crowd")
        for pid in hpcdist.workers():
            hpcdist.remotecall_fetch(same, pid)
        hpcdist.sleep(3)
        stop()

    try:
        with Simulation(nodes=7, seed=4) as sim:
            sim.node(1).run(driver)
    finally:
        logging.getLogger("kept.crowd").removeHandler(handler)
    # In a simulation the workers' own records come by here, too.
    kept = [record for record in kept if hasattr(record, "pids")]
    texts = [record.getMessage() for record in kept]
    assert texts == ["all alike"] * 3 + ["3 more workers: all alike"]
    assert [record.__dict__["pids"] for record in kept] == [(2,), (3,), (4,), (5, 6, 7)]
