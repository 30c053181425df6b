"""`everywhere`: source, functions, classes and calls on all processes at once."""

import os
from collections.abc import Callable, Iterator
from textwrap import dedent
from typing import Any

import pytest

import __main__
import hpcdist
from hpcdist import (
    CompositeException,
    RemoteException,
    everywhere,
    myid,
    procs,
    remotecall_fetch,
    workers,
)

NAMES = ("hd_x", "hd_list", "hd_tool", "hd_Point", "hd_later", "hd_here")


@pytest.fixture(autouse=True)
def _clean_mains(pids: list[int]) -> Iterator[None]:
    """Take what a test has defined out of every `__main__`, this one's included."""
    yield
    everywhere(f"for hd_name in {NAMES!r}: globals().pop(hd_name, None)\ndel hd_name")


def divide(left: float, right: float = 1) -> tuple[int, float]:
    return myid(), left / right


def divide_by_rank(first: int, total: int) -> float:
    return total / (myid() - first)


def seen(name: str) -> Any:
    return getattr(__main__, name, None)


def seen_by_all(name: str) -> dict[int, Any]:
    return {pid: remotecall_fetch(seen, pid, name) for pid in procs()}


# --- source --------------------------------------------------------------------------------------


def test_source_runs_on_every_process(pids: list[int]) -> None:
    assert everywhere("import os as hd_here; hd_x = hd_here.getpid()") is None
    assert seen_by_all("hd_x") == {pid: remotecall_fetch(os.getpid, pid) for pid in procs()}
    assert __main__.hd_x == os.getpid()


def test_source_of_several_lines_keeps_its_globals(pids: list[int]) -> None:
    text = """
        def hd_tool(n):
            return n + hd_x

        hd_x = 1
    """
    everywhere(dedent(text))
    everywhere("hd_x += 1")
    everywhere("hd_x = hd_tool(hd_x)")
    assert set(seen_by_all("hd_x").values()) == {4}


def test_a_single_pid_gives_its_value(pids: list[int]) -> None:
    assert everywhere("hd_x = 3\nhd_x + 1", pids=pids[0]) == 4
    assert everywhere("hd_x = 5", pids=1) is None
    assert everywhere("hd_x + 1", pids=1) == 6
    assert seen_by_all("hd_x") == {1: 5, pids[0]: 3, pids[1]: None, pids[2]: None}


def test_a_list_gives_none(pids: list[int]) -> None:
    assert everywhere("1 + 1", pids=[pids[0]]) is None
    assert everywhere("1 + 1", pids=[]) is None


def test_a_pid_named_twice_runs_twice(pids: list[int]) -> None:
    everywhere("hd_list = []")
    everywhere("hd_list.append(len(hd_list))", pids=[pids[0], 1, pids[0]])
    assert seen_by_all("hd_list") == {1: [0], pids[0]: [0, 1], pids[1]: [], pids[2]: []}


def test_it_waits_for_all(pids: list[int]) -> None:
    everywhere("__import__('time').sleep(0.2); hd_x = 1")
    assert set(seen_by_all("hd_x").values()) == {1}


def test_called_from_a_worker(pids: list[int]) -> None:
    remotecall_fetch(everywhere, pids[0], "hd_x = 7")
    assert set(seen_by_all("hd_x").values()) == {7}


def test_source_that_does_not_compile_reaches_nobody(pids: list[int]) -> None:
    with pytest.raises(SyntaxError) as caught:
        everywhere("hd_x = 1\n1 +")
    assert not isinstance(caught.value, RemoteException)
    assert set(seen_by_all("hd_x").values()) == {None}


def test_unknown_pid(pids: list[int]) -> None:
    with pytest.raises(ValueError, match="no process with id 99999 exists"):
        everywhere("hd_x = 1", pids=[99999])


# --- errors --------------------------------------------------------------------------------------


def test_all_errors_come_together(pids: list[int]) -> None:
    with pytest.raises(CompositeException) as caught:
        everywhere("hd_x = 1; 1 / 0")
    errors = caught.value.exceptions
    assert isinstance(caught.value, ExceptionGroup)
    assert [error.pid for error in errors] == [1, *pids]
    assert all(isinstance(error, RemoteException) for error in errors)
    assert all(isinstance(error, ZeroDivisionError) for error in errors)
    assert f"and {len(pids)} more" in str(caught.value)
    assert set(seen_by_all("hd_x").values()) == {1}


