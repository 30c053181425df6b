"""What is remembered of a function's items, and of which items that is used at all."""

from typing import Any

import numpy
import pytest

from hpcdist._items import timings
from hpcdist._items.timings import Timings
from hpcdist._runtime.node import Node


@pytest.fixture
def habits() -> Timings:
    return Timings(Node())


def test_what_was_learned_is_known_for_the_same_code(habits: Timings) -> None:
    make = lambda: lambda x: x
    assert habits.learned(make()) is None
    habits.learn(make(), 0.5)
    assert habits.learned(make()) == 0.5
    habits.learn(make(), 0.25)
    assert habits.learned(make()) == 0.25
    assert habits.learned(lambda x: x + 1) is None
    habits.learn(make(), None)
    assert habits.learned(make()) is None


def test_a_builtin_is_known(habits: Timings) -> None:
    habits.learn(abs, 1.0)
    assert habits.learned(abs) == 1.0
    assert habits.learned(len) is None
    habits.learn(abs, None)


def test_a_bound_method_or_a_class_is_not_kept(habits: Timings) -> None:
    append: Any = [].append
    for f in (append, str, numpy.float64(1).sum):
        habits.learn(f, 1.0)
        assert habits.learned(f) is None


def test_a_function_that_captures_values_is_not_kept(habits: Timings) -> None:
    size = 10
    f = lambda x: bytes(size)
    habits.learn(f, 1.0)
    assert habits.learned(f) is None


def test_only_the_last_few_are_kept(habits: Timings) -> None:
    functions = [eval(f"lambda x: x + {k}") for k in range(timings._KEPT_MOST + 10)]
    for f in functions:
        habits.learn(f, 1.0)
    assert habits.learned(functions[0]) is None
    assert habits.learned(functions[-1]) == 1.0
    assert len(habits._seconds) <= timings._KEPT_MOST


def test_small_items_are_told_from_those_that_may_be_large():
    assert timings.are_small([range(10)])
    assert timings.are_small([[1, 2.5, None], (True, 1j)])
    assert timings.are_small([numpy.zeros(100), range(100)])
    assert not timings.are_small([])
    assert not timings.are_small([[]])
    assert not timings.are_small([range(3), ["text"] * 3])
    assert not timings.are_small([[1, numpy.zeros(10), 1]])
    assert not timings.are_small([numpy.zeros((4, 100))])
    assert not timings.are_small([numpy.array([1, "x"], dtype=object)])


def test_light_is_what_was_small_the_last_time(habits: Timings) -> None:
    f = lambda x: x
    assert not habits.are_light(f)
    habits.weigh(f, 10)
    assert habits.are_light(f)
    habits.weigh(f, 1 << 20)
    assert not habits.are_light(f)
    habits.weigh(f, 10)
    assert habits.are_light(f)
    habits.weigh([].append, 10)
    assert not habits.are_light([].append)
