"""A random generator that travels with a function is worth a warning, once a function."""

import functools
import operator
import random
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcdist import (
    Executor,
    distributed,
    everywhere,
    pmap,
    remotecall,
    remotecall_fetch,
    rng,
    spawn,
    spmd,
    workers,
)
from hpcdist._wire import generators

pytestmark = pytest.mark.any_mpi


@pytest.fixture(autouse=True)
def nothing_was_told() -> None:
    """Let each test be the first: a function is known by its code."""
    generators._told.clear()


def test_the_bytes_of_large_items_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[bytes] = []
    monkeypatch.setattr(generators, "_is_marked", searched.append)
    generator, large = np.random.default_rng(1), bytes(1 << 20)
    repeats = generators.Repeats(len)
    repeats.look(0, [[large]], large)
    with pytest.warns(UserWarning, match="items 1 and 2 of len"):
        repeats.look(1, [[generator, generator], [large, large]], 2 * large)
    assert searched == []
    repeats.look(3, [range(1000)], bytes(3000))
    assert len(searched) == 1


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for torch: what counts is its name and that of its class."""
    module = types.ModuleType("torch")
    module.Generator = type("Generator", (), {"__module__": "torch"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


class Model:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def sample(self, _: Any) -> float:
        return self.rng.random()


def take(generator: Any, _: Any = None) -> float:
    return float(generator.random())


def warned(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


KINDS: dict[str, Callable[[], Any]] = {
    "Generator": lambda: np.random.default_rng(1),
    "RandomState": lambda: np.random.RandomState(1),
    "BitGenerator": lambda: np.random.PCG64(1),
    "Random": lambda: random.Random(1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_generator(pids: list[int], kind: str) -> None:
    generator = KINDS[kind]()

    def draw(_: Any = None) -> str:
        return repr(generator)

    (text,) = warned(lambda: pmap(draw, range(4)))
    assert text.startswith("captured variable 'generator' of draw() is a random generator")
    assert "docs/random-numbers.md" in text
    assert warned(lambda: pmap(draw, range(4))) == []  # once a function


def test_torchs_generator(pids: list[int], torch: Any) -> None:
    """Known by its module, which is not imported."""
    generator = torch.Generator()
    with pytest.warns(UserWarning, match="captured variable 'generator'"):
        error = remotecall(lambda: generator, pids[0]).exception()
    assert isinstance(error, ModuleNotFoundError)  # the workers have no torch


WAYS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "remotecall": lambda f: remotecall_fetch(f, workers()[0]),
    "spawn": lambda f: spawn(f).fetch(),
    "pmap": lambda f: pmap(f, range(3)),
    "a loop": lambda f: distributed(range(3), operator.add)(f),
    "a loop over a list": lambda f: distributed([1, 2, 3], operator.add)(f),
    "everywhere": lambda f: everywhere.call(f),
    "spmd": lambda f: spmd(f),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_send_a_function(pids: list[int], way: str) -> None:
    generator = np.random.default_rng(1)
    assert len(warned(lambda: WAYS[way](lambda _=None: generator.random()))) == 1


def test_a_generator_deep_inside(pids: list[int]) -> None:
    (text,) = warned(lambda: pmap(Model().sample, range(4)))
    assert text.startswith(
        "function Model.sample(), in the Model of method Model.sample(), in attribute .rng of Model"
    )
    bound = functools.partial(take, np.random.default_rng(1))
    (text,) = warned(lambda: pmap(bound, range(4)))
    assert text.startswith(
        "function partial(take()), in argument 1 ('generator') of take() is a random generator"
    )


@pytest.mark.parametrize("f", [random.Random(1).gauss, random.random, np.random.rand])
def test_a_method_of_a_generator(pids: list[int], f: Any) -> None:
    """`from random import random` is one: it takes the generator along."""
    assert len(warned(lambda: remotecall_fetch(lambda: f, pids[0]))) == 1


def test_items_that_share_a_generator(pids: list[int]) -> None:
    shared = np.random.default_rng(1)
    (text,) = warned(lambda: pmap(lambda g: g.random(), [shared] * 4))
    assert "items 0 and 1 of <lambda>() are given the same random generator" in text
    assert len(warned(lambda: pmap(lambda _, g: g.random(), range(4), [shared] * 4))) == 1


@pytest.mark.parametrize("chunksize", [1, 3])
def test_tasks_that_share_a_generator(pids: list[int], chunksize: int) -> None:
    shared = np.random.default_rng(1)
    with Executor() as executor:
        run = lambda generators: list(executor.map(take, generators, chunksize=chunksize))
        assert warned(lambda: run(np.random.default_rng(1).spawn(8))) == []
        (text,) = warned(lambda: run([shared] * 4))
    assert "items 0 and 1 of take() are given the same random generator" in text


def test_items_with_generators_of_their_own(pids: list[int]) -> None:
    """What numpy's `spawn` is for is left in peace."""
    own = np.random.default_rng(1).spawn(8)
    assert warned(lambda: pmap(lambda g: g.random(), own)) == []
    assert warned(lambda: pmap(lambda k: own[k].random(), range(8))) == []


def test_what_is_no_generator(pids: list[int]) -> None:
    kind, system = np.random.Generator, random.SystemRandom
    text = b"generator_ctor randomstate_ctor \x06Random \x09Generator"
    for thing in (kind, system, text, np.random, random):
        assert warned(lambda thing=thing: pmap(lambda _: thing is None, range(4))) == []
    assert warned(lambda: pmap(lambda _: rng().random(), range(4))) == []


def test_a_generator_as_an_argument_of_a_call(pids: list[int]) -> None:
    """It goes once; the copies of a captured one are what is easily missed."""
    with Executor() as executor:
        assert warned(executor.submit(take, np.random.default_rng(1)).result) == []


GLOBAL = """
import warnings
import numpy as np
from hpcdist import *

rng_of_mine = np.random.default_rng(1)

def helper():
    return rng_of_mine.random()

def draw(_=None):
    return helper()

addprocs(2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(len({spawn(draw).fetch() for _ in range(9)}))
    pmap(draw, range(3))
for warning in caught:
    print(str(warning.message).partition(" is a")[0])
warnings.simplefilter("error")
def again(_=None):
    return rng_of_mine.random()
for run in (lambda: remotecall(again, 2), lambda: pmap(again, range(3))):
    try:
        run()
    except UserWarning as e:
        print("raised")
print(remotecall_fetch(abs, 2, -1))
"""


def test_a_global_of_the_script(script: Callable[..., Any]) -> None:
    """And where warnings are errors, the call is not made."""
    done = script(GLOBAL)
    assert done.rc == 0, done.err
    assert done.out.splitlines() == [
        "1",
        "global 'helper' of draw(), in global 'rng_of_mine' of helper()",
        "raised",
        "1",
    ]


def test_what_only_looks_like_a_generator_is_looked_at_a_few_times(
    pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Any] = []
    monkeypatch.setattr(generators.object_paths, "find", lambda *_: looks.append(1))
    how = {"search": "Random"}
    for _ in range(20):
        assert remotecall_fetch(lambda: how["search"], pids[0]) == "Random"
    assert 0 < len(looks) < 10
