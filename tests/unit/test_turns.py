"""Whose call runs, seen from the queue alone: no workers, no messages."""

import threading
from collections.abc import Callable, Iterator

import pytest

from hpcdist._runtime.lines import Line
from hpcdist._runtime.turns import Call, Turns
from hpcdist._transport.contracts import Slot
from hpcdist._transport.machine import MAIN
from hpcdist._transport.progress import Progress
from tests.helpers import eventually


@pytest.fixture
def turns() -> Iterator[Turns]:
    progress = Progress()
    progress.start()
    made = Turns(progress)
    made.serving = True
    yield made
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


def test_an_interrupt_that_came_too_late_does_not_hit_what_runs_next(turns: Turns) -> None:
    """A spare thread is interrupted after its call, and then does something in the background."""
    threads: list[int] = []
    ended: list[bool] = []

    def wait(number: int) -> None:
        threads.append(threading.get_ident())
        slot = Slot()
        turns._progress.call_later(0.01, lambda: turns._progress.complete(slot))
        turns._progress.wait(slot)
        ended.append(number == len(ended))

    turns.background(lambda: wait(0))
    eventually(lambda: ended == [True] and len(turns._spares) == 1)
    turns.interrupts.interrupt(threads[0])
    turns.background(lambda: wait(1))
    eventually(lambda: ended == [True, True])
    assert threads[0] == threads[1]


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


def method(line: Line, work: Callable[[Call], None]) -> Call:
    made = call(work)
    made.line = line
    return made


def test_methods_of_one_object_run_one_at_a_time_and_hold_up_nothing_else(turns: Turns) -> None:
    turns.set_limit(3)
    line, ran, go_on = Line(), [], threading.Event()

    def first(_: Call) -> None:
        assert go_on.wait(5)
        ran.append("first")

    def outside() -> None:
        turns.submit(method(line, first))
        turns.submit(method(line, lambda _: ran.append("second")))
        turns.submit(call(lambda _: ran.append("other")))
        eventually(lambda: ran == ["other"])
        go_on.set()
        eventually(lambda: len(ran) == 3)

    serve(turns, outside)
    assert ran == ["other", "first", "second"]
    eventually(lambda: turns._running == 0)
    assert line.is_free


def test_a_method_goes_on_only_when_its_object_is_free(turns: Turns) -> None:
    turns.set_limit(3)
    line, ran, go_on = Line(), [], threading.Event()

    def waits(c: Call) -> None:
        turns.suspend(c, None)
        ran.append("waits")
        eventually(lambda: "runs" in ran)
        turns.resume(c)
        ran.append("goes on")

    def runs(_: Call) -> None:
        ran.append("runs")
        assert go_on.wait(5)
        ran.append("ends")

    def outside() -> None:
        turns.submit(method(line, waits))
        eventually(lambda: ran == ["waits"])
        turns.submit(method(line, runs))
        eventually(lambda: turns._waiting_to_resume)
        turns.submit(call(lambda _: ran.append("other")))  # nobody who waits keeps it
        eventually(lambda: ran == ["waits", "runs", "other"])
        go_on.set()
        eventually(lambda: len(ran) == 5)

    serve(turns, outside)
    assert ran == ["waits", "runs", "other", "ends", "goes on"]
    eventually(lambda: turns._running == 0)
    assert line.is_free


def test_methods_wait_for_the_first_step_of_a_coroutine(turns: Turns) -> None:
    line, ran = Line(), []

    def outside() -> None:
        assert turns.begin(line)
        turns.submit(method(line, lambda _: ran.append("method")))
        turns.submit(call(lambda _: ran.append("other")))
        eventually(lambda: ran == ["other"])
        assert not turns.begin(line)  # behind the method
        turns.has_begun(line)
        eventually(lambda: len(ran) == 2)

    serve(turns, outside)
    assert ran == ["other", "method"]
