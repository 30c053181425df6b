"""The threads of a simulation: one runs at a time, and the seed says which."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hpcdist.testing.baton import BEGINNING, Baton, SimulationError
from hpcdist.testing.locks import SimCondition, SimLock, SimRLock
from hpcdist.testing.records import Trace

pytestmark = pytest.mark.any_mpi


class Owner:
    """A process with nothing in it."""

    pid = 7
    slowness = 0.0
    is_stopped = False
    is_dead = False

    def __init__(self) -> None:
        self.halted: list[object] = []

    def enter(self) -> None:
        pass


class Stage:
    """A baton, and threads of one process."""

    def __init__(self, seed: int = 0) -> None:
        self.baton = Baton(seed, Trace(BEGINNING))
        self.owner = Owner()

    def start(self, *works: Callable[[], None]) -> None:
        for number, work in enumerate(works):
            self.baton.spawn(self.owner, f"t{number}", work)

    def run(self, *works: Callable[[], None], seconds: float = 100.0) -> None:
        self.start(*works)
        self.baton.run(self.baton.now + seconds)


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.baton.end()


def test_a_sleep_takes_no_real_time(stage: Stage) -> None:
    begin, ends = time.monotonic(), list[float]()

    def sleep() -> None:
        stage.baton.sleep(stage.baton.now + 3600)
        ends.append(stage.baton.now)

    stage.run(sleep, seconds=4000)
    assert ends == [BEGINNING + 3600]
    assert stage.baton.now == BEGINNING + 4000
    assert time.monotonic() - begin < 60


def test_a_lock_lets_one_thread_in_at_a_time(stage: Stage) -> None:
    lock, inside, most = SimLock(stage.baton), list[int](), list[int]()

    def work() -> None:
        for _ in range(5):
            with lock:
                inside.append(1)
                most.append(len(inside))
                stage.baton.sleep(stage.baton.now + 0.1)
                inside.pop()

    stage.run(work, work, work)
    assert most == [1] * 15
    assert not lock.locked()


def test_a_lock_that_is_not_to_be_had_in_time(stage: Stage) -> None:
    lock, taken = SimLock(stage.baton), list[object]()

    def wait() -> None:
        taken.append((lock.acquire(timeout=2.0), stage.baton.now - BEGINNING))
        taken.append(lock.acquire(blocking=False))

    lock.acquire()
    stage.run(wait)
    assert taken == [(False, 2.0), False]


def test_a_lock_can_be_released_by_another_thread(stage: Stage) -> None:
    lock, done = SimLock(stage.baton), list[str]()
    lock.acquire()

    def wait() -> None:
        lock.acquire()
        done.append("taken")

    def give() -> None:
        stage.baton.sleep(stage.baton.now + 1)
        lock.release()

    stage.run(wait, give)
    assert done == ["taken"]
    lock.release()
    with pytest.raises(RuntimeError):
        lock.release()


def test_an_rlock_can_be_taken_twice(stage: Stage) -> None:
    lock, log = SimRLock(stage.baton), list[str]()

    def twice(name: str) -> None:
        with lock:
            with lock:
                log.append(name)
                stage.baton.sleep(stage.baton.now + 1)
            log.append(name)
            stage.baton.sleep(stage.baton.now + 1)

    stage.run(lambda: twice("a"), lambda: twice("b"))
    assert log in (["a", "a", "b", "b"], ["b", "b", "a", "a"])


def test_a_condition_wakes_those_that_wait(stage: Stage) -> None:
    condition, items, got = (
        SimCondition(stage.baton, SimRLock(stage.baton)),
        list[int](),
        list[int](),
    )

    def take() -> None:
        with condition:
            condition.wait_for(lambda: bool(items))
            got.append(items.pop())

    def put() -> None:
        for k in range(2):
            stage.baton.sleep(stage.baton.now + 1)
            with condition:
                items.append(k)
                condition.notify_all()

    stage.run(take, take, put)
    assert sorted(got) == [0, 1]


def test_a_condition_gives_up_in_time(stage: Stage) -> None:
    condition, said = SimCondition(stage.baton, SimRLock(stage.baton)), list[object]()

    def wait() -> None:
        with condition:
            said.append(condition.wait(3.0))
            said.append(condition.wait_for(lambda: False, 2.0))
        said.append(stage.baton.now - BEGINNING)

    stage.run(wait)
    assert said == [False, False, 5.0]


def interleaving(seed: int) -> list[str]:
    stage, log = Stage(seed), list[str]()

    def count(name: str) -> None:
        for _ in range(10):
            log.append(name)
            stage.baton.pause()

    stage.run(*(lambda name=name: count(name) for name in "abc"))
    stage.baton.end()
    return log


def test_the_seed_decides_who_runs() -> None:
    assert interleaving(1) == interleaving(1)
    assert len({tuple(interleaving(seed)) for seed in range(10)}) > 5


def test_an_error_raised_in_a_sleeper_wakes_it(stage: Stage) -> None:
    caught: list[BaseException] = []

    def sleep() -> None:
        try:
            stage.baton.sleep()
        except KeyboardInterrupt as exc:
            caught.append(exc)

    stage.run(sleep, seconds=1)
    (thread,) = stage.baton.threads
    thread.error = KeyboardInterrupt
    stage.baton.wake(thread)
    stage.run(seconds=1)
    assert len(caught) == 1


def test_threads_that_never_come_to_rest_are_found(stage: Stage) -> None:
    def spin() -> None:
        while True:
            stage.baton.pause()

    with pytest.raises(SimulationError, match="without any time passing") as caught:
        stage.run(spin, spin)
    assert "in spin" in str(caught.value)


def test_threads_end_with_their_simulation() -> None:
    before, stage, unwound = threading.active_count(), Stage(), list[str]()
    lock = SimLock(stage.baton)
    lock.acquire()

    def wait() -> None:
        try:
            with lock:
                pass
        finally:
            unwound.append("lock")

    def sleep() -> None:
        try:
            stage.baton.sleep()
        finally:
            unwound.append("sleep")

    stage.run(wait, sleep)
    stage.start(sleep)  # it never gets to run
    assert unwound == []
    stage.baton.end()
    assert sorted(unwound) == ["lock", "sleep"]
    assert threading.active_count() == before
