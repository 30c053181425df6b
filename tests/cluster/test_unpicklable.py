"""What cannot be pickled is named: the argument, global, capture or result, and where in it."""

import functools
import operator
import threading
from collections.abc import Callable
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    Executor,
    Future,
    RemoteChannel,
    RemoteException,
    bcast,
    distributed,
    everywhere,
    pmap,
    reduce,
    remotecall,
    remotecall_fetch,
    scatter,
    spawn,
    spmd,
    workers,
)

pytestmark = pytest.mark.any_mpi

LOCK = threading.Lock()


class Engine:
    def __init__(self) -> None:
        self.lock = threading.Lock()


class Model:
    def __init__(self) -> None:
        self.name = "m"
        self.parts = [1, {"engine": Engine()}]

    def predict(self, x: int) -> int:
        return x


class Slotted:
    __slots__ = ("number", "where")

    def __init__(self) -> None:
        self.number = 1
        self.where = threading.Lock()


def train(data: Any, model: Any = None, *, rate: Any = 1) -> None:
    """Do nothing with them."""


INSIDE = (
    ", in attribute .parts of Model, in item [1], in item ['engine'], in attribute .lock of Engine"
)
NO_LOCK = "cannot pickle '_thread.lock' object: "


def said(run: Callable[[], Any]) -> str:
    with pytest.raises(TypeError) as caught:
        run()
    return str(caught.value)


def test_an_argument(pids: list[int]) -> None:
    where = NO_LOCK + "argument 2 ('model') of train()" + INSIDE
    assert said(lambda: remotecall(train, workers()[0], [1], Model())) == where
    assert said(lambda: spawn(train, [1], Model())) == where
    assert said(lambda: everywhere.call(train, [1], Model(), pids=pids)) == where
    assert said(lambda: spmd(train, [1], Model())) == where
    with Executor() as executor:
        assert said(executor.submit(train, [1], Model()).result) == where


def test_a_keyword_and_a_builtin(pids: list[int]) -> None:
    text = said(lambda: remotecall(train, workers()[0], 1, rate=Slotted()))
    assert text == NO_LOCK + "argument 'rate' of train(), in attribute .where of Slotted"
    assert said(lambda: remotecall(print, workers()[0], threading.Lock())).startswith(
        NO_LOCK + "argument 1"
    )


def test_what_a_function_captures(pids: list[int]) -> None:
    model = Model()
    where = NO_LOCK + "captured variable 'model' of use()" + INSIDE

    def use(_: Any = None) -> Any:
        return model

    assert said(lambda: remotecall(use, workers()[0])) == where
    assert said(lambda: pmap(use, range(5))) == where
    assert said(lambda: distributed(range(5), operator.add)(use)) == where
    assert said(lambda: distributed([1, 2, 3], operator.add)(use)) == where
    assert said(lambda: reduce(operator.add, use)) == where


def test_defaults_partials_and_methods(pids: list[int]) -> None:
    def with_default(x: Any = 1, lock: Any = LOCK) -> None: ...

    assert said(lambda: remotecall(with_default, workers()[0])) == (
        NO_LOCK + "default of 'lock' of with_default()"
    )
    bound = functools.partial(train, 1, Model())
    assert said(lambda: remotecall(bound, workers()[0])) == (
        NO_LOCK + "function partial(train()), in argument 2 ('model') of train()" + INSIDE
    )
    assert said(lambda: pmap(Model().predict, [1])) == (
        NO_LOCK + "function Model.predict(), in the Model of method Model.predict()" + INSIDE
    )


def test_an_item_of_a_map(pids: list[int]) -> None:
    text = said(lambda: pmap(train, [1, 2, Model(), 4]))
    assert text == NO_LOCK + "item 2" + INSIDE


def test_an_item_of_a_channel(pids: list[int]) -> None:
    for where in (1, pids[0]):
        channel = RemoteChannel(3, where)
        assert said(lambda c=channel: c.put(Model())) == NO_LOCK + "the item" + INSIDE


def test_values_for_many(pids: list[int]) -> None:
    assert said(lambda: bcast(Model())) == NO_LOCK + "the value" + INSIDE
    assert said(lambda: scatter([1, Model(), 3])) == NO_LOCK + "part 1, in item [0]" + INSIDE
    assert said(lambda: Future(pids[0]).put(Model())) == NO_LOCK + "the value" + INSIDE


@pytest.mark.parametrize(
    "run",
    [
        lambda pid: remotecall_fetch(Model, pid),
        lambda pid: remotecall(Model, pid).fetch(),
        lambda pid: everywhere.call(Model, pids=[pid]),
        lambda pid: pmap(lambda _: Model(), range(3)),
        lambda pid: spmd(Model, pids=[pid]),
    ],
    ids=["fetch", "future", "everywhere", "pmap", "spmd"],
)
def test_a_result(pids: list[int], run: Callable[[int], Any]) -> None:
    with pytest.raises(RemoteException) as caught:
        run(pids[0])
    assert NO_LOCK + "the result" + INSIDE in str(caught.value)


GLOBAL = """
import threading
import hpcdist

class Model:
    def __init__(self):
        self.lock = threading.Lock()

model = Model()

def helper():
    return model

def use(_=None):
    return helper()

hpcdist.addprocs(2)
for run in (
    lambda: hpcdist.remotecall(use, 2),
    lambda: hpcdist.pmap(use, range(3)),
    lambda: hpcdist.everywhere.call(use),
    lambda: hpcdist.spmd(use),
):
    try:
        run()
    except TypeError as e:
        print(e)
"""


def test_a_global_of_the_script(script: Callable[..., Any]) -> None:
    """Also where a function that the called one uses names it."""
    done = script(GLOBAL)
    assert done.rc == 0, done.err
    path = "global 'helper' of use(), in global 'model' of helper(), in attribute .lock of Model"
    assert done.out.splitlines() == [NO_LOCK + path] * 4


def test_the_worker_goes_on(pids: list[int]) -> None:
    with pytest.raises(TypeError):
        remotecall(train, pids[0], threading.Lock())
    assert remotecall_fetch(abs, pids[0], -1) == 1
    assert hpcdist.myid() == 1
