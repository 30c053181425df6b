"""`distributed`: a loop's body on all workers, with and without an operator."""

import operator
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    CompositeException,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    distributed,
    everywhere,
    myid,
    procs,
    remotecall,
    remotecall_fetch,
    workers,
)
from hpcdist._items.timings import Timings
from tests.helpers import eventually, kill9


def pair(left: list[Any], right: list[Any]) -> list[Any]:
    """Show how parts were combined: an operator that is associative in nothing but order."""
    return [*left, *right]


def merge(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    for key, n in right.items():
        left[key] = left.get(key, 0) + n
    return left


def sum_of_squares(n: int) -> int:
    return distributed(range(n), operator.add)(lambda i: i * i)


# --- parts and their order -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "sizes"), [(11, [4, 4, 3]), (3, [1, 1, 1]), (2, [1, 1]), (1, [1]), (9, [3, 3, 3])]
)
def test_parts_are_contiguous_in_worker_order(n: int, sizes: list[int], pids: list[int]) -> None:
    found = distributed(range(n), pair)(lambda i: [(myid(), i)])
    assert [i for _, i in found] == list(range(n))
    owners = [pid for pid, _ in found]
    assert owners == [pid for pid, size in zip(pids, sizes, strict=False) for _ in range(size)]


def test_each_part_is_folded_from_the_left(pids: list[int]) -> None:
    # Parts 1 2 3, 4 5 6, 7 8 9: (1-2-3) - (4-5-6) - (7-8-9), or with another bracket
    first, second, third = 1 - 2 - 3, 4 - 5 - 6, 7 - 8 - 9
    assert distributed(range(1, 10), operator.sub)(lambda i: i) in (
        first - second - third,
        first - (second - third),
    )


def test_order_is_kept_by_an_operator_that_does_not_commute(pids: list[int]) -> None:
    assert distributed("abcdefghijk", operator.add)(lambda c: c) == "abcdefghijk"


def test_as_a_decorator(pids: list[int]) -> None:
    @distributed(range(1000), operator.add)
    def total(i: int) -> int:
        return 2 * i

    assert total == 999_000


def test_some_workers_in_an_order_of_ones_own(pids: list[int]) -> None:
    chosen = [pids[2], pids[0]]
    assert distributed(range(4), pair, pids=chosen)(lambda i: [myid()]) == [
        pids[2],
        pids[2],
        pids[0],
        pids[0],
    ]
    assert distributed(range(3), pair, pids=pids[1])(lambda i: [myid()]) == [pids[1]] * 3
    assert distributed(range(2), pair, pids=[1])(lambda i: [myid()]) == [1, 1]
    assert distributed(range(4), pair, pids=procs())(lambda i: [myid()]) == procs()


def test_called_from_a_worker(pids: list[int]) -> None:
    assert remotecall_fetch(sum_of_squares, pids[1], 100) == sum(i * i for i in range(100))


def test_inside_itself(pids: list[int]) -> None:
    assert distributed(range(1, 4), operator.add)(sum_of_squares) == 0 + 1 + 5


# --- what can be looped over ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "sequence",
    [
        range(10, 0, -3),
        [3, 1, 4, 1, 5],
        (2, 7, 1, 8),
        np.arange(100),
        deque([1, 2, 3, 4]),
        {1: "a", 2: "b", 3: "c", 4: "d"}.keys(),
        {"a": 1, "b": 2}.values(),
        b"bytes",
    ],
    ids=lambda s: type(s).__name__,
)
def test_any_sequence(sequence: Any, pids: list[int]) -> None:
    assert distributed(sequence, operator.add)(lambda x: int(x)) == sum(map(int, sequence))


def test_items_of_a_dictionary(pids: list[int]) -> None:
    ages = {"ann": 3, "bob": 5, "cid": 7, "dan": 9}
    assert distributed(ages.items(), operator.add)(lambda item: item[1]) == 24


@pytest.mark.parametrize(
    "thing", [{1, 2}, frozenset({1}), {"a": 1}, iter([1]), zip([1], [2], strict=True), 5, None]
)
def test_what_has_no_order_is_refused(thing: Any, pids: list[int]) -> None:
    with pytest.raises(TypeError):
        distributed(thing, operator.add)


def test_refuses_what_is_no_function() -> None:
    with pytest.raises(TypeError):
        distributed(range(3), "add")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        distributed(range(3), operator.add)(3)  # type: ignore[arg-type]


# --- init, empty loops, chunks -------------------------------------------------------------------


def test_init_counts_once_at_the_left(pids: list[int]) -> None:
    assert distributed(range(10), operator.add, init=100)(lambda i: i) == 145
    assert distributed("bcd", operator.add, init="a")(lambda c: c) == "abcd"


