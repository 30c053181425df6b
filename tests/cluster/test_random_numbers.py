"""`rng()`: numbers of an item depend on the map's seed and the item's index alone."""

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcdist
from hpcdist import (
    CachingPool,
    Executor,
    WorkerPool,
    distributed,
    imap,
    imap_unordered,
    pmap,
    remotecall_fetch,
    rng,
    spmd,
)
from tests.helpers import kill9

pytestmark = pytest.mark.any_mpi

N = 200


def draw(_: Any = None) -> int:
    return int(rng().integers(1 << 60))


def expected(n: int = N, seed: int = 7) -> list[int]:
    """What numpy's own `spawn` gives: the rule that is documented."""
    children = np.random.SeedSequence(seed).spawn(n)
    return [int(np.random.default_rng(child).integers(1 << 60)) for child in children]


async def draw_later(_: Any = None) -> int:
    await asyncio.sleep(0)
    return draw()


def with_executor(**how: Any) -> list[int]:
    with Executor(how.pop("pool", None)) as executor:
        return list(executor.map(how.pop("f", draw), range(N), seed=7, **how))


WAYS: dict[str, Callable[[], list[int]]] = {
    "pmap": lambda: pmap(draw, range(N), seed=7),
    "a lambda": lambda: pmap(lambda _: draw(), range(N), seed=7),
    "one worker": lambda: pmap(draw, range(N), seed=7, pool=WorkerPool(hpcdist.workers()[:1])),
    "here": lambda: pmap(draw, range(N), seed=7, distributed=False),
    "process 1 too": lambda: pmap(draw, range(N), seed=7, pool=WorkerPool(hpcdist.procs())),
    "batches": lambda: pmap(draw, range(N), seed=7, batch_size=7),
    "one by one": lambda: pmap(draw, range(N), seed=7, batch_size=1),
    "an iterator": lambda: pmap(draw, iter(range(N)), seed=7),
    "two collections": lambda: pmap(lambda _, __: draw(), range(N), range(N), seed=7),
    "imap": lambda: list(imap(draw, range(N), seed=7)),
    "coroutines": lambda: pmap(draw_later, range(N), seed=7),
    "hidden coroutines": lambda: pmap(lambda _: draw_later(), range(N), seed=7),
    "Executor.map": with_executor,
    "chunks": lambda: with_executor(chunksize=9),
    "coroutines of an executor": lambda: with_executor(f=draw_later),
    "a loop": lambda: distributed(range(N), lambda a, b: a + b, seed=7)(lambda _: [draw()]),
    "a loop over a list": lambda: distributed([0] * N, lambda a, b: a + b, seed=7)(
        lambda _: [draw()]
    ),
    "a loop over an array": lambda: distributed(np.arange(N), lambda a, b: a + b, seed=7)(
        lambda _: [draw()]
    ),
    "a loop over a deque": lambda: distributed(deque(range(N)), lambda a, b: a + b, seed=7)(
        lambda _: [draw()]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_numbers_in_every_way(pids: list[int], way: str) -> None:
    assert WAYS[way]() == expected()


def test_unordered_results_have_the_numbers_of_their_items(pids: list[int]) -> None:
    got = dict(imap_unordered(lambda i: (i, draw()), range(N), seed=7))
    assert [got[i] for i in range(N)] == expected()


def test_a_loop_without_result(pids: list[int], tmp_path: Path) -> None:
    folder = str(tmp_path)

    def body(i: int) -> None:
        Path(folder, str(i)).write_text(str(draw()))

    distributed(range(20), seed=7)(body).wait()
    assert [int((tmp_path / str(i)).read_text()) for i in range(20)] == expected(20)


def test_an_item_has_one_stream(pids: list[int]) -> None:
    """A second `rng()` goes on where the first one is."""
    got = pmap(lambda _: [draw(), draw(), rng() is rng()], range(5), seed=7)
    children = [np.random.default_rng(c) for c in np.random.SeedSequence(7).spawn(5)]
    assert got == [[*map(int, g.integers(1 << 60, size=2)), True] for g in children]


def test_slow_items_that_are_handed_back(pids: list[int]) -> None:
    """Items that move from a worker that is held up to others keep their numbers."""

    def item(i: int) -> int:
        time.sleep(0.05 if i % 50 == 3 else 0.0001)
        return draw()

    assert pmap(item, range(N), seed=7) == expected()


def test_items_that_are_tried_again(pids: list[int], tmp_path: Path) -> None:
    folder = str(tmp_path)

    def item(i: int) -> int:
        drawn = draw()
        if i % 10 == 4:
            try:
                os.mkdir(f"{folder}/{i}")
            except FileExistsError:
                return drawn
            raise ValueError(i)
        return drawn

    assert pmap(item, range(N), seed=7, retry_delays=[0, 0]) == expected()
    assert len(list(tmp_path.iterdir())) == N // 10


def test_items_that_run_again_after_a_death(
    fresh: Callable[..., list[int]], tmp_path: Path
) -> None:
    pool = WorkerPool(fresh(2))
    folder = str(tmp_path)

    def item(i: int) -> int:
        drawn = draw()
        if i == 57:
            try:
                os.mkdir(f"{folder}/{i}")
            except FileExistsError:
                return drawn
            kill9(os.getpid())
        return drawn

    assert pmap(item, range(N), seed=7, pool=pool) == expected()
    assert len(pool) == 1


def test_an_error_handler_has_the_numbers_of_its_item(pids: list[int]) -> None:
    assert pmap(lambda i: 1 // 0, range(20), seed=7, on_error=draw) == expected(20)


def test_a_map_inside_an_item_has_its_own(pids: list[int]) -> None:
    def item(i: int) -> Any:
        first = rng()
        inner = pmap(draw, range(4), seed=100 + i)
        here = pmap(draw, range(4), seed=100 + i, distributed=False)
        return inner == here, inner, first is rng()

    got = pmap(item, range(3), seed=7, batch_size=1)
    assert got == [(True, expected(4, 100 + i), True) for i in range(3)]


def test_a_pool_that_keeps_functions_takes_each_seed(pids: list[int]) -> None:
    pool = CachingPool(pids)
    for seed in (1, 2, 1):
        assert pmap(draw, range(20), pool=pool, seed=seed) == expected(20, seed)


@pytest.mark.parametrize("run", [imap, imap_unordered])
def test_the_seed_that_was_drawn_is_in_the_handle(pids: list[int], run: Any) -> None:
    results = run(draw, range(20))
    again = run(draw, range(20), seed=results.seed)
    assert sorted(results) == sorted(again)
    assert run(draw, range(20)).seed != results.seed


def test_numbers_are_fresh_without_a_seed(pids: list[int]) -> None:
    plain = [remotecall_fetch(draw, pids[0]) for _ in range(20)]
    with Executor() as executor:
        tasks = list(executor.map(draw, range(20)))
    loop = distributed(range(20), lambda a, b: a + b)(lambda _: [draw()])
    drawn = [*plain, *tasks, *loop, *pmap(draw, range(20)), draw(), draw()]
    assert len(set(drawn)) == len(drawn)


def test_a_call_after_a_map_is_fresh(pids: list[int]) -> None:
    pool = WorkerPool(pids[:1])
    mapped = pmap(draw, range(3), pool=pool, seed=7)
    assert remotecall_fetch(draw, pids[0]) not in mapped


def test_ranks_of_a_section(pids: list[int]) -> None:
    assert spmd(draw, pids=pids, seed=7) == expected(len(pids))
    assert spmd.submit(draw_later, pids=pids, seed=7).fetch() == expected(len(pids))
    assert spmd(draw, pids=pids) != spmd(draw, pids=pids)


def test_a_part_has_the_stream_of_its_first_item(pids: list[int]) -> None:
    got = distributed(range(9), lambda a, b: a + b, chunked=True, seed=7)(lambda _: [draw()])
    assert got == [expected(9)[k] for k in (0, 3, 6)]


class Walked(np.ndarray[Any, Any]):
    """An array that gives its items by a generator, as those with units do."""

    def __iter__(self) -> Any:
        return (self[k] for k in range(len(self)))


def test_an_array_that_walks_by_itself(pids: list[int]) -> None:
    items = np.arange(9).view(Walked)
    assert distributed(items, lambda a, b: a + b, seed=7)(lambda _: [draw()]) == expected(9)
    with pytest.raises(ZeroDivisionError) as caught:
        distributed(items, max)(lambda k: 1 // (4 - int(k)))
    assert caught.value.index == 4  # type: ignore[attr-defined]


def test_what_is_no_seed(pids: list[int]) -> None:
    for run in (
        lambda seed: pmap(draw, range(3), seed=seed),
        lambda seed: imap(draw, range(3), seed=seed),
        lambda seed: distributed(range(3), max, seed=seed)(draw),
        lambda seed: spmd(draw, seed=seed),
        lambda seed: Executor().map(draw, range(3), seed=seed),
    ):
        with pytest.raises(TypeError, match=r"seed is a whole number, not 1\.5"):
            run(1.5)
        with pytest.raises(ValueError, match="seed is 0 or more, not -1"):
            run(-1)


def test_the_statistics(pids: list[int]) -> None:
    """Means of many streams spread as those of independent numbers do."""
    means = np.array(pmap(lambda _: rng().random(100).mean(), range(2000), seed=7))
    spread = means.std() / (1 / 12 / 100) ** 0.5
    assert abs(means.mean() - 0.5) < 4 * (1 / 12 / 200_000) ** 0.5
    assert 0.93 < spread < 1.07
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1


COROUTINES_HERE = """
import asyncio
from hpcdist import *
async def draw(_):
    await asyncio.sleep(0)
    return int(rng().integers(1 << 60))
print(pmap(draw, range(20), seed=7))
"""


def test_coroutines_on_process_1(script: Callable[..., Any]) -> None:
    done = script(COROUTINES_HERE)
    assert done.rc == 0, done.err
    assert done.out.strip() == str(expected(20))


WITHOUT_NUMPY = """
import sys
from hpcdist import *
sys.modules["numpy"] = None
addprocs(2)
everywhere("import sys; sys.modules['numpy'] = None")
draw = lambda _=None: rng().getrandbits(60)
one = pmap(draw, range(20), seed=7)
assert one == pmap(draw, range(20), seed=7, batch_size=3) == pmap(draw, range(20), seed=7,
    distributed=False)
assert len(set(one)) == 20 and one != pmap(draw, range(20), seed=8)
print(remotecall_fetch(lambda: type(rng()).__module__, 2), fetchany(draw) != fetchany(draw))
"""


def test_without_numpy(script: Callable[..., Any]) -> None:
    done = script(WITHOUT_NUMPY)
    assert done.rc == 0, done.err
    assert done.out.split() == ["random", "True"]


TOLD = """
from hpcdist import *
addprocs(2)
draw = lambda _: rng().integers(1000).item()
pmap(abs, range(20), progress=True)
pmap(draw, range(20), progress=True, seed=5)
one = pmap(draw, range(20), progress=True)
import sys
sys.stderr.flush()
print(one)
two = pmap(draw, range(20), progress=True, distributed=False)
print(two)
"""


def test_a_map_that_shows_progress_tells_the_seed_it_drew(script: Callable[..., Any]) -> None:
    """But not one that was given it, or that drew no random numbers."""
    done = script(TOLD)
    assert done.rc == 0, done.err
    seeds = [int(line.split("seed=")[1]) for line in done.err.splitlines() if "seed=" in line]
    assert len(seeds) == 2, done.err
    for line, seed in zip(done.out.splitlines(), seeds, strict=True):
        children = np.random.SeedSequence(seed).spawn(20)
        drawn = [np.random.default_rng(c).integers(1000).item() for c in children]
        assert line == str(drawn)
