"""Channels, within a process and between processes: order, closing, and that nothing is lost."""

import collections
import ctypes
import gc
import mmap
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    Channel,
    ChannelClosed,
    HpcdistError,
    RemoteChannel,
    RemoteException,
    channel_from_id,
    myid,
    remotecall,
    remotecall_fetch,
    remoteref_id,
    workers,
)
from tests.cluster.test_futures import identity, in_thread, outcome
from tests.helpers import eventually, kill9

LONG = 30.0  # seconds after which a wait that ought to end is taken for lost

# --- what the workers run; they import this module -----------------------------------------------

KEPT: list[Any] = []


def keep(thing: Any) -> None:
    KEPT.append(thing)


def keep_none() -> None:
    KEPT.clear()
    gc.collect()


def use_kept() -> Any:
    return KEPT[-1].take()


def is_held(ref_id: tuple[int, int]) -> bool:
    """Tell whether this process still owns a channel of that id."""
    gc.collect()
    try:
        channel_from_id(ref_id)
    except Exception:
        return False
    return True


def put_all(channel: RemoteChannel, values: list[Any]) -> None:
    for value in values:
        channel.put(value)


def take_until_closed(channel: RemoteChannel) -> list[Any]:
    return list(channel)


def take_impatiently(channel: RemoteChannel, n: int) -> list[Any]:
    """Take `n` items with a timeout that mostly passes just when an item comes."""
    taken: list[Any] = []
    while len(taken) < n:
        try:
            taken.append(channel.take(timeout=0.001))
        except TimeoutError:
            pass
    return taken


def hold_the_interpreter(flag: str, seconds: float) -> None:
    """Be stuck in C: none of this process's threads can run. A byte in a file says when."""
    libc = ctypes.PyDLL(None)
    with open(flag, "r+b") as file, mmap.mmap(file.fileno(), 1) as byte:
        byte[0] = 1
        libc.usleep(int(seconds * 1e6))


def make_here() -> RemoteChannel:
    channel = RemoteChannel(2)
    channel.put(myid())
    return channel


def fails() -> Channel:
    raise ValueError("no channel today")


class Shelf:
    """A dictionary as a channel, after the example in Julia's manual: items are taken by key."""

    def __init__(self) -> None:
        self._items: dict[Any, Any] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, value: Any, key: Any) -> None:
        with self._changed:
            self._items[key] = value
            self._changed.notify_all()

    def take(self, key: Any, timeout: float | None = None) -> Any:
        with self._changed:
            self._wait(key, timeout)
            return self._items.pop(key)

    def fetch(self, key: Any) -> Any:
        with self._changed:
            self._wait(key)
            return self._items[key]

    def wait(self, key: Any) -> None:
        with self._changed:
            self._wait(key)

    def isready(self, key: Any = None) -> bool:
        return bool(self._items) if key is None else key in self._items

    def isopen(self) -> bool:
        return not self._closed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, key: Any, timeout: float | None = None) -> None:
        if not self._changed.wait_for(lambda: key in self._items or self._closed, timeout):
            raise TimeoutError(f"no {key!r}")
        if key not in self._items:
            raise KeyError(key)