def test_an_empty_loop(pids: list[int]) -> None:
    assert distributed([], operator.add, init=7)(lambda i: i) == 7
    assert distributed(range(0), operator.add, init=None)(lambda i: i) is None
    with pytest.raises(ValueError, match="init"):
        distributed([], operator.add)(lambda i: i)
    handle = distributed([])(lambda i: i)
    assert handle.wait() is None
    assert handle.done()


def test_chunks_are_slices(pids: list[int]) -> None:
    assert distributed(range(7), pair, chunked=True)(lambda part: [part]) == [
        range(3),
        range(3, 5),
        range(5, 7),
    ]
    values = np.arange(1_000_000, dtype=float)
    total = distributed(values, operator.add, chunked=True)(lambda part: float(np.sum(part)))
    assert total == values.sum()


def test_workers_without_items_are_not_called(pids: list[int]) -> None:
    everywhere("hd_called = 0")
    assert distributed(range(2), operator.add, chunked=True)(mark_called) == 2
    assert [everywhere("hd_called", pids=pid) for pid in pids] == [1, 1, 0]
    everywhere("del hd_called")


def mark_called(part: range) -> int:
    import __main__

    __main__.hd_called += 1
    return len(part)


def test_arrays_are_added(pids: list[int]) -> None:
    result = distributed(range(6), operator.add)(lambda i: np.full(100_000, float(i)))
    assert result.shape == (100_000,)
    assert set(result) == {15.0}


def test_dictionaries_are_merged_on_the_workers(pids: list[int]) -> None:
    words = ["a b a", "c", "b b", "a c"]
    counted = distributed(words, merge)(
        lambda line: {w: line.split().count(w) for w in line.split()}
    )
    assert counted == {"a": 3, "b": 3, "c": 2}


def test_the_same_pairs_in_every_run(pids: list[int]) -> None:
    """A body whose parts were small: from the second run on they are combined here."""
    floats = lambda i: 0.1 * i
    sums = {distributed(range(1000), operator.add)(floats) for _ in range(3)}
    assert len(sums) == 1
    assert Timings.here().are_light(floats)
    made = lambda i: Pair(str(i))
    first = distributed(range(5), operator.add, pids=[*pids, *pids[:2]])(made).text
    assert first == "((0+1)+((2+3)+4))" or first == "(((0+1)+(2+3))+4)"
    for _ in range(2):
        again = distributed(range(5), operator.add, pids=[*pids, *pids[:2]])(made)
        assert again.text == first


