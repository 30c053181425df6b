"""Whose call runs, seen from the queue alone: no workers, no messages."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdist._runtime.turns import MAIN, Call, Turns
from hpcdist._transport.progress import Progress
from tests.helpers import eventually


@pytest.fixture
def turns() -> Iterator[Turns]:
    progress = Progress()
    progress.start()
    node: Any = SimpleNamespace(progress=progress, serving=True)
    yield Turns(node)
    progress.stop()


def call(work: Callable[[Call], None]) -> Call:
    return Call(work, None, 0, 0, 0, b"", ())


def serve(turns: Turns, outside: Callable[[], None]) -> None:
    """Let this thread, the main one, run calls while another one does something."""
    assert threading.get_ident() == MAIN
    failures: list[BaseException] = []

    def drive() -> None:
        try:
            eventually(lambda: turns._main_idle is not None)
            outside()
        except BaseException as exc:
            failures.append(exc)
        finally:
            turns.stop()

    thread = threading.Thread(target=drive)
    thread.start()
    try:
        turns.serve()
    finally:
        turns.stop()
        thread.join()
        turns.restart()
    assert not failures, failures


def test_a_call_that_comes_before_the_main_thread_serves_waits_for_it(turns: Turns) -> None:
    ran: list[int] = []
    turns.expect_main()
    turns.submit(call(lambda c: ran.append(c.thread)))
    assert turns.queued == 1
    serve(turns, lambda: eventually(lambda: bool(ran)))
    assert ran == [MAIN]


def test_calls_that_come_together_all_run_on_the_main_thread(turns: Turns) -> None:
    ran: list[int] = []

    def outside() -> None:
        for _ in range(5):  # the first wakes the main thread, which has not got there by the second
            turns.submit(call(lambda c: ran.append(c.thread)))
        eventually(lambda: len(ran) == 5)

    serve(turns, outside)
    assert ran == [MAIN] * 5


def test_who_is_due_keeps_a_turn_from_others_only_until_he_takes_it(turns: Turns) -> None:
    turns.set_limit(2)
    both = threading.Barrier(3)

    def outside() -> None:
        for _ in range(2):
            turns.submit(call(lambda _: both.wait(5)))
        both.wait(5)  # with one turn alone the second would wait for the first

    serve(turns, outside)
    eventually(lambda: turns._running == 0)


def test_a_turn_is_given_back_when_an_answer_cannot_be_sent(turns: Turns) -> None:
    def fail(_: Call) -> None:
        raise OSError("the answer could not be sent")

    def submit() -> None:
        turns.submit(call(fail))
        eventually(lambda: not turns._queue)

    with pytest.raises(OSError, match="the answer"):
        serve(turns, submit)
    assert (turns._running, turns._main_due, turns._main_idle) == (0, False, None)
    ran: list[int] = []

    def outside() -> None:
        turns.submit(call(lambda c: ran.append(c.thread)))
        eventually(lambda: ran)

    serve(turns, outside)
    assert ran == [MAIN]
