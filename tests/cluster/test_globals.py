"""Globals of the script that functions use: when they travel, and what a worker keeps of them."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcdist import bcast, pmap, remotecall, remotecall_fetch

pytestmark = pytest.mark.any_mpi

RULE = """
import threading
from hpcdist import *

number, numbers = 0, []
limit = range(3)
names = frozenset({"a"})

def count():
    global number
    number += 1
    numbers.append(number)
    return number, numbers

addprocs(2)
print([remotecall_fetch(count, 2) for _ in range(3)])  # the number counts, the list starts again
print(remotecall_fetch(count, 3))
number = 10
print(remotecall_fetch(count, 2))  # the script's own value is another: it travels
numbers.append("x")
print(remotecall_fetch(count, 2))
print(number, numbers)
"""


def test_the_rule(script: Callable[..., Any]) -> None:
    done = script(RULE)
    assert done.rc == 0, done.err
    assert done.out.splitlines() == [
        "[(1, [1]), (2, [2]), (3, [3])]",
        "(1, [1])",
        "(11, [11])",
        "(12, ['x', 12])",
        "10 ['x']",
    ]


AFTER_A_FAILURE = """
import threading
from hpcdist import *

number = 5
addprocs(1)
try:
    remotecall(lambda lock: number, 2, threading.Lock())
except TypeError:
    print("not sent")
print(remotecall_fetch(lambda _: number, 2, 0))
"""


def test_a_global_of_a_call_that_was_not_sent(script: Callable[..., Any]) -> None:
    """The worker has not been told of it."""
    done = script(AFTER_A_FAILURE)
    assert done.rc == 0, done.err
    assert done.out.splitlines() == ["not sent", "5"]


BYTES = """
from hpcdist import *
from hpcdist._runtime.node import here

scale, bounds, kinds, label = 3, (1, 2), frozenset({"a", "b"}), "x" * 10_000
steps = range(7)
table = list(range(5000))

def light():
    return scale, bounds, kinds, label, steps

def heavy():
    return table

def bytes_of(f):
    peer, sizes = here.node.peer(2), []
    post = peer.post
    peer.post = lambda data, *rest: (sizes.append(len(data)), post(data, *rest))
    remotecall_fetch(f, 2)
    peer.post = post
    return sum(sizes)

addprocs(1)
print([bytes_of(light) for _ in range(3)], [bytes_of(heavy) for _ in range(3)])
"""


def test_bytes_of_a_call(script: Callable[..., Any]) -> None:
    """What cannot change is sent once; the rest with each call."""
    done = script(BYTES)
    assert done.rc == 0, done.err
    light, heavy = (eval(part + "]") for part in done.out.strip().split("]")[:2])
    assert light[0] > 10_000
    assert light[1] <= 64
    assert light[2] <= 64
    assert min(heavy) > 10_000


def caught(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    assert all(w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


def test_a_large_value_that_travels_again_and_again(pids: list[int]) -> None:
    """The third time, a warning names it; never again for this function."""
    data = np.ones(1 << 18)

    def total() -> float:
        return float(data.sum())

    call = lambda: remotecall_fetch(total, pids[0])
    assert [len(caught(call)) for _ in range(2)] == [0, 0]
    (text,) = caught(call)
    assert text.startswith("captured variable 'data' of total() (2.1 MB) travels with every call")
    assert "hpcdist.bcast()" in text
    assert caught(call) == []


@pytest.mark.parametrize(
    "kind", ["an argument", "another each time", "changed", "a map", "small", "bcast"]
)
def test_large_values_that_are_all_right(pids: list[int], kind: str) -> None:
    data = np.ones(1 << 18)
    one = 1

    def run() -> None:
        nonlocal data
        if kind == "an argument":
            remotecall_fetch(lambda x: x.size + one, pids[0], data)
        elif kind == "another each time":
            data = data.copy()
            remotecall_fetch(lambda: data.size, pids[0])
        elif kind == "changed":
            data[:] += 1
            remotecall_fetch(lambda: data.size, pids[0])
        elif kind == "a map":
            pmap(lambda k: data[k], range(5))
        elif kind == "small":
            few = data[:10]
            remotecall_fetch(lambda: few.size, pids[0])
        else:
            with bcast(data) as sent:
                assert remotecall(lambda x: x.size + one, pids[0], sent).fetch() == data.size + 1

    assert [caught(run) for _ in range(5)] == [[]] * 5