def test_one_failure_stops_nobody(pids: list[int]) -> None:
    with pytest.raises(CompositeException) as caught:
        everywhere(f"import hpcdist as hd_here; hd_x = 1 / (hd_here.myid() - {pids[1]})")
    assert [error.pid for error in caught.value.exceptions] == [pids[1]]
    assert [pid for pid, value in seen_by_all("hd_x").items() if value is None] == [pids[1]]


def test_errors_can_be_caught_by_class(pids: list[int]) -> None:
    caught = []
    try:
        everywhere("raise KeyError('k') if 'hd_x' in globals() else ValueError('v')")
    except* ValueError as group:
        caught = [error.pid for error in group.exceptions]
    assert caught == [1, *pids]


@pytest.mark.parametrize("where", [0, 1], ids=["here", "there"])
def test_a_single_pid_raises_its_error_bare(where: int, pids: list[int]) -> None:
    pid = [1, pids[0]][where]
    with pytest.raises(ZeroDivisionError) as caught:
        everywhere("1 / 0", pids=pid)
    assert isinstance(caught.value, RemoteException)
    assert caught.value.pid == pid


# --- functions and classes -----------------------------------------------------------------------


def test_a_function_is_defined_everywhere(pids: list[int]) -> None:
    @everywhere
    def hd_tool(n: int) -> int:
        return n + 1

    assert hd_tool(1) == 2
    everywhere("hd_x = hd_tool(2)")
    assert set(seen_by_all("hd_x").values()) == {3}


def test_a_class_is_defined_everywhere(pids: list[int]) -> None:
    @everywhere
    class hd_Point:
        def __init__(self, x: int) -> None:
            self.x = x

    assert hd_Point(1).x == 1
    everywhere("hd_x = hd_Point(2).x")
    assert set(seen_by_all("hd_x").values()) == {2}
    assert everywhere("hd_Point(3)", pids=pids[0]).x == 3


def test_a_function_is_defined_on_some(pids: list[int]) -> None:
    @everywhere(pids=pids[1:])
    def hd_tool() -> None:
        pass

    assert callable(hd_tool)
    assert [pid for pid, value in seen_by_all("hd_tool").items() if value] == pids[1:]


# --- later workers -------------------------------------------------------------------------------


def test_later_workers_get_only_what_was_meant_for_them(
    pids: list[int], fresh: Callable[..., list[int]]
) -> None:
    everywhere("hd_x = 1")
    everywhere("hd_later = 1", later=True)
    everywhere("hd_later += 1", later=True)

    @everywhere(later=True)
    def hd_tool(n: int) -> int:
        return n + 1

    assert hd_tool(1) == 2
    (pid,) = fresh(1)
    assert everywhere("'hd_x' in globals()", pids=pid) is False
    assert everywhere("hd_tool(hd_later)", pids=pid) == 3
    assert set(seen_by_all("hd_later").values()) == {2}


# --- calls ---------------------------------------------------------------------------------------


def test_call(pids: list[int]) -> None:
    assert everywhere.call(divide, 6, right=3) == {pid: (pid, 2) for pid in procs()}
    assert everywhere.call(divide, 6, pids=pids[:2]) == {pid: (pid, 6) for pid in pids[:2]}
    assert everywhere.call(divide, 6, pids=workers()) == {pid: (pid, 6) for pid in pids}


def test_failures_of_call(pids: list[int]) -> None:
    with pytest.raises(ZeroDivisionError) as single:
        everywhere.call(divide_by_rank, pids[0], 1)
    assert isinstance(single.value, RemoteException)
    assert single.value.pid == pids[0]
    with pytest.raises(CompositeException) as several:
        everywhere.call(divide, 1, 0)
    assert [error.pid for error in several.value.exceptions] == [1, *pids]


@pytest.mark.parametrize("swap", [False, True])
def test_errors_come_in_order_of_pid(pids: list[int], swap: bool) -> None:
    named = pids[::-1] if swap else pids
    fail = lambda: 1 // 0
    for attempt in (
        lambda: everywhere.call(fail, pids=named),
        lambda: everywhere("1 // 0", pids=named),
        lambda: hpcdist.reduce(max, fail, pids=named),
        lambda: hpcdist.spmd(fail, pids=named),
        lambda: hpcdist.distributed(range(9), max, pids=named)(lambda _: 1 // 0),
    ):
        with pytest.raises(CompositeException) as caught:
            attempt()
        assert [error.pid for error in caught.value.exceptions] == pids