class Tally(Shelf):
    """Counts what is put, and so needs no key."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: collections.Counter[str] = collections.Counter()

    def put(self, value: Any, key: Any = None) -> None:
        self._counts[value] += 1

    def fetch(self, key: Any) -> int:
        return self._counts[key]


class Marked(Shelf):
    """Counts its living instances."""

    living = 0

    def __init__(self) -> None:
        super().__init__()
        Marked.living += 1

    def __del__(self) -> None:
        Marked.living -= 1


def marks() -> int:
    gc.collect()
    return Marked.living


# --- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "here", "there"])
def channel(request: pytest.FixtureRequest) -> Callable[[int], Any]:
    """Return a maker of channels: within this process, owned by it, owned by a worker."""
    if request.param == "local":
        return Channel
    owner = 1 if request.param == "here" else request.getfixturevalue("pids")[0]
    return lambda size: RemoteChannel(size, owner)


@pytest.fixture(params=["here", "there"])
def remote_channel(request: pytest.FixtureRequest, pids: list[int]) -> Callable[..., RemoteChannel]:
    """Return a maker of remote channels, owned by this process or by a worker."""
    owner = 1 if request.param == "here" else pids[0]
    return lambda factory=None: RemoteChannel(factory, owner)


def blocked(pid: int, f: Callable[..., Any], *args: Any) -> hpcdist.Future:
    """Start `f` on a worker, and return when it waits there: only then does the next call run."""
    call = remotecall(outcome, pid, f, *args)
    remotecall(myid, pid).fetch(timeout=LONG)
    return call


def waiting_here(things: RemoteChannel) -> int:
    """Tell how many wait to take from a channel of this process."""
    return len(hpcdist.channel_from_id(hpcdist.remoteref_id(things))._takers)


# --- what all channels do ------------------------------------------------------------------------


def test_first_in_first_out(channel: Callable[[int], Any]) -> None:
    things = channel(3)
    assert things.isempty()
    assert not things.isready()
    assert things.isopen()
    for i in range(3):
        assert things.put(i) is None
    assert not things.isempty()
    assert things.isready()
    assert [things.take() for _ in range(3)] == [0, 1, 2]
    assert things.isempty()


def test_functions_do_what_the_methods_do(channel: Callable[[int], Any]) -> None:
    things = channel(2)
    assert hpcdist.put(things, "a") is None
    assert hpcdist.isready(things)
    assert hpcdist.fetch(things) == "a"
    hpcdist.wait(things)
    assert hpcdist.take(things) == "a"
    assert hpcdist.isopen(things)
    assert hpcdist.close(things) is None
    assert not hpcdist.isopen(things)


def test_fetch_peeks(channel: Callable[[int], Any]) -> None:
    things = channel(2)
    things.put([1])
    things.put([2])
    assert things.fetch() == things.fetch(timeout=LONG) == [1]
    assert [things.take(), things.take()] == [[1], [2]]


def test_full_means_wait(channel: Callable[[int], Any]) -> None:
    things = channel(1)
    things.put("first")
    for timeout in (0, 0.05):
        with pytest.raises(TimeoutError):
            things.put("given up", timeout=timeout)
    later = in_thread(things.put, "second", timeout=LONG)
    assert things.take(timeout=LONG) == "first"
    later.result(LONG)
    assert things.take(timeout=LONG) == "second"
    assert things.isempty()  # What was given up is not put after all.


@pytest.mark.parametrize("ask", ["take", "fetch", "wait"])
def test_empty_means_wait(ask: str, channel: Callable[[int], Any]) -> None:
    things = channel(1)
    for timeout in (0, 0.05):
        with pytest.raises(TimeoutError):
            getattr(things, ask)(timeout=timeout)
    later = in_thread(getattr(things, ask), timeout=LONG)
    things.put("now", timeout=LONG)
    later.result(LONG)
    assert things.isempty() == (ask == "take")


def test_rendezvous(channel: Callable[[int], Any]) -> None:
    things = channel(0)
    with pytest.raises(TimeoutError):
        things.put("nobody takes it", timeout=0.05)
    with pytest.raises(TimeoutError):
        things.take(timeout=0.05)
    for i in range(20):
        putting = in_thread(things.put, i, timeout=LONG)
        assert things.take(timeout=LONG) == i
        putting.result(LONG)
    for i in range(20):
        taking = in_thread(things.take, timeout=LONG)
        things.put(i, timeout=LONG)
        assert taking.result(LONG) == i


def test_after_close_the_rest_can_be_taken(channel: Callable[[int], Any]) -> None:
    things = channel(3)
    for i in range(2):
        things.put(i)
    assert things.close() is None
    assert things.close() is None
    assert not things.isopen()
    assert things.isready()
    with pytest.raises(ChannelClosed):
        things.put(2)
    assert things.fetch() == 0
    assert [things.take(), things.take()] == [0, 1]
    assert not things.isready()
    for ask in (things.take, things.fetch, things.wait):
        with pytest.raises(ChannelClosed):
            ask()


def test_close_ends_the_waits_of_this_process(channel: Callable[[int], Any]) -> None:
    empty, full = channel(1), channel(1)
    full.put("kept")
    waits = [in_thread(ask) for ask in (empty.take, empty.fetch, empty.wait, empty.take)]
    waits.append(in_thread(full.put, "lost"))
    empty.close()
    full.close()
    for wait in waits:
        assert isinstance(wait.exception(LONG), ChannelClosed)
    assert full.take() == "kept"
    assert not full.isready()


def test_iteration_ends_when_closed_and_drained(channel: Callable[[int], Any]) -> None:
    things = channel(2)

    def feed() -> None:
        for i in range(10):
            things.put(i, timeout=LONG)
        things.close()

    feeding = in_thread(feed)
    assert list(things) == list(range(10))
    feeding.result(LONG)
    assert list(things) == []


def test_nothing_is_lost_or_doubled_among_threads(channel: Callable[[int], Any]) -> None:
    things = channel(4)
    takers = [in_thread(list, things) for _ in range(4)]
    putters = [in_thread(lambda k=k: [things.put(10 * i + k) for i in range(50)]) for k in range(4)]
    for putter in putters:
        putter.result(LONG)
    things.close()
    taken = [taker.result(LONG) for taker in takers]
    assert sorted(chain(*taken)) == sorted(10 * i + k for i in range(50) for k in range(4))


# --- local ones ----------------------------------------------------------------------------------


def test_length_of_a_local_channel() -> None:
    things = Channel(3)
    things.put(1)
    things.put(2)
    assert len(things) == 2


def test_a_local_channel_hands_over_the_thing_itself() -> None:
    things, thing = Channel(1), threading.Lock()
    things.put(thing)
    assert things.take() is thing


def test_the_default_of_a_local_channel_is_a_rendezvous() -> None:
    with pytest.raises(TimeoutError):
        Channel().put(1, timeout=0.02)


def test_a_local_channel_stays_where_it_is(pids: list[int]) -> None:
    for argument in (Channel(1), [Channel(1)]):
        with pytest.raises(TypeError):
            remotecall(identity, pids[0], argument)
    with pytest.raises(RemoteException):
        remotecall_fetch(Channel, pids[0], 1)
    assert remotecall_fetch(myid, pids[0]) == pids[0]


# --- making remote ones --------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [None, 1, Channel], ids=["default", "int", "factory"])
def test_ways_to_make_one(factory: Any, remote_channel: Callable[..., RemoteChannel]) -> None:
    things = remote_channel((lambda: Channel(1)) if factory is Channel else factory)
    things.put("one")
    with pytest.raises(TimeoutError):
        things.put("two", timeout=0.02)
    assert things.take() == "one"


def test_it_is_made_here_by_default() -> None:
    things = RemoteChannel()
    assert remoteref_id(things)[0] == 1
    assert is_held(remoteref_id(things))


def test_errors_at_construction(pids: list[int]) -> None:
    for pid in (1, pids[0]):
        with pytest.raises(ValueError, match="no channel today"):
            RemoteChannel(fails, pid)
    with pytest.raises(ValueError, match="no process with id 99999 exists"):
        RemoteChannel(1, 99999)
    with pytest.raises(ValueError, match="no process with id 99999 exists"):
        RemoteChannel(pid=99999)


def test_ids(pids: list[int]) -> None:
    first, second = RemoteChannel(1, pids[0]), RemoteChannel(1, pids[0])
    assert remoteref_id(first) != remoteref_id(second)
    assert remoteref_id(first)[0] == 1
    assert remotecall_fetch(remoteref_id, pids[1], first) == remoteref_id(first)
    assert remotecall_fetch(identity, pids[1], first) == first
    assert remotecall_fetch(is_held, pids[0], remoteref_id(first))
    assert not remotecall_fetch(is_held, pids[1], remoteref_id(first))
    assert not is_held(remoteref_id(first))


def test_channel_from_id_is_the_owners(pids: list[int]) -> None:
    here = RemoteChannel(2)
    remotecall_fetch(hpcdist.put, pids[0], here, "item")
    assert channel_from_id(remoteref_id(here)).isready()
    shelf = Shelf()
    assert channel_from_id(remoteref_id(keep_alive := RemoteChannel(lambda: shelf))) is shelf
    assert keep_alive.isopen()


# --- between processes ---------------------------------------------------------------------------


def test_all_processes_see_the_same(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    things = remote_channel(10)
    for pid in pids:
        remotecall_fetch(hpcdist.put, pid, things, pid)
    assert remotecall_fetch(hpcdist.isready, pids[1], things)
    assert remotecall_fetch(hpcdist.fetch, pids[2], things) == pids[0]
    assert [remotecall_fetch(hpcdist.take, pid, things) for pid in reversed(pids)] == pids
    remotecall_fetch(hpcdist.close, pids[1], things)
    assert not things.isopen()
    assert not remotecall_fetch(hpcdist.isopen, pids[2], things)


def test_a_number_of_any_size_is_an_item(pids: list[int]) -> None:
    """A small one travels with its control; a large one is more than a link takes at a time."""
    channel = RemoteChannel(2, pids[0])
    for number in (7, 1 << 8_000_000, 2.5):
        channel.put(number)
        assert channel.take(timeout=LONG) == number
        assert remotecall_fetch(hpcdist.put, pids[1], channel, number) is None
        assert remotecall_fetch(hpcdist.take, pids[1], channel) == number


def test_items_of_one_sender_keep_their_order(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    things = remote_channel(16)
    putting = [remotecall(put_all, pid, things, [(pid, i) for i in range(200)]) for pid in pids[1:]]
    taken = [things.take(timeout=LONG) for _ in range(400)]
    for pid, future in zip(pids[1:], putting, strict=True):
        future.fetch(timeout=LONG)
        assert [i for sender, i in taken if sender == pid] == list(range(200))


def test_takers_are_served_in_order_of_arrival(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    things = remote_channel(1)
    takers = []
    for pid in pids:
        takers.append(blocked(pid, things.take))
        # One worker's request may overtake another's: the next one asks when this has arrived.
        eventually(lambda: remotecall_fetch(waiting_here, things.where, things) == len(takers))
    for i, taker in enumerate(takers):
        things.put(i)
        assert taker.fetch(timeout=LONG) == i


def test_several_workers_share_one_channel(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    things = remote_channel(4)
    takers = [remotecall(take_until_closed, pid, things) for pid in pids]
    for i in range(300):
        things.put(i)
    things.close()
    taken = [taker.fetch(timeout=LONG) for taker in takers]
    assert sorted(chain(*taken)) == list(range(300))
    assert all(part == sorted(part) for part in taken)


def test_rendezvous_between_workers(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    things = remote_channel(0)
    putter = blocked(pids[1], things.put, "handed over")
    assert not putter.isready()
    assert remotecall(hpcdist.take, pids[2], things).fetch(timeout=LONG) == "handed over"
    assert putter.fetch(timeout=LONG) is None


def test_close_ends_the_waits_of_all_processes(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    empty, full = remote_channel(1), remote_channel(1)
    full.put("kept")
    waits = [blocked(pid, ask) for pid in pids for ask in (empty.take, empty.fetch, empty.wait)]
    waits += [blocked(pid, full.put, "lost") for pid in pids]
    here = in_thread(empty.take)
    remotecall_fetch(hpcdist.close, pids[1], empty)
    full.close()
    assert {wait.fetch(timeout=LONG) for wait in waits} == {"ChannelClosed"}
    assert isinstance(here.exception(LONG), ChannelClosed)
    assert remotecall_fetch(hpcdist.take, pids[2], full) == "kept"
    assert not full.isready()


def test_arrays_and_unpicklable_items(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    np = pytest.importorskip("numpy")
    things = remote_channel(2)
    array = np.arange(2_000_000.0)
    things.put(array)
    assert remotecall_fetch(hpcdist.take, pids[1], things).sum() == array.sum()
    away = RemoteChannel(1, pids[0])
    away.put(array)
    array += 1  # Whoever has put something away may change his own.
    assert away.take().sum() == array.sum() - array.size
    with pytest.raises((TypeError, pickle.PicklingError)):
        RemoteChannel(2, pids[0]).put(threading.Lock())
    things.put("still open")
    assert things.take() == "still open"


def test_long_items_that_are_no_arrays(pids: list[int]) -> None:
    away = RemoteChannel(1, pids[0])
    for item in ("x" * 100, "x" * 10_000, "x" * 1_000_000, ["y" * 200_000, 1]):
        away.put(item)
        assert away.fetch() == item
        assert away.take() == item


def test_a_channel_may_hold_channels(pids: list[int]) -> None:
    outer = RemoteChannel(1, pids[0])
    outer.put(remotecall_fetch(make_here, pids[1]))
    gc.collect()  # Nobody but the item refers to the inner one now.
    inner = remotecall_fetch(hpcdist.take, pids[2], outer)
    assert inner.take(timeout=LONG) == pids[1]


# --- no item is lost -----------------------------------------------------------------------------


def test_a_taker_that_gives_up_loses_no_item(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    things = remote_channel(1)
    taker = remotecall(take_impatiently, pids[1], things, 100)
    here = in_thread(take_impatiently, things, 100)
    for i in range(200):
        things.put(i, timeout=LONG)
    assert sorted(taker.fetch(timeout=LONG) + here.result(LONG)) == list(range(200))


@pytest.mark.parametrize("known", [True, False], ids=["known dead", "just killed"])
def test_a_taker_that_dies_loses_no_item(
    known: bool, remote_channel: Callable[..., RemoteChannel], fresh: Callable[..., list[int]]
) -> None:
    things = remote_channel(1)
    (victim,) = fresh(1)
    os_pid = remotecall_fetch(os.getpid, victim)
    blocked(victim, things.take)
    kill9(os_pid)
    if known:
        eventually(lambda: victim not in workers())
    things.put("precious", timeout=LONG)
    assert things.take(timeout=LONG) == "precious"
    assert things.isempty()


def test_a_putter_that_dies_is_forgotten(
    remote_channel: Callable[..., RemoteChannel], fresh: Callable[..., list[int]]
) -> None:
    things = remote_channel(1)
    things.put("first")
    (victim,) = fresh(1)
    os_pid = remotecall_fetch(os.getpid, victim)
    blocked(victim, things.put, "of the dead")
    kill9(os_pid)
    eventually(lambda: victim not in workers())
    assert things.take(timeout=LONG) == "first"
    things.put("mine", timeout=LONG)
    # Whether the victim's item still counts, nobody can say; that all goes on, we can.
    assert "mine" in (things.take(timeout=LONG), *([things.take()] if things.isready() else []))


@pytest.fixture
def stuck(pids: list[int], tmp_path: Path) -> Callable[[Callable[[], Any]], hpcdist.Future]:
    """Return what lets something time out while the owner `pids[0]` is stuck in C."""
    flag = tmp_path / "stuck"

    def give_up(operation: Callable[[], Any]) -> hpcdist.Future:
        flag.write_bytes(b"\0")
        holding = remotecall(hold_the_interpreter, pids[0], str(flag), 2.0)
        eventually(lambda: flag.read_bytes() == b"\1")
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            operation()
        assert time.monotonic() - start < 1
        return holding

    return give_up


@pytest.mark.parametrize("operation", ["take", "fetch", "wait"])
def test_a_stuck_owner_holds_nobody_up(
    operation: str, stuck: Callable[..., hpcdist.Future], pids: list[int]
) -> None:
    things = RemoteChannel(2, pids[0])
    holding = stuck(lambda: getattr(things, operation)(timeout=0.2))
    later = remotecall(hpcdist.put, pids[1], things, "later")
    holding.fetch(timeout=LONG)
    later.fetch(timeout=LONG)
    assert things.take(timeout=LONG) == "later"


def test_an_item_that_comes_too_late_is_given_back(
    stuck: Callable[..., hpcdist.Future], pids: list[int]
) -> None:
    things, shelf = RemoteChannel(2, pids[0]), RemoteChannel(Shelf, pids[0])
    things.put("first")
    things.put("second")
    stuck(lambda: things.take(timeout=0.2)).fetch(timeout=LONG)
    eventually(lambda: len(things) == 2)
    assert [things.take(), things.take()] == ["first", "second"]
    shelf.put("apple", "a")
    stuck(lambda: shelf.take("a", timeout=0.2)).fetch(timeout=LONG)
    eventually(lambda: shelf.isready("a"))
    assert shelf.take("a") == "apple"


def test_a_timeout_of_zero_takes_what_is_there(
    remote_channel: Callable[..., RemoteChannel],
) -> None:
    things = remote_channel(1)
    things.put("there")
    assert things.take(timeout=0) == "there"
    with pytest.raises(TimeoutError):
        things.take(timeout=0)


# --- own backings --------------------------------------------------------------------------------


def test_a_remote_dictionary(remote_channel: Callable[..., RemoteChannel], pids: list[int]) -> None:
    shelf = remote_channel(Shelf)
    assert hpcdist.put(shelf, "apple", "a") is None
    shelf.put("banana", "b")
    assert shelf.isready("b")
    assert hpcdist.isready(shelf, "a")
    assert not shelf.isready("c")
    assert hpcdist.fetch(shelf, "b") == "banana"
    assert remotecall_fetch(hpcdist.take, pids[1], shelf, "b") == "banana"
    assert not shelf.isready("b")
    shelf.wait("a")
    hpcdist.wait(shelf, "a")
    assert shelf.take("a") == "apple"
    assert shelf.isopen()
    shelf.close()
    assert not shelf.isopen()


def test_waits_in_an_own_backing_hold_nobody_up(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    shelf = remote_channel(Shelf)
    waiting = blocked(pids[1], shelf.take, "late")
    here = in_thread(shelf.take, "later")
    hpcdist.put(shelf, "pear", "late")
    assert waiting.fetch(timeout=LONG) == "pear"
    remotecall_fetch(hpcdist.put, pids[2], shelf, "plum", "later")
    assert here.result(LONG) == "plum"


def test_a_timeout_is_passed_on_only_if_given(remote_channel: Callable[..., RemoteChannel]) -> None:
    shelf = remote_channel(Shelf)
    with pytest.raises((TimeoutError, RemoteException)) as caught:
        shelf.take("never", timeout=0.05)
    assert isinstance(getattr(caught.value, "cause", caught.value), TimeoutError)
    shelf.put("fig", "f")
    assert shelf.fetch("f") == "fig"  # Shelf.fetch knows no timeout.


def test_errors_of_an_own_backing(
    remote_channel: Callable[..., RemoteChannel], pids: list[int]
) -> None:
    shelf = remote_channel(Shelf)
    shelf.close()
    with pytest.raises(KeyError):
        shelf.take("nothing")
    with pytest.raises(RemoteException):
        remotecall_fetch(hpcdist.take, pids[1], shelf, "nothing")


def test_arguments_pass_through_as_they_are(pids: list[int]) -> None:
    counts = RemoteChannel(Tally, pids[0])
    for word in "a", "b", "a":
        counts.put(word)
    assert counts.fetch("a") == 2


# --- references are counted ----------------------------------------------------------------------


@pytest.fixture
def owner(pids: list[int]) -> Iterator[int]:
    """A worker that owns channels; whatever the workers keep is dropped at the end."""
    yield pids[0]
    for pid in workers():
        remotecall_fetch(keep_none, pid)


def test_the_last_reference_frees(owner: int) -> None:
    things = RemoteChannel(1, owner)
    ref_id = remoteref_id(things)
    assert remotecall_fetch(is_held, owner, ref_id)
    del things
    gc.collect()
    eventually(lambda: not remotecall_fetch(is_held, owner, ref_id))


def test_references_of_others_count(owner: int, pids: list[int]) -> None:
    things = RemoteChannel(1, owner)
    ref_id = remoteref_id(things)
    things.put("kept")
    remotecall_fetch(keep, pids[1], things)
    remotecall_fetch(keep, owner, things)
    del things
    gc.collect()
    for pid in (pids[1], owner):
        # Not to be freed: nothing to wait for, so ask both processes a few times.
        for _ in range(20):
            remotecall_fetch(myid, pids[1])
            assert remotecall_fetch(is_held, owner, ref_id)
        remotecall_fetch(keep_none, pid)
    eventually(lambda: not remotecall_fetch(is_held, owner, ref_id))


def test_references_under_way_count(owner: int, pids: list[int]) -> None:
    for _ in range(30):
        things = RemoteChannel(1, owner)
        things.put("kept")
        taken = remotecall(hpcdist.take, pids[1], things)
        del things  # The call still has to arrive, and then to find the channel.
        assert taken.fetch(timeout=LONG) == "kept"


def test_references_in_items_count(owner: int, pids: list[int]) -> None:
    inner, outer = RemoteChannel(1, owner), RemoteChannel(1, pids[1])
    ref_id = remoteref_id(inner)
    inner.put("kept")
    outer.put(inner)
    del inner
    gc.collect()
    for _ in range(20):
        assert remotecall_fetch(is_held, owner, ref_id)
    assert remotecall_fetch(hpcdist.take, pids[2], outer).take() == "kept"
    gc.collect()
    eventually(lambda: not remotecall_fetch(is_held, owner, ref_id))


def test_references_of_the_dead_do_not_count(owner: int, fresh: Callable[..., list[int]]) -> None:
    (holder,) = fresh(1)
    things = RemoteChannel(1, owner)
    ref_id = remoteref_id(things)
    remotecall_fetch(keep, holder, things)
    del things
    gc.collect()
    assert remotecall_fetch(is_held, owner, ref_id)
    kill9(remotecall_fetch(os.getpid, holder))
    eventually(lambda: not remotecall_fetch(is_held, owner, ref_id))


def test_a_freed_backing_is_let_go(owner: int) -> None:
    shelf = RemoteChannel(Marked, owner)
    assert remotecall_fetch(marks, owner) == 1
    shelf.free()
    eventually(lambda: remotecall_fetch(marks, owner) == 0)


@pytest.mark.parametrize("how", ["free", "with"])
def test_free(how: str, owner: int, pids: list[int]) -> None:
    things = RemoteChannel(1, owner)
    ref_id = remoteref_id(things)
    remotecall_fetch(keep, pids[1], things)
    waiting = blocked(pids[2], things.take)
    if how == "free":
        things.free()
    else:
        with things as entered:
            assert entered is things
    eventually(lambda: not remotecall_fetch(is_held, owner, ref_id))
    for use in (things.take, lambda: things.put(1), things.fetch, things.isready):
        with pytest.raises(HpcdistError):
            use()
    with pytest.raises(RemoteException):
        remotecall(use_kept, pids[1]).fetch(timeout=LONG)
    # Who waits when it is freed does not wait for ever.
    assert waiting.fetch(timeout=LONG) in ("ChannelClosed", "HpcdistError")


def test_with_frees_what_is_here(pids: list[int]) -> None:
    with RemoteChannel(1) as things:
        ref_id = remoteref_id(things)
        things.put(1)
        assert remotecall_fetch(hpcdist.take, pids[0], things) == 1
    assert not is_held(ref_id)
    with pytest.raises(HpcdistError):
        things.put(2)
