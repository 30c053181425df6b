"""Functions of a map that are large: they go to the workers of a host by shared memory, once."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    RemoteException,
    imap_unordered,
    myid,
    pmap,
    remotecall,
    remotecall_fetch,
    workers,
)
from hpcdist._collective import shared_memory
from hpcdist._collective.shared_memory import Segments, _is_free
from tests.helpers import eventually, kill9

LARGE = 1 << 20


@pytest.fixture(autouse=True)
def all_memory_is_free_again() -> Any:
    yield
    eventually(lambda: all(_is_free(s) for s in Segments.here()._pool.values()))


def meet(folder: Path, count: int) -> None:
    """Wait on a worker until so many have come: under load one may run all items of a map."""
    (folder / str(myid())).touch()
    while len(list(folder.iterdir())) < count:
        time.sleep(0.002)


def where(_: Any) -> int:
    time.sleep(0.02)
    return myid()


def test_captured_bytes_text_and_arrays(pids: list[int], tmp_path: Path) -> None:
    data, text, array = os.urandom(LARGE), "\xe4\u20ac" * LARGE, np.arange(LARGE)
    number = bytearray(data)

    def look(k: int) -> tuple[int, Any]:
        meet(tmp_path, len(pids))
        seen = data[k], text[k], int(array[k]), number[k], len(text), int(array.sum())
        return myid(), seen

    found = pmap(look, range(12), batch_size=1)
    expected = [(data[k], text[k], k, data[k], 2 * LARGE, int(array.sum())) for k in range(12)]
    assert [seen for _, seen in found] == expected
    assert {pid for pid, _ in found} == set(pids)


def test_an_array_is_each_workers_own(pids: list[int], tmp_path: Path) -> None:
    array = np.zeros(LARGE)

    def add(_: int) -> tuple[int, float]:
        meet(tmp_path, len(pids))
        array[:] += 1  # kept from item to item, and not seen by others
        return myid(), float(array[-1])

    last: dict[int, float] = {}
    for pid, value in imap_unordered(add, range(12), batch_size=1):
        last[pid] = max(value, last.get(pid, 0))
    assert sum(last.values()) == 12
    assert set(last) == set(pids)
    assert not array.any()


def test_the_function_as_it_was_when_the_map_began(pids: list[int]) -> None:
    array = np.zeros(LARGE)
    results = imap_unordered(lambda _: (time.sleep(0.02), float(array.sum()))[1], range(30))
    first = next(results)
    array[:] = 1.0
    assert {first, *results} == {0.0}


def test_globals_come_along(pids: list[int]) -> None:
    import __main__

    __main__.hd_large = b"y" * LARGE  # type: ignore[attr-defined]
    f = eval("lambda k: hd_large[k]", vars(__main__))
    try:
        assert pmap(f, range(4)) == [ord("y")] * 4
        __main__.hd_large = b"z" * LARGE  # type: ignore[attr-defined]
        assert pmap(f, range(4)) == [ord("z")] * 4
        # A call of it finds the present value, too.
        __main__.hd_large = b"q" * LARGE  # type: ignore[attr-defined]
        assert remotecall_fetch(f, pids[0], 1) == ord("q")
    finally:
        del __main__.hd_large  # type: ignore[attr-defined]


def test_references_inside(pids: list[int]) -> None:
    channel = hpcdist.RemoteChannel(lambda: hpcdist.Channel(20))
    data = b"x" * LARGE
    pmap(lambda k: channel.put(len(data) + k), range(10))
    assert sorted(channel.take() - LARGE for _ in range(10)) == list(range(10))


def test_memory_that_cannot_be_opened(pids: list[int]) -> None:
    """Another container's, say: the function is sent."""

    def shut(pid: int, closed: bool) -> None:
        from hpcdist._collective import shared_memory

        class Shut:
            def __init__(self, place: Any) -> None:
                raise OSError("not from here")

        if closed:
            shared_memory._hd_open = shared_memory._Mapping  # type: ignore[attr-defined]
            shared_memory._Mapping = Shut  # type: ignore[assignment,misc]
            shared_memory.Mappings.here().unmap(1)
        else:
            shared_memory._Mapping = shared_memory._hd_open  # type: ignore[attr-defined]

    data = os.urandom(LARGE)
    for pid in pids[:2]:
        remotecall_fetch(shut, pid, pid, True)
    try:
        for pid in pids:
            found = pmap(lambda k: (myid(), data[k]), range(10), pool=hpcdist.WorkerPool([pid]))
            assert found == [(pid, byte) for byte in data[:10]]
    finally:
        for pid in pids[:2]:
            remotecall_fetch(shut, pid, pid, False)


def test_no_descriptor_left_for_shared_memory(pids: list[int], monkeypatch: Any) -> None:
    def none_left(size: int) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Segments.here(), "lend", none_left)
    data = b"x" * LARGE
    assert pmap(lambda k: len(data) + k, range(6)) == [LARGE + k for k in range(6)]


