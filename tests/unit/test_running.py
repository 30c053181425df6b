"""Running users' functions: what is interrupted, what is not, and that each call is answered."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hpcdist._runtime.node import Node
from hpcdist._runtime.running import Runners, Unpacked
from hpcdist._runtime.turns import Call
from tests.helpers import eventually

Answers = list[tuple[Any, BaseException | None]]


@pytest.fixture
def runners() -> Iterator[Runners]:
    """Those of a node of its own; this thread is held, as one that runs calls is."""
    runners = Node().service(Runners)
    me = threading.get_ident()
    runners.interrupts.hold(me)
    yield runners
    runners.interrupts.forget(me)
    runners.interrupts.leave(me)
    loop = runners.event_loop._loop
    if loop is not None:
        loop.call_soon_threadsafe(loop.stop)
        eventually(lambda: not loop.is_running())
        loop.close()


def a_call(f: Callable[..., Any], *args: object, **kw: object) -> Call:
    call = Call(lambda _: None, None, 0, 1, 0, (f, args, kw), ())
    call.thread = threading.get_ident()
    return call


def as_given(call: Call) -> Unpacked:
    f, args, kw = call.body
    return f, args, kw


def run(runners: Runners, call: Call) -> Answers:
    answers: Answers = []
    runners.of(as_given, lambda _, value, error: answers.append((value, error))).run(call)
    return answers


def test_the_value_is_the_answer(runners: Runners) -> None:
    assert run(runners, a_call(int, "101", base=2)) == [(5, None)]
    assert run(runners, a_call(len, "four")) == [(4, None)]


@pytest.mark.parametrize("error", [ValueError(), SystemExit(3), KeyboardInterrupt()])
def test_whatever_the_function_raises_is_the_answer(runners: Runners, error: BaseException) -> None:
    def fail() -> None:
        raise error

    assert run(runners, a_call(fail)) == [(None, error)]


def test_what_cannot_be_unpacked_is_answered_too(runners: Runners) -> None:
    answers: Answers = []

    def unpack(call: Call) -> Unpacked:
        raise ImportError

    runners.of(unpack, lambda _, value, error: answers.append((value, error))).run(a_call(len))
    [(value, error)] = answers
    assert value is None
    assert type(error) is ImportError


def test_the_thread_is_held_but_in_the_function(runners: Runners) -> None:
    held = runners.interrupts.held
    me = threading.get_ident()
    seen = []
    runners.of(as_given, lambda *_: seen.append(me in held)).run(
        a_call(lambda: seen.append(me in held))
    )
    assert seen == [False, True]


def test_an_interrupt_that_came_before_the_function_is_its_own(runners: Runners) -> None:
    ran: list[int] = []
    runners.interrupts.note(threading.get_ident())
    [(_, error)] = run(runners, a_call(ran.append, 1))
    assert type(error) is KeyboardInterrupt
    assert ran == []


def test_an_interrupt_that_comes_too_late_spoils_no_answer(runners: Runners) -> None:
    answers: Answers = []

    def answer(call: Call, value: object, error: BaseException | None) -> None:
        answers.append((value, error))
        if len(answers) < 3:
            raise KeyboardInterrupt

    runners.of(as_given, answer).run(a_call(len, "four"))
    assert answers == [(4, None)] * 3


async def double(x: int) -> int:
    if x < 0:
        raise ValueError
    return 2 * x


@pytest.mark.parametrize("way", ["run", "start"])
def test_a_coroutine_is_answered_from_the_event_loop(runners: Runners, way: str) -> None:
    answered = threading.Event()
    answers: Answers = []

    def answer(call: Call, value: object, error: BaseException | None) -> None:
        answers.append((value, type(error)))  # type: ignore[arg-type]
        if len(answers) == 2:
            answered.set()

    runner = runners.of(as_given, answer)
    for x in (3, -3):
        getattr(runner, way)(a_call(double, x))
    assert answered.wait(20)
    assert sorted(answers, key=str) == [(6, type(None)), (None, ValueError)]


def test_an_interrupt_that_comes_too_late_loses_no_coroutine(runners: Runners) -> None:
    answered = threading.Event()
    start = runners.event_loop.start
    tries = []

    def interrupted(begin: Any, end: Any) -> None:
        tries.append(begin)
        if len(tries) == 1:
            raise KeyboardInterrupt
        start(begin, end)

    runners.event_loop.start = interrupted  # type: ignore[method-assign]
    runners.of(as_given, lambda *_: answered.set()).run(a_call(double, 3))
    assert answered.wait(20)


def test_more_of_the_users_code_is_run_openly(runners: Runners) -> None:
    held = runners.interrupts.held
    me = threading.get_ident()
    call = a_call(len)
    assert runners.openly(call, lambda: me in held) is False
    assert me in held
    with pytest.raises(ZeroDivisionError):
        runners.openly(call, divmod, 1, 0)
    assert me in held


def test_a_coroutine_interrupted_before_its_first_step_is_answered(runners: Runners) -> None:
    answers: Answers = []
    loop = runners.event_loop
    loop.start(_soon, lambda value, error: answers.append((value, error)))
    eventually(lambda: answers)
    busy = threading.Event()
    assert loop._loop is not None
    loop._loop.call_soon_threadsafe(busy.wait)
    loop.start(_never, lambda value, error: answers.append((value, error)))
    loop.interrupt()
    busy.set()
    eventually(lambda: len(answers) == 2)
    assert answers[0] == (None, None)
    assert isinstance(answers[1][1], KeyboardInterrupt)


async def _soon() -> None:
    pass


async def _never() -> None:
    import asyncio

    await asyncio.get_running_loop().create_future()
