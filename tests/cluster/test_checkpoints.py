"""`checkpoint=` of maps: what is finished stays finished, whatever becomes of the driver."""

import functools
import itertools
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

import hpcdist
from hpcdist import CheckpointMismatch, imap, imap_unordered, pmap, read_checkpoint, rng
from tests.helpers import eventually, kill9, patient

pytestmark = [pytest.mark.any_mpi, pytest.mark.usefixtures("pids")]

N = 200
SQUARES = [k * k for k in range(N)]
Map = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.ckpt"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    made = tmp_path / "log"
    made.touch()
    return made


def square(log: Path, k: int) -> int:
    """Square, and note that it ran; a file named `fail` says which item fails."""
    with log.open("a") as file:
        file.write(f"{k}\n")
    failing = log.with_name("fail")
    if failing.exists() and int(failing.read_text()) == k:
        raise ValueError(f"item {k}")
    return k * k


class Square:
    """The same as an object whose `repr` says what it is."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, k: int) -> int:
        return square(self.log, k)

    def __repr__(self) -> str:
        return "Square()"


def runs(log: Path) -> Counter[int]:
    return Counter(map(int, log.read_text().split()))


def listed(results: Iterator[int]) -> list[int]:
    return list(results)


WAYS: dict[str, Map] = {
    "pmap": pmap,
    "imap": lambda *args, **kw: listed(imap(*args, **kw)),
    "imap_unordered": lambda *args, **kw: sorted(imap_unordered(*args, **kw)),
    "here": lambda *args, **kw: pmap(*args, distributed=False, **kw),
    "an iterator": lambda f, xs, **kw: pmap(f, iter(xs), **kw),
    "an iterator in order": lambda f, xs, **kw: listed(imap(f, iter(xs), **kw)),
    "keys": lambda f, xs, **kw: pmap(f, xs, key=lambda k: f"item {k}", **kw),
    "keys in order": lambda f, xs, **kw: listed(imap(f, iter(xs), key=str, **kw)),
    "keys unordered": lambda f, xs, **kw: sorted(imap_unordered(f, iter(xs), key=str, **kw)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [0, 77, N - 1])
def test_what_is_finished_does_not_run_again(
    way: str, at: int, path: Path, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, f = WAYS[way], Square(log)
    log.with_name("fail").write_text(str(at))
    with pytest.raises(ValueError, match=f"item {at}"):
        run(f, range(N), checkpoint=path, batch_size=3)
    kept = len(dict(read_checkpoint(path)))
    assert capfd.readouterr().err == ""
    log.with_name("fail").unlink()
    assert run(f, range(N), checkpoint=str(path)) == SQUARES
    assert runs(log) == Counter(dict.fromkeys(range(N), 1)) + Counter([at])
    said = capfd.readouterr().err
    of = "" if "iterator" in way or way in ("keys in order", "keys unordered") else f" of {N}"
    told = f"hpcdist: {path}: {kept}{of} items are finished and do not run again\n"
    assert said == (told if kept else "")
    assert run(f, range(N), checkpoint=path) == SQUARES
    assert runs(log).total() == N + 1
    assert f": {N}{of} items are finished" in capfd.readouterr().err


def test_items_that_are_finished_here_and_there(path: Path, log: Path) -> None:
    f = Square(log)
    for some in (range(50, 60), [3], range(190, 200), range(120, 150)):
        assert pmap(f, some, checkpoint=path, key=int) == [k * k for k in some]
    before = path.read_bytes()
    for run in (pmap, WAYS["imap"], WAYS["imap_unordered"], WAYS["here"]):
        assert run(f, range(N), checkpoint=path, key=int) == SQUARES
        path.write_bytes(before)
    found = {*range(50, 60), 3, *range(190, 200), *range(120, 150)}
    assert runs(log) == Counter({k: 1 if k in found else 4 for k in range(N)})


def test_an_endless_map_goes_on_where_it_was(path: Path, log: Path) -> None:
    f = Square(log)
    for _ in range(3):
        results = imap(f, itertools.count(), checkpoint=path)
        assert [next(results) for _ in range(30)] == SQUARES[:30]
        results.close()
    assert len(runs(log)) < 10_000
    assert all(runs(log)[k] == 1 for k in range(30))


def test_another_function_or_number_of_items_is_refused_at_the_call(path: Path, log: Path) -> None:
    pmap(abs, range(5), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointMismatch, match=r"builtins.abs over 5 items.*over 6 items"):
        pmap(abs, range(6), checkpoint=path)
    with pytest.raises(CheckpointMismatch, match="Square"):
        imap(Square(log), range(5), checkpoint=path)
    with pytest.raises(CheckpointMismatch, match="with keys"):
        imap_unordered(abs, range(5), checkpoint=path, key=str)
    pmap(abs, iter(range(5)), checkpoint=path.with_name("unsized"))
    with pytest.raises(CheckpointMismatch, match="it holds item 4, and this one has 3 items"):
        pmap(abs, range(3), checkpoint=path.with_name("unsized"))
    assert path.read_bytes() == before
    assert runs(log).total() == 0


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"checkpoint": 3}, "checkpoint is the name of a file"),
        ({"checkpoint": b"x"}, "checkpoint is the name of a file"),
        ({"checkpoint": "x", "key": 3}, "key is a function"),
        ({"key": str}, "key= names the items of a checkpoint"),
        ({"check_point": "x"}, "did you mean 'checkpoint'"),
    ],
)
def test_nonsense(how: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        pmap(abs, range(3), **how)
    with pytest.raises((TypeError, ValueError), match=error):
        imap(abs, range(3), **how)


def test_keys_that_are_none(path: Path) -> None:
    with pytest.raises(ValueError, match="items 1 and 3 have the same key, '1'"):
        pmap(abs, [0, 1, -2, -1], checkpoint=path, key=lambda k: str(abs(k)))
    with pytest.raises(TypeError, match=r"the key of item 0 cannot be one: \[0\] is not hashable"):
        pmap(abs, [0, 1], checkpoint=path, key=lambda k: [k])
    with pytest.raises(ZeroDivisionError):
        pmap(abs, [1, 0], checkpoint=path, key=lambda k: 1 // k)


def test_a_key_of_several_collections_gets_all(path: Path) -> None:
    assert pmap(pow, [2, 3], [4, 5], checkpoint=path, key=lambda item: item) == [16, 243]
    assert dict(read_checkpoint(path)) == {(2, 4): 16, (3, 5): 243}


def draw(_: int) -> float:
    return float(rng().random())


def draw_until(stop: Path, k: int) -> float:
    if k == 50 and stop.exists():
        raise ValueError
    return draw(k)


def test_random_numbers_go_on_as_if_nothing_had_happened(path: Path, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    stop.touch()
    f = functools.partial(draw_until, stop)
    with pytest.raises(ValueError):
        pmap(f, range(100), checkpoint=path, batch_size=2)
    stop.unlink()
    results = imap(f, range(100), checkpoint=path)
    seed = results.seed
    assert list(results) == pmap(draw, range(100), seed=seed)
    with pytest.raises(CheckpointMismatch, match=f"with seed={seed}"):
        pmap(f, range(100), checkpoint=path, seed=seed + 1)
    assert pmap(f, range(100), checkpoint=path, seed=seed) == pmap(draw, range(100), seed=seed)


@pytest.mark.parametrize("way", [imap, imap_unordered])
def test_what_has_arrived_is_kept_while_the_program_is_elsewhere(
    way: Map, path: Path, tmp_path: Path
) -> None:
    """Between two `next` nothing files results: yet they are kept."""
    go = tmp_path / "go"

    def f(k: int) -> list[int]:
        while k and not go.exists():
            time.sleep(0.001)
        return [k]

    results = way(f, range(100), checkpoint=path, batch_size=1)
    assert next(results) == [0]
    go.touch()
    eventually(lambda: len(list(read_checkpoint(path))) > 1)
    assert sorted([[0], *results]) == [[k] for k in range(100)]
    assert sorted(read_checkpoint(path)) == [(k, [k]) for k in range(100)]


class Held:
    """A function some of whose items wait for a file; it notes what ran."""

    def __init__(self, folder: Path, held: tuple[int, ...], make: Callable[[int], Any]) -> None:
        self.folder = folder
        self.held = held
        self.make = make

    def __call__(self, k: int) -> Any:
        with self.folder.joinpath("log").open("a") as file:
            file.write(f"{k}\n")
        while k in self.held and not self.folder.joinpath(f"go{k}").exists():
            time.sleep(0.001)
        return self.make(k)

    def let(self, k: int) -> None:
        self.folder.joinpath(f"go{k}").touch()


MADE: dict[str, Callable[[int], Any]] = {
    "numbers": lambda k: k,
    "arrays": lambda k: numpy.full(10_000, k).tolist() if k % 2 else numpy.full(10_000, k),
    "of the script": lambda k: Result(k),
}


class Result:
    """What an item may return."""

    def __init__(self, k: int) -> None:
        self.k = k


def kept(path: Path) -> list[Any]:
    return sorted(k for k, _ in read_checkpoint(path))


@pytest.mark.parametrize(
    ("made", "how"),
    [("numbers", {}), ("arrays", {"batch_size": 1}), ("of the script", {"key": str})],
)
def test_what_is_finished_is_kept_while_the_next_item_of_the_batch_runs(
    made: str, how: dict[str, Any], path: Path, tmp_path: Path, pids: list[int]
) -> None:
    pool = hpcdist.WorkerPool(pids[:1])
    f = Held(tmp_path, (39,), MADE[made])
    with ThreadPoolExecutor(1) as beside:
        results = beside.submit(pmap, f, range(40), pool=pool, checkpoint=path, **how)
        try:
            eventually(lambda: (path.exists() and len(kept(path)) == 39) or results.done())
            assert not results.done()
        finally:
            f.let(39)
        assert len(results.result()) == 40
    assert kept(path) == sorted(map(str, range(40)) if "key" in how else range(40))
    assert runs(tmp_path / "log") == Counter(range(40))
    again = pmap(f, range(40), pool=pool, checkpoint=path, **how)
    numbers = [value.k if made == "of the script" else numpy.max(value) for value in again]
    assert numbers == [*range(40)]
    assert runs(tmp_path / "log") == Counter(range(40))


def test_a_batch_that_goes_on_is_kept_while_the_program_is_elsewhere(
    path: Path, tmp_path: Path, pids: list[int]
) -> None:
    """Nothing files what comes between two `next`; each result is in the file once."""
    f = Held(tmp_path, (20, 39), abs)
    pool = hpcdist.WorkerPool(pids[:1])
    results = imap(f, range(40), pool=pool, batch_size=40, checkpoint=path)
    assert next(results) == 0
    eventually(lambda: kept(path) == [*range(20)])
    f.let(20)
    eventually(lambda: kept(path) == [*range(39)])
    f.let(39)
    eventually(lambda: kept(path) == [*range(40)])
    assert [0, *results] == [*range(40)]
    assert kept(path) == [*range(40)]
    assert runs(tmp_path / "log") == Counter(range(40))


def test_what_was_kept_does_not_run_again_when_its_worker_dies(
    path: Path, tmp_path: Path, fresh: Any
) -> None:
    first, second = fresh(2)
    os_pid = hpcdist.remotecall_fetch(os.getpid, first)
    pool = hpcdist.WorkerPool([first])
    f = Held(tmp_path, (39,), abs)
    with ThreadPoolExecutor(1) as beside:
        results = beside.submit(pmap, f, range(40), pool=pool, checkpoint=path)
        try:
            eventually(lambda: (path.exists() and len(kept(path)) == 39) or results.done())
            pool.push(second)
        finally:
            kill9(os_pid)
        eventually(lambda: runs(tmp_path / "log")[39] == 2 or results.done())
        f.let(39)
        assert results.result() == [*range(40)]
    assert runs(tmp_path / "log") == Counter([*range(40), 39])
    assert kept(path) == [*range(40)]


def test_what_a_program_does_to_its_results_is_not_kept(path: Path) -> None:
    for value in imap(lambda k: {"k": k}, range(50), checkpoint=path):
        value["k"] = "changed"
    assert dict(read_checkpoint(path)) == {k: {"k": k} for k in range(50)}


def test_a_map_over_a_map_that_is_not_closed_is_in_use(path: Path) -> None:
    results = imap(abs, range(1000), checkpoint=path)
    next(results)
    with pytest.raises(hpcdist.HpcdistError, match=f"process {os.getpid()} on"):
        pmap(abs, range(1000), checkpoint=path)
    results.close()
    assert pmap(abs, range(1000), checkpoint=path) == [*range(1000)]


def test_a_worker_that_dies_costs_what_it_ran(path: Path, log: Path, fresh: Any) -> None:
    pool = hpcdist.WorkerPool(fresh(2))
    killed = log.with_name("killed")

    def f(k: int) -> int:
        if k == 50 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), 9)
        return k

    assert pmap(f, range(100), checkpoint=path, pool=pool) == [*range(100)]
    assert dict(read_checkpoint(path)) == {k: k for k in range(100)}


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpcdist", "checkpoint", *args],
        capture_output=True,
        text=True,
        timeout=patient(50),
        check=False,
    )


def test_the_command_line_shows_what_is_in_a_file(path: Path) -> None:
    results = imap(square_of_float, range(9), checkpoint=path)
    list(results)
    done = command(str(path))
    assert done.returncode == 0, done.stderr
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert shown["map"] == f"{__name__}.square_of_float over 9 items"
    assert shown["finished"] == "9 of 9 items"
    assert shown["size"] == f"{path.stat().st_size:,} bytes"
    assert len(shown["first"]) == len(shown["last"]) == len("2026-11-29 14:02:11")
    assert list(shown) == ["map", "finished", "size", "first", "last"]


def test_the_command_line_names_the_writer(path: Path) -> None:
    results = imap(square_of_float, itertools.count(), checkpoint=path)
    next(results)
    shown = command(str(path)).stdout
    assert f"writer    process {os.getpid()} on {os.uname().nodename}, last heard of 20" in shown
    results.close()


def test_the_command_line_refuses_other_files(path: Path) -> None:
    path.write_text("something else\n")
    done = command(str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{path} is no checkpoint" in done.stderr
    done = command(str(path) + "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "No such file or directory" in done.stderr


def square_of_float(k: int) -> float:
    return float(k * k)


# Drivers that are killed

DRIVER = """
import sys, time
import hpcdist

