"""What of a worker's records is sent to process 1, and when."""

from hpcdist._monitor.records import Sieve
from hpcdist._wire.messages import Line, Records


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