class Pair:
    """Shows in which pairs it was added."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other: "Pair") -> "Pair":
        return Pair(f"({self.text}+{other.text})")


def test_large_parts_meet_up_the_tree(pids: list[int]) -> None:
    array = lambda i: np.full(1000, i)
    for _ in range(2):
        assert distributed(range(3), operator.add)(array)[0] == 3
        assert not Timings.here().are_light(array)


def test_small_arrays_are_compared_item_by_item_in_every_run(pids: list[int]) -> None:
    body = lambda i: np.array([i, -i, 1])
    for op, expected in ((max, [2, 0, 1]), (min, [0, -2, 1]), (np.add, [3, -3, 3])):
        for _ in range(3):
            assert distributed(range(3), op)(body).tolist() == expected


@pytest.mark.parametrize("own_runs", [1, 2])
def test_ones_own_arrays_are_not_written_to(own_runs: int, pids: list[int]) -> None:
    """Where the caller takes part, its part is its own array."""
    array = np.ones(30_000)
    part = lambda p: p
    listed = [pids[0], *([1] * own_runs)]
    small = [np.ones(2)] * len(listed)
    assert distributed(small, operator.add, pids=listed)(part).tolist() == [len(listed)] * 2
    for _ in range(2):
        found = distributed(array, operator.add, pids=listed[-2:], chunked=True)(part)
        assert found.tolist() == [2.0] * 15_000
        assert (array == 1).all()


def test_an_operator_of_ones_own_runs_on_the_workers_in_every_run(pids: list[int]) -> None:
    where = lambda left, right: {*left, myid()}
    body: Callable[[int], set[int]] = lambda i: set()
    for _ in range(3):
        assert distributed(range(3), where)(body) <= set(pids)
        distributed(range(3), operator.or_)(body)


def test_parts_that_cannot_be_combined_here(pids: list[int]) -> None:
    body = lambda i: i if i else "none"
    with pytest.raises(RemoteException) as caught:
        distributed(range(3), operator.add)(body)
    assert distributed([1, 2, 3], operator.add)(body) == 6
    assert Timings.here().are_light(body)
    with pytest.raises(TypeError) as again:
        distributed(range(3), operator.add)(body)
    assert isinstance(again.value, RemoteException)
    assert type(again.value.__cause__) is type(caught.value.__cause__)


# --- failures ------------------------------------------------------------------------------------


def test_one_failure_is_a_remote_exception(pids: list[int]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        distributed(range(9), operator.add)(lambda i: 1 / (i - 4))
    assert isinstance(caught.value, RemoteException)
    assert caught.value.pid == pids[1]


def test_several_failures_come_together_in_order(pids: list[int]) -> None:
    with pytest.raises(CompositeException) as caught:
        distributed(range(9), operator.add)(lambda i: {}[i])
    assert [error.pid for error in caught.value.exceptions] == pids
    assert all(isinstance(error, KeyError) for error in caught.value.exceptions)


def test_an_operator_that_fails(pids: list[int]) -> None:
    with pytest.raises(TypeError) as caught:
        distributed(range(3), operator.add)(lambda i: i if myid() == pids[0] else str(i))
    assert isinstance(caught.value, RemoteException)


def test_a_function_the_workers_do_not_have(pids: list[int]) -> None:
    class Odd:
        def __reduce__(self) -> Any:
            return exec, ("raise LookupError('not here')",)

    odd = Odd()
    with pytest.raises(CompositeException) as caught:
        distributed(range(3), operator.add)(lambda i: odd)
    assert all(isinstance(error, LookupError) for error in caught.value.exceptions)


def test_other_parts_run_on(pids: list[int]) -> None:
    with RemoteChannel(10) as done:
        with pytest.raises(ZeroDivisionError):
            distributed(range(3), operator.add)(
                lambda i: 1 / 0 if i == 0 else (time.sleep(0.1), done.put(i), i)[2]
            )
        assert sorted([done.take(timeout=10), done.take(timeout=10)]) == [1, 2]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_worker_that_dies(victim: int, fresh: Callable[..., list[int]]) -> None:
    pids = fresh(3)
    with pytest.raises(ProcessExitedException) as caught:
        distributed(range(6), operator.add, pids=pids)(
            lambda i: os.kill(os.getpid(), 9) if myid() == pids[victim] else i
        )
    assert caught.value.pid == pids[victim]
    left = [pid for pid in pids if pid != pids[victim]]
    assert distributed(range(6), operator.add, pids=left)(lambda i: i) == 15


def test_a_worker_that_is_dead_already(fresh: Callable[..., list[int]]) -> None:
    pids = fresh(1)
    kill9(remotecall_fetch(os.getpid, pids[0]))
    eventually(lambda: pids[0] not in workers())
    with pytest.raises(ProcessExitedException):
        distributed(range(6), operator.add, pids=pids)(lambda i: i)
    with pytest.raises(ValueError, match="no process with id 99999 exists"):
        distributed(range(6), operator.add, pids=[99999])(lambda i: i)


# --- without an operator -------------------------------------------------------------------------


def test_a_handle_comes_at_once(pids: list[int]) -> None:
    with RemoteChannel(100) as seen:
        start = time.monotonic()
        handle = distributed(range(6))(lambda i: (time.sleep(1.0), seen.put(i)))
        assert time.monotonic() - start < 1.5  # The body alone takes 2 s.
        with pytest.raises(TimeoutError):
            handle.wait(0.01)
        assert not handle.done()
        assert handle.wait() is None
        assert handle.done()
        assert sorted(seen.take() for _ in range(6)) == list(range(6))


def test_wait_raises_what_failed(pids: list[int]) -> None:
    with pytest.raises(ZeroDivisionError):
        distributed(range(6))(lambda i: 1 / (i - 5)).wait()
    handle = distributed(range(6))(lambda i: 1 / 0)
    for _ in range(2):
        with pytest.raises(CompositeException) as caught:
            handle.wait()
        assert [error.pid for error in caught.value.exceptions] == pids


def test_chunks_without_an_operator(pids: list[int]) -> None:
    with RemoteChannel(10) as seen:
        distributed([1, 2, 3, 4], chunked=True)(lambda part: seen.put(part)).wait()
        assert sorted(seen.take() for _ in range(3)) == [[1, 2], [3], [4]]


def test_errors_nobody_waited_for_are_printed_at_exit(script: Callable[..., Any]) -> None:
    finished = script(
        "import hpcdist\n"
        "hpcdist.addprocs(2)\n"
        "waited = hpcdist.distributed(range(2))(lambda i: [][i])\n"
        "try:\n    waited.wait()\nexcept hpcdist.CompositeException:\n    pass\n"
        "hpcdist.distributed(range(2))(lambda i: 1 / i)\n"
        "print('end')\n"
    )
    assert finished.rc == 0
    assert finished.out == "end\n"
    assert "ZeroDivisionError" in finished.err
    assert "IndexError" not in finished.err


# --- waiting -------------------------------------------------------------------------------------


def test_a_busy_worker_does_its_part_when_it_is_free(pids: list[int]) -> None:
    busy = remotecall(time.sleep, pids[0], 0.3)
    assert distributed(range(9), operator.add)(lambda i: i) == 36
    assert busy.done()


def test_many_at_once(pids: list[int]) -> None:
    handles = [distributed(range(3))(lambda i: None) for _ in range(100)]
    for handle in handles:
        handle.wait()
    assert hpcdist.nworkers() == 3