def f(k):
    time.sleep(0.001 if k % 10 else 0.01)
    return k, bytes([k % 251]) * size

path, size = sys.argv[1], int(sys.argv[2])
hpcdist.addprocs(2)
print("begins", flush=True)
for _ in hpcdist.imap_unordered(f, range(10**6), checkpoint=path):
    pass
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [10, 30_000], ids=["small", "large"])
def test_a_driver_that_is_killed_loses_nothing_that_was_kept(
    size: int, path: Path, tmp_path: Path
) -> None:
    """The moments are chosen by how much the file holds."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    before: dict[int, Any] = {}
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, str(driver), str(path), str(size)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begins\n"
            held = path.stat().st_size if path.exists() else 0
            more = random.randint(1, 60 * (size + 10))
            eventually(lambda: path.exists() and path.stat().st_size > held + more, 60)  # noqa: B023
            seen = dict(read_checkpoint(path))
            kill9(process.pid)
        kept = dict(read_checkpoint(path))
        assert before.keys() <= seen.keys() <= kept.keys()
        assert all(value == (k, bytes([k % 251]) * size) for k, value in kept.items())
        before = kept


def test_two_drivers_on_one_file(path: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    with subprocess.Popen(
        [sys.executable, str(driver), str(path), "10"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        eventually(lambda: path.exists() and len(list(read_checkpoint(path))) > 0)
        done = subprocess.run(
            [sys.executable, str(driver), str(path), "10"],
            capture_output=True,
            text=True,
            timeout=patient(50),
            check=False,
        )
        kill9(process.pid)
    assert done.returncode == 1
    assert f"is in use: process {process.pid} on {os.uname().nodename} writes it" in done.stderr
