"""The wait loop: what is watched, what is due, and who looks when nobody waits."""

import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from hpcdist._transport import progress as module
from hpcdist._transport.contracts import Slot
from hpcdist._transport.descriptors import Bed, Descriptors
from hpcdist._transport.progress import Progress
from hpcdist._transport.timers import Timers
from tests.helpers import eventually

SOON = 10.0  # long enough for any machine, and waited for only where a test fails


@pytest.fixture
def progress() -> Iterator[Progress]:
    """A wait loop of its own."""
    loop = Progress()
    loop.start()
    yield loop
    loop.stop()


@pytest.fixture
def watched() -> Iterator[Descriptors]:
    """Descriptors that nobody drives."""
    found = Descriptors()
    found.open()
    yield found
    found.close()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a socket."""
    pair = socket.socketpair()
    yield pair
    for end in pair:
        end.close()


def test_timers_run_in_order_and_only_when_due() -> None:
    timers, done = Timers(), list[str]()
    timers.add(0.2, lambda: done.append("second"))
    timers.add(0.1, lambda: done.append("first"))
    timers.add(1000, lambda: done.append("never"))
    timers.run(time.monotonic() + 1)
    assert done == ["first", "second"]
    assert 990 < timers.first() - time.monotonic() <= 1000
    timers.clear()
    assert timers.first() == float("inf")


def test_a_failing_timer_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("sys.excepthook", lambda *exc: seen.append(exc[0]))
    timers, done = Timers(), list[int]()
    timers.add(0, lambda: done.append(1 // 0))
    timers.add(0, lambda: done.append(2))
    timers.run(time.monotonic() + 1)
    assert done == [2]
    assert seen == [ZeroDivisionError]


def test_a_sleeper_that_does_not_listen_hears_only_kicks(
    watched: Descriptors, ends: tuple[socket.socket, socket.socket]
) -> None:
    here, there = ends
    watched.register(here.fileno(), lambda _: None, select.EPOLLIN)
    bed = Bed(watched)
    try:
        there.send(b"!")
        bed.sleep(SOON)  # returns at once: it listens
        bed.listen(False)
        timer = threading.Timer(0.1, bed.kick)
        start = time.monotonic()
        timer.start()
        bed.sleep(SOON)
        assert 0.1 <= time.monotonic() - start < SOON
        timer.join()
        bed.listen(True)
        start = time.monotonic()
        bed.sleep(SOON)  # what came meanwhile is still there
        assert time.monotonic() - start < SOON
    finally:
        bed.close()


def wait_once(progress: Progress, rare: bool = True) -> None:
    """Wait for what another process sends, as a single call does."""
    slot = Slot()
    here, there = socket.socketpair()

    def came(events: int) -> None:
        here.recv(16)
        progress.complete(slot)

    timer = threading.Timer(0.02, there.send, [b"!"])
    with here, there:
        if rare:
            rest(progress)
        progress.register(here.fileno(), came, select.EPOLLIN)
        timer.start()
        progress.wait(slot, time.monotonic() + SOON)
        progress.unregister(here.fileno())
        timer.join()


def rest(progress: Progress) -> None:
    """Return once the helper sleeps."""
    eventually(lambda: progress._resting)


@pytest.mark.parametrize("waits", [0, 1, 2])
def test_timers_are_run_though_nobody_waits(progress: Progress, waits: int) -> None:
    rest(progress)
    for k in range(waits):
        wait_once(progress, rare=k == 0)
    done = threading.Event()
    progress.call_later(0.01, done.set)
    assert done.wait(SOON)


@pytest.mark.parametrize("waits", [0, 1, 2])
def test_descriptors_are_served_though_nobody_waits(
    progress: Progress, ends: tuple[socket.socket, socket.socket], waits: int
) -> None:
    here, there = ends
    done = threading.Event()

    def came(events: int) -> None:
        here.recv(16)
        done.set()

    progress.register(here.fileno(), came, select.EPOLLIN)
    rest(progress)
    for k in range(waits):
        wait_once(progress, rare=k == 0)
    there.send(b"!")
    assert done.wait(SOON)
    progress.unregister(here.fileno())


def test_one_wait_in_a_while_leaves_the_helper_asleep(progress: Progress) -> None:
    for _ in range(20):  # it may wake by itself just then
        rest(progress)
        ends_at = progress._rest_ends
        wait_once(progress)
        if progress._rest_ends == ends_at and progress._resting:
            assert progress._helper_asleep
            return
    pytest.fail("each wait has woken the helper")


def test_what_is_posted_after_a_wait_leaves_though_nobody_waits(progress: Progress) -> None:
    left = threading.Event()

    class Box:
        """An outbox."""

        queued = False

        def flush(self) -> None:
            left.set()

    wait_once(progress)
    progress.dirty.append(Box())  # type: ignore[arg-type]
    progress.soon()
    assert left.wait(SOON)


def test_sending_receives_nothing(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who only sends may hold locks that a handler wants."""
    monkeypatch.setattr(module, "_RARE", 0.0)  # every turn at the wheel is one in a while
    looks: list[int] = []

    class Plane:
        """A plane that counts the looks of this thread."""

        woke = False
        moved = 0

        def arm(self) -> None:
            pass

        disarm = arm

        def busy(self) -> bool:
            return False

        def poll(self) -> bool:
            if threading.current_thread() is threading.main_thread():
                looks.append(1)
            return False

    progress.plane = Plane()  # type: ignore[assignment]
    for _ in range(3):
        rest(progress)
        progress.nudge()
    assert not looks
    progress.plane = None


def test_a_fault_while_giving_back_leaves_the_wheel_free(progress: Progress) -> None:
    class Plane:
        """A plane whose every look fails after the wait."""

        woke = False
        moved = 0
        armed = 0

        def arm(self) -> None:
            self.armed += 1

        def disarm(self) -> None:
            pass

        def busy(self) -> bool:
            return False

        def poll(self) -> bool:
            if threading.current_thread() is threading.main_thread() and slot.ready:
                raise RuntimeError("no look")
            return False

    slot = Slot()
    rest(progress)
    timer = threading.Timer(0.02, progress.complete, [slot])
    progress.plane = Plane()  # type: ignore[assignment]
    timer.start()
    with pytest.raises(RuntimeError, match="no look"):
        progress.wait(slot, time.monotonic() + SOON)
    timer.join()
    progress.plane = None
    wait_once(progress)  # the wheel is free, and the helper is told