def test_a_forgotten_map_is_collected_at_any_moment(pids: list[int]) -> None:
    """Also while the pool's lock is held: its end must not want that."""
    data = b"x" * LARGE

    class Holder:
        pass

    holder = Holder()
    holder.results = imap_unordered(lambda k: data[k], range(1000))  # type: ignore[attr-defined]
    next(holder.results)  # type: ignore[attr-defined]
    holder.me = holder  # type: ignore[attr-defined]
    gc.disable()
    del holder
    ended = threading.Event()

    def collect() -> None:
        with Segments.here()._lock:
            gc.collect()
        ended.set()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    gc.enable()
    assert ended.wait(30)
    thread.join()


def test_ctrl_c_while_it_is_written(pids: list[int], monkeypatch: Any) -> None:
    """What was begun is given back, even if the error is kept, and the next map runs."""
    real, made = memoryview, itertools.count()

    def view(thing: Any) -> memoryview:
        if next(made) == 2:  # the segment is open, and one part is written
            raise KeyboardInterrupt
        return real(thing)

    data = b"x" * LARGE
    with monkeypatch.context() as patch:
        patch.setattr(shared_memory, "memoryview", view, raising=False)
        with pytest.raises(KeyboardInterrupt) as kept:
            pmap(lambda k: data[k], range(4))
    assert pmap(lambda k: data[k], range(4)) == [ord("x")] * 4
    eventually(lambda: not any(s.kept for s in Segments.here()._pool.values()))
    del kept


def test_a_busy_worker_holds_no_memory_of_maps_that_are_over(pids: list[int]) -> None:
    """What it was told and has not begun to read is taken back."""
    busy = remotecall(time.sleep, pids[0], 3)
    data = b"x" * LARGE
    for _ in range(5):
        assert pmap(lambda k: data[k], range(20)) == [ord("x")] * 20
    eventually(lambda: all(_is_free(s) for s in Segments.here()._pool.values()))
    assert not busy.done()
    busy.fetch()


def test_the_memory_goes_back_after_a_while(pids: list[int], monkeypatch: Any) -> None:
    monkeypatch.setattr(shared_memory, "_FREE_FOR", 0.0)
    data = b"x" * LARGE
    assert pmap(lambda k: len(data), range(3)) == [LARGE] * 3
    eventually(lambda: not Segments.here()._pool)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may hide /proc")
def test_a_worker_that_cannot_see_our_memory(fresh: Callable[..., list[int]]) -> None:
    """Nothing of ours is replaced: it has a /proc of its own, in which we are not."""
    mine = fresh(2)
    remotecall_fetch(hide_proc, mine[0])
    assert remotecall_fetch(os.path.exists, mine[0], f"/proc/{os.getpid()}/fd") is False
    data, array = os.urandom(LARGE), np.zeros(LARGE)
    for pid in mine:
        look = lambda k: (myid(), data[k], float(array[k]))
        found = pmap(look, range(10), pool=hpcdist.WorkerPool([pid]))
        assert found == [(pid, byte, 0.0) for byte in data[:10]]


def hide_proc() -> None:
    import ctypes
    import subprocess

    new_mounts = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", "/proc"], check=True)


class Unwanted:
    """Cannot be unpickled on a worker."""

    def __reduce__(self) -> Any:
        return refuse, (os.getpid(),)


def refuse(maker: int) -> Unwanted:
    if os.getpid() != maker:
        raise ValueError("not on a worker")
    return Unwanted()


def test_what_cannot_be_unpickled_is_the_maps_error(pids: list[int]) -> None:
    data, unwanted = b"x" * LARGE, Unwanted()
    with pytest.raises(RemoteException, match="not on a worker"):
        pmap(lambda k: (data[k], unwanted), range(4))


def test_a_map_that_ends_at_once(pids: list[int]) -> None:
    """Who has not begun to read when the map is over, reads nothing, and says so."""
    data = b"x" * LARGE
    for _ in range(20):
        assert next(imap_unordered(lambda k: data[k], range(100))) == ord("x")
    assert pmap(lambda k: len(data), range(3)) == [LARGE] * 3


def test_a_worker_dies_in_the_middle(fresh: Callable[..., list[int]]) -> None:
    mine = fresh(2)
    doomed = remotecall_fetch(os.getpid, mine[0])
    pool = hpcdist.WorkerPool(mine)
    data = b"x" * LARGE
    results = imap_unordered(lambda k: (where(k), data[k]), range(40), pool=pool, batch_size=1)
    seen = [next(results)]
    kill9(doomed)
    seen += results
    assert [byte for _, byte in seen] == [ord("x")] * 40
    assert mine[0] not in workers()


def test_a_caching_pool_is_told_once(pids: list[int]) -> None:
    pool = hpcdist.CachingPool(pids)
    data = b"x" * LARGE
    f = lambda k: (where(k), data[k])
    for _ in range(3):
        assert {byte for _, byte in pmap(f, range(12), pool=pool)} == {ord("x")}
    hpcdist.clear(pool)
