"""Ctrl-C and `interrupt()` in the middle of channel operations: no item is lost, none comes twice.

Every item is a number, so what was taken must be 0, 1, 2, ... without a gap: an item that was given
back has gone to its old place. TEST_PRESSES sets how many presses from outside there are, at any
instant from 0 to 600 us after a call has begun; by default few, for the time's sake.
"""

import _thread
import dis
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

import hpcdist
from hpcdist import Channel, RemoteChannel, RemoteException, WorkerPool, remotecall, take
from hpcdist._runtime.references import References
from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi

PRESSES = int(os.environ.get("TEST_PRESSES", "25"))
LATEST = 600  # microseconds after a call has begun
ITEMS = 20  # for each press; a taker that is quicker than the press waits
LONG = 30.0
_MOMENTS = ("CALL", "RETURN", "JUMP_BACKWARD", "YIELD", "WITH_EXCEPT")

# Reads delays in microseconds, presses Ctrl-C at our parent's, says so.
_PRESSER = """
import os, signal, sys, time
parent = os.getppid()
for line in sys.stdin:
    ends = time.perf_counter() + int(line) / 1e6
    while time.perf_counter() < ends:
        pass
    os.kill(parent, signal.SIGINT)
    print(flush=True)
"""


class Presser:
    """A process that presses Ctrl-C."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PRESSER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.stdin: Any = self.process.stdin
        self.stdout: Any = self.process.stdout

    def during(self, work: Callable[[], None]) -> None:
        """Press once while `work` runs, which ends with that."""
        self.stdin.write(f"{random.randrange(LATEST)}\n")
        try:
            self.stdin.flush()
            work()
        except KeyboardInterrupt:
            pass
        self.stdout.readline()

    def end(self) -> None:
        self.stdin.close()
        self.stdout.close()
        self.process.wait()


@pytest.fixture
def presser() -> Iterator[Presser]:
    made = Presser()
    yield made
    made.end()


class Trap:
    """Presses Ctrl-C at the n-th moment that matters on the main thread.

    CPython notices it as a function begins, as a loop goes round, and when anything but a plain
    function has been called and returns. So it is pressed before these instructions, and before
    the last one of a function, which may have been called as anything else.
    """

    def __init__(self, moment: int) -> None:
        self.left = moment

    def during(self, work: Callable[[], None]) -> bool:
        """Tell whether the press came before `work` was over."""
        try:
            sys.settrace(self._trace)
            try:
                work()
            finally:
                sys.settrace(None)
            ends = time.monotonic() + LONG
            while self.left <= 0:  # it was postponed: what it would have ended was done
                assert time.monotonic() < ends, "Ctrl-C got lost"
        except KeyboardInterrupt:
            pass
        return self.left <= 0

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if code.co_filename == __file__:
            return None
        frame.f_trace_opcodes = True
        if event == "call" or (
            event == "opcode" and dis.opname[code.co_code[frame.f_lasti]].startswith(_MOMENTS)
        ):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                # To unpack is to press here, and no call: so it is not noticed here.
                [_] = map(_thread.interrupt_main, (signal.SIGINT,))
        return self._trace


def at_every_moment(work: Callable[[], Any], restore: Callable[[], None]) -> None:
    """Press at one moment of `work` after the other, until it is over before the press.

    How long it waits in between differs, so it must have been over three times.
    """
    moment = in_time = 0
    while in_time < 3:
        moment += 1
        in_time = 0 if Trap(moment).during(work) else in_time + 1
        restore()
    assert moment > 20


# --- what runs on workers ------------------------------------------------------------------------


async def one() -> int:
    return 1


def take_for_ever(channel: Any, into: list[int]) -> None:
    while True:
        into.append(channel.take())


def iterate(channel: Any, into: list[int]) -> None:
    for number in channel:
        into.append(number)


def taken_until_interrupted(channel: Any) -> list[int]:
    into: list[int] = []
    try:
        take_for_ever(channel, into)
    except KeyboardInterrupt:
        pass
    return into


def put_until_interrupted(channel: Any, first: int) -> int:
    """Put numbers until Ctrl-C; return the first one that was not put."""
    end = first + ITEMS
    try:
        while first < end:
            channel.put(first)
            first += 1
        hpcdist.sleep(60)
    except KeyboardInterrupt:
        pass
    return first


def fill(channel: Any, press: int) -> None:
    for number in range(press * ITEMS, (press + 1) * ITEMS):
        channel.put(number)


class Slow:
    """Something whose unpickling takes its time, in Python."""

    def __setstate__(self, number: int) -> None:
        self.number = number
        ends = time.monotonic() + LONG
        while not HURRY and time.monotonic() < ends:
            pass

    def __getstate__(self) -> int:
        return 7


HURRY: list[int] = []

# --- tests ---------------------------------------------------------------------------------------


def press_in(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def drain(channel: Any, into: list[int]) -> list[int]:
    while channel.isready():
        into.append(channel.take())
    return into


def owner_of(name: str, pids: list[int]) -> int:
    return {"process 1": 1, "the taker": pids[0], "another worker": pids[1]}[name]


def interrupt_until_done(future: Any, pid: int) -> None:
    """Interrupt a call once it runs; what comes before it runs does not meet it."""
    ends = time.perf_counter() + random.randrange(LATEST) / 1e6
    while time.perf_counter() < ends:
        pass
    hpcdist.interrupt(pid)
    while not future.done():
        try:
            future.exception(timeout=0.05)
        except TimeoutError:
            hpcdist.interrupt(pid)


@pytest.mark.parametrize("owner", ["process 1", "another worker"])
@pytest.mark.parametrize("how", ["take", "iterate", "function"])
def test_ctrl_c_at_every_moment_of_a_take(pids: list[int], owner: str, how: str) -> None:
    channel = RemoteChannel(10**6, owner_of(owner, pids))
    got: list[int] = []
    iterators: list[Iterator[int]] = []

    def takes() -> None:
        if how == "take":
            got.append(channel.take())
        elif how == "function":
            got.append(take(channel, timeout=LONG))
        else:
            iterators.append(iter(channel))  # kept: its end is not what is looked at
            for number in iterators[-1]:
                got.append(number)
                return

    supplied = 0

    def supply() -> None:
        nonlocal supplied
        for _ in range(len(got) + 2 - supplied):
            channel.put(supplied)
            supplied += 1

    supply()
    at_every_moment(takes, supply)
    eventually(lambda: len(drain(channel, got)) >= supplied)  # the last may be on its way back
    assert got == list(range(supplied))


@pytest.mark.parametrize("owner", ["process 1", "another worker"])
@pytest.mark.parametrize("how", ["put", "function"])
def test_ctrl_c_at_every_moment_of_a_put(pids: list[int], owner: str, how: str) -> None:
    channel = RemoteChannel(10**6, owner_of(owner, pids))
    put = 0

    def puts() -> None:
        nonlocal put
        if how == "put":
            channel.put(put)
        else:
            hpcdist.put(channel, put)
        put += 1

    def check() -> None:
        assert len(channel) == put

    at_every_moment(puts, check)
    assert drain(channel, []) == list(range(put))


@pytest.mark.parametrize("where", ["process 1", "another worker"])
def test_ctrl_c_at_every_moment_of_a_take_from_a_pool(pids: list[int], where: str) -> None:
    members = pids[:2]
    pool = hpcdist.remotecall_fetch(WorkerPool, owner_of(where, pids), members)
    lent: list[int] = []

    def put_back() -> None:
        while lent:
            pool.put(lent.pop())

    at_every_moment(lambda: lent.append(pool.take()), put_back)
    assert sorted(pool.take(timeout=LONG) for _ in members) == members
    assert not pool.isready()


def test_ctrl_c_at_every_moment_of_a_call_on_a_pool(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    at_every_moment(lambda: hpcdist.remotecall_fetch(abs, pool, -1), lambda: None)
    assert pool.take(timeout=LONG) == pids[0]
    assert not pool.isready()


@pytest.mark.parametrize("how", ["function", "coroutine", "method"])
def test_ctrl_c_at_every_moment_of_a_call_to_oneself(pids: list[int], how: str) -> None:
    words = hpcdist.RemoteObject(list, 1, "ab")
    call: Callable[[], hpcdist.Future[int]] = {
        "function": lambda: remotecall(abs, 1, -1),
        "coroutine": lambda: remotecall(one, 1),
        "method": lambda: words.index.remotecall("b"),
    }[how]
    owned = References.here().owned
    before = len(owned)
    made: list[hpcdist.Future[int]] = []  # what a finaliser raises is lost: they go behind the trap

    def still_runs() -> None:
        assert call().fetch(timeout=LONG) == 1
        made.clear()

    at_every_moment(lambda: made.append(call()), still_runs)
    eventually(lambda: len(owned) <= before)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_ctrl_c_at_every_moment_of_a_fetch(pids: list[int], kind: str) -> None:
    size = {"small": 10, "large": 1_000_000}[kind]
    futures = [remotecall(bytes, pids[0], size)]

    def again() -> None:
        assert len(futures[-1].fetch(timeout=LONG)) == size
        futures.append(remotecall(bytes, pids[0], size))

    at_every_moment(lambda: futures[-1].fetch(), again)


@pytest.mark.timeout(60 + PRESSES)
@pytest.mark.parametrize("owner", ["process 1", "another worker"])
@pytest.mark.parametrize("how", [take_for_ever, iterate])
def test_ctrl_c_in_a_take_loses_nothing(
    pids: list[int], presser: Presser, owner: str, how: Any
) -> None:
    channel = RemoteChannel(10**6, owner_of(owner, pids))
    got: list[int] = []
    for press in range(PRESSES):
        hpcdist.remotecall_fetch(fill, channel.where, channel, press)
        presser.during(lambda: how(channel, got))
    eventually(lambda: len(drain(channel, got)) >= PRESSES * ITEMS)
    assert got == list(range(PRESSES * ITEMS))


@pytest.mark.timeout(60 + PRESSES)
def test_ctrl_c_in_a_take_that_waits_loses_nothing(pids: list[int], presser: Presser) -> None:
    channel = RemoteChannel(1, pids[0])
    total = PRESSES * ITEMS
    feeder = remotecall(lambda c, n: [c.put(i) for i in range(n)] and None, pids[1], channel, total)
    got: list[int] = []
    for _ in range(PRESSES):
        presser.during(lambda: take_for_ever(channel, got))
    eventually(lambda: len(drain(channel, got)) >= total, LONG)
    feeder.fetch(timeout=LONG)
    assert got == list(range(total))


@pytest.mark.timeout(60 + PRESSES)
@pytest.mark.parametrize("owner", ["process 1", "the taker", "another worker"])
@pytest.mark.parametrize("thread", ["main thread", "spare thread"])
def test_interrupt_of_a_taker_loses_nothing(pids: list[int], owner: str, thread: str) -> None:
    channel = RemoteChannel(10**6, owner_of(owner, pids))
    got: list[int] = []
    for press in range(PRESSES):
        hpcdist.remotecall_fetch(fill, channel.where, channel, press)
        # A call that waits has the worker's main thread: what comes next runs on a spare one.
        first = remotecall(hpcdist.sleep, pids[0], 60) if thread == "spare thread" else None
        taker = remotecall(taken_until_interrupted, pids[0], channel)
        interrupt_until_done(taker, pids[0])
        try:
            got += taker.fetch()
        except RemoteException as exc:
            if not isinstance(exc.cause, KeyboardInterrupt):
                raise
        if first is not None:
            interrupt_until_done(first, pids[0])
    eventually(lambda: len(drain(channel, got)) >= PRESSES * ITEMS)
    assert got == list(range(PRESSES * ITEMS))


@pytest.mark.timeout(60 + PRESSES)
def test_interrupt_of_one_take_returns_or_gives_back(pids: list[int]) -> None:
    channel = RemoteChannel(10**6, pids[1])
    got: list[int] = []
    for press in range(PRESSES):
        hpcdist.remotecall_fetch(fill, channel.where, channel, press)
        for _ in range(ITEMS):
            taker = remotecall(lambda c: c.take(), pids[0], channel)
            if random.random() < 0.5:
                hpcdist.interrupt(pids[0])
            try:
                got.append(taker.fetch())
            except RemoteException as exc:
                if not isinstance(exc.cause, KeyboardInterrupt):
                    raise
    eventually(lambda: len(drain(channel, got)) >= PRESSES * ITEMS)
    assert got == list(range(PRESSES * ITEMS))


@pytest.mark.timeout(60 + PRESSES)
@pytest.mark.parametrize("owner", ["process 1", "the taker", "another worker"])
def test_interrupt_of_a_putter_puts_once_or_not(pids: list[int], owner: str) -> None:
    channel = RemoteChannel(10**6, owner_of(owner, pids))
    first = 0
    for _ in range(PRESSES):
        putter = remotecall(put_until_interrupted, pids[0], channel, first)
        interrupt_until_done(putter, pids[0])
        first = putter.fetch() if putter.exception() is None else first
    assert drain(channel, []) == list(range(first))


def test_ctrl_c_in_a_put_that_waits(pids: list[int]) -> None:
    channel = RemoteChannel(1, pids[0])
    channel.put("there")
    press_in(0.1)
    with pytest.raises(KeyboardInterrupt):
        channel.put("too much")
    assert [channel.take(), channel.isready()] == ["there", False]


def test_ctrl_c_while_an_item_is_unpickled(pids: list[int]) -> None:
    channel = RemoteChannel(2, pids[0])
    channel.put(Slow())
    channel.put("second")
    started = time.monotonic()
    press_in(0.2)
    with pytest.raises(KeyboardInterrupt):
        channel.take()
    assert time.monotonic() - started < LONG / 2
    HURRY.append(1)
    assert [channel.take().number, channel.take()] == [7, "second"]
    HURRY.clear()


def test_an_item_goes_back_to_its_old_place() -> None:
    channel = Channel(4)
    for item in "abcd":
        channel.put(item)
    taken = [channel.try_take() for _ in range(3)]
    for number in (1, 0, 2):
        channel.give_back(*taken[number])
    assert len(channel) == 4
    assert channel.fetch() == "a"
    assert [channel.take() for _ in range(4)] == list("abcd")


def test_a_late_interrupt_does_not_meet_the_next_call(pids: list[int]) -> None:
    for _ in range(PRESSES):
        short = remotecall(hpcdist.sleep, pids[0], 0.0005)
        hpcdist.interrupt(pids[0])
        short.exception()
        assert hpcdist.remotecall_fetch(hpcdist.sleep, pids[0], 0.001) is None
    eventually(lambda: hpcdist.remotecall_fetch(abs, pids[0], -1) == 1)
