"""The file of a checkpoint: its format, its owner, its writer; without a map."""

import errno
import fcntl
import functools
import itertools
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcdist._checkpoints import appending, intake, owner, reading, records, writer
from hpcdist._checkpoints.belonging import Belonging, CheckpointMismatch, Function, describe
from hpcdist._checkpoints.owner import CheckpointInUse
from hpcdist._checkpoints.reading import read_checkpoint, summary
from hpcdist._checkpoints.records import HEAD
from hpcdist._checkpoints.session import Session
from tests.helpers import eventually

SQUARE = Belonging(Function("square"), 1000, False, 7)


class Said(list[str]):
    """What the user was told."""

    def __call__(self, text: str) -> None:
        self.append(text)


def session(path: Path, wanted: Belonging = SQUARE, say: Any = print, seeded: bool = False) -> Any:
    made = Session(str(path), wanted, seeded=seeded, say=say)
    made.begin()
    return made


def filled(path: Path, *batches: tuple[Any, list[Any]], wanted: Belonging = SQUARE) -> Path:
    made = session(path, wanted)
    for names, values in batches:
        made.writer.add(names, values)
    made.end()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.ckpt"


# The format

runs = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 20)), max_size=30)


@given(runs)
def test_runs_come_back(some: list[tuple[int, int]]) -> None:
    assert list(records.unpack_runs(records.pack_runs(some))) == some


@given(st.binary(max_size=40))
def test_any_bytes_are_runs_or_damaged(names: bytes) -> None:
    try:
        list(records.unpack_runs(names))
    except records.Damaged:
        pass


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.binary()),
    lambda inner: st.one_of(st.lists(inner), st.tuples(inner, inner), st.dictionaries(
        st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(values, min_size=1, max_size=5), max_size=12), st.randoms())
def test_what_is_written_in_any_order_is_found(batches: list[list[Any]], random: Any) -> None:
    starts = [0, *itertools.accumulate(map(len, batches))]
    shuffled = [*zip(starts, batches, strict=False)]
    random.shuffle(shuffled)
    with tempfile.TemporaryDirectory() as folder:
        path = filled(Path(folder) / "x", *shuffled)
        assert dict(read_checkpoint(path)) == dict(enumerate(itertools.chain(*batches)))
        assert summary(str(path)).items == starts[-1]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=12))
def test_items_that_were_finished_twice_count_once(some: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        for start, count in some:
            filled(path, (start, [[i] for i in range(start, start + count)]))
        made = session(path, say=Said())
        made.end()
        found = made.found
        names = {i for start, count in some for i in range(start, start + count)}
        assert found.count == len(names)
        assert summary(str(path)).items == len(names)
        seen: dict[int, Any] = {}
        index = 0
        while True:
            finished, gap = found.gap(index)
            if finished:
                seen |= enumerate(found.results(index, finished), index)
                index += finished
            elif gap is None:
                break
            else:
                assert gap > 0
                index += gap
        assert seen == {i: [i] for i in names}


def test_a_file_that_is_cut_off_anywhere_gives_what_is_whole(path: Path) -> None:
    ends = []
    for k in range(6):
        filled(path, (3 * k, [k, [k], {"k": k}]))
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        expected = 3 * sum(end <= size for end in ends)
        assert len(list(read_checkpoint(path))) == expected, size
        said = Said()
        made = session(path, say=said)
        assert made.found.count == expected, size
        made.writer.add(500, [["new"]])
        made.end()
        assert dict(read_checkpoint(path))[500] == ["new"], size
        assert len(list(read_checkpoint(path))) == expected + 1, size
        assert summary(str(path)).torn == 0


def test_damage_in_the_middle_costs_one_record(path: Path) -> None:
    begins = []
    for k in range(5):
        begins.append(path.stat().st_size if path.exists() else 0)
        filled(path, (k, [[k]]))
    whole = bytearray(path.read_bytes())
    for at in range(begins[2], begins[3]):
        damaged = whole.copy()
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        assert sorted(dict(read_checkpoint(path))) == [0, 1, 3, 4], at
    filled(path, (2, [["again"]]))
    assert dict(read_checkpoint(path)) == {0: [0], 1: [1], 2: ["again"], 3: [3], 4: [4]}


def test_a_record_counts_only_where_it_was_written(path: Path) -> None:
    filled(path, (0, [[1]]))
    begin = path.stat().st_size
    filled(path, (1, [[2]]))
    record = path.read_bytes()[begin:]
    with path.open("ab") as file:
        file.write(record)  # a stale block of a disk
    assert len(list(read_checkpoint(path))) == 2


@pytest.mark.parametrize("text", [b"%PDF-1.7\n...", b"hpcdist", b"hpcdist checkpoint 2\n" * 99])
def test_a_file_of_another_program_is_left_alone(path: Path, text: bytes) -> None:
    path.write_bytes(text * 100)
    for use in (session, lambda p: list(read_checkpoint(p)), lambda p: summary(str(p))):
        with pytest.raises(CheckpointMismatch, match="no checkpoint"):
            use(path)
    assert path.read_bytes() == text * 100


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for what in (tmp_path / "pipe", tmp_path):
        with pytest.raises(CheckpointMismatch, match="no regular file"):
            session(what)
    with pytest.raises(FileNotFoundError) as caught:
        session(tmp_path / "gone" / "run.ckpt")
    assert "is not there" in caught.value.__notes__[0]
    assert not (tmp_path / "gone").exists()


def test_an_empty_file_is_a_new_one(path: Path) -> None:
    path.touch()
    assert list(read_checkpoint(path)) == []
    filled(path, (0, [1]))
    assert list(read_checkpoint(path)) == [(0, 1)]


# What it belongs to


def f(x: int) -> int:
    return x


def test_functions_are_told_apart() -> None:
    make: Callable[[Any], Any] = lambda k: lambda x: x + k
    same = [f, make(1), functools.partial(f, 1), abs, numpy.sin, str.upper, "a".join, Said()]
    assert [describe(one) for one in same] == [describe(one) for one in same]
    names = {describe(one).name for one in same}
    assert len(names) == len(same)
    assert describe(make(1)).name != describe(make(2)).name
    assert describe(lambda x: x + 1).code != describe(lambda x: x + 2).code
    assert describe(functools.partial(f, 1)).name != describe(functools.partial(f, 2)).name
    long = functools.partial(f, "x" * 1000)
    assert describe(long).name != describe(functools.partial(f, "x" * 999)).name
    assert len(describe(long).name) < 200


def test_another_map_is_refused_and_both_are_named(path: Path) -> None:
    filled(path, (0, [1]))
    before = path.read_bytes()
    for wanted in (
        replace(SQUARE, function=Function("cube")),
        replace(SQUARE, items=999),
        replace(SQUARE, keyed=True),
    ):
        with pytest.raises(CheckpointMismatch) as caught:
            session(path, wanted)
        assert str(SQUARE) in str(caught.value)
        assert str(wanted) in str(caught.value)
        assert (caught.value.found, caught.value.wanted) == (str(SQUARE), str(wanted))
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.path) == (str(caught.value), str(path))
    with pytest.raises(CheckpointMismatch, match="seed=8"):
        session(path, replace(SQUARE, seed=8), seeded=True)
    assert path.read_bytes() == before


def test_a_changed_function_is_told_and_a_changed_lambda_is_another(path: Path) -> None:
    python = SQUARE.python
    filled(path, (0, [1]), wanted=replace(SQUARE, function=Function("f", "", "1")))
    said = Said()
    session(path, replace(SQUARE, function=Function("f", "", "2")), said).end()
    assert "1 of 1000 items are finished" in said[0]
    assert "f was changed since" in said[0]
    path.unlink()
    filled(path, (0, [1]), wanted=replace(SQUARE, function=Function("<lambda>", "x:1", "1")))
    other = replace(SQUARE, function=Function("<lambda>", "x:9", "2"))
    with pytest.raises(CheckpointMismatch, match=r"\(x:1\).*\(x:9\)"):
        session(path, other)
    session(path, replace(other, python=python + "x"), Said()).end()  # nobody can tell


def test_the_seed_of_the_file_goes_on(path: Path) -> None:
    filled(path, (0, [1]))
    assert Session(str(path), replace(SQUARE, seed=1), seeded=False, say=print).seed == 7


# The owner


def child(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


HOLD = """
import sys
from hpcdist._checkpoints.session import Session
from hpcdist._checkpoints.belonging import Belonging, Function
made = Session(sys.argv[1], Belonging(Function("square"), 1000, False, 7), seeded=False, say=print)
made.begin()
print("mine", flush=True)
sys.stdin.readline()
"""


TEAR = """
import os, sys
from hpcdist._checkpoints.belonging import Belonging, Function
from hpcdist._checkpoints.session import Session
made = Session(sys.argv[1], Belonging(Function("square"), 1000, False, 7), seeded=False, say=print)
made.begin()
first = made.found.count
made.writer.add(first, [[first] * 1000])
pwrite = os.pwrite
def torn(fd, data, offset):
    if offset > 512 and len(data) > 4000 and first < len(data):
        pwrite(fd, data[: first * 150], offset)
        os.kill(os.getpid(), 9)
    return pwrite(fd, data, offset)
made.end()
made.begin()
os.pwrite = torn
made.writer.add(first + 1, [[first] * 3000])
made.end()
"""


def test_a_driver_that_is_killed_within_a_write(path: Path) -> None:
    """A part of the record is in the file, and a longer one the next time."""
    for k in range(20):
        with child(TEAR, str(path)) as process:
            assert process.wait() == -9
        assert dict(read_checkpoint(path)) == {i: [i] * 1000 for i in range(k + 1)}
    assert summary(str(path)).torn > 0


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    with child(HOLD, str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_two_drivers_on_one_file(path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(CheckpointInUse) as caught:
        session(path)
    host = os.uname().nodename
    assert f"process {holder.pid} on {host}" in str(caught.value)
    assert (caught.value.host, caught.value.pid) == (host, holder.pid)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.host, again.pid) == (host, holder.pid)
    holder.kill()
    holder.wait()
    session(path, say=Said()).end()


def test_a_killed_owner_whom_nobody_has_waited_for_is_gone(
    path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    eventually(lambda: Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2][1] == "Z")
    session(path, say=Said()).end()


def test_a_child_of_a_dead_owner_that_keeps_its_lock_is_in_nobodys_way(path: Path) -> None:
    code = HOLD.replace(
        "sys.stdin", "import os, signal\nif os.fork(): os.kill(os.getpid(), 9)\nsys.stdin"
    )
    with child(code, str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        process.wait()
        with path.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        session(path, say=Said()).end()
        assert process.stdin is not None
        process.stdin.close()  # and the child ends
        process.stdin = None


def test_two_maps_of_one_process(path: Path) -> None:
    first = session(path)
    with pytest.raises(CheckpointInUse, match="another map of this process"):
        session(path)
    first.end()
    session(path).end()


def elsewhere(**more: Any) -> owner.Owner:
    return owner.Owner("node7", 4711, "another boot", 1, "t", time=time.time(), **more)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system as Lustre's without its option flock."""

    def flock(fd: int, what: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(owner, "_SETTLE", 0.1)


def test_an_owner_elsewhere_lives_by_its_beat(path: Path, no_locks: None) -> None:
    filled(path, (0, [1]))
    fd = owner.open_file(str(path))
    stop = threading.Event()

    def live() -> None:
        for beat in itertools.count():
            owner.write_owner(fd, elsewhere(beat=beat))
            if stop.wait(0.2):
                return

    owner.write_owner(fd, elsewhere())
    thread = threading.Thread(target=live)
    thread.start()
    said = Said()
    try:
        with pytest.raises(CheckpointInUse, match="process 4711 on node7"):
            session(path, say=said)
    finally:
        stop.set()
        thread.join()
        os.close(fd)
    assert "last written by process 4711 on node7" in said[0]


def test_an_owner_elsewhere_whose_beat_stands_still_is_gone(
    path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "_STILL", 0.5)
    filled(path, (0, [1]))
    fd = owner.open_file(str(path))
    owner.write_owner(fd, elsewhere())
    os.close(fd)
    said = Said()
    session(path, say=said).end()
    assert "1 of 1000 items are finished" in said[1]


def test_an_owner_elsewhere_of_long_ago_is_not_waited_for(path: Path, no_locks: None) -> None:
    filled(path, (0, [1]))
    fd = owner.open_file(str(path))
    owner.write_owner(fd, replace(elsewhere(), time=time.time() - 3600))
    os.close(fd)
    said = Said()
    session(path, say=said).end()
    assert len(said) == 1


def test_without_locks_the_one_that_writes_last_wins(path: Path, no_locks: None) -> None:
    """Both have seen that nobody owns the file, and one writes its name after the other."""
    fd = owner.open_file(str(path), make=True)
    me = owner.this_process()

    def other_writes_meanwhile(text: int) -> None:
        threading.Timer(0.05, owner.write_owner, [fd, elsewhere()]).start()
        return None

    with pytest.raises(CheckpointInUse, match="process 4711 on node7"):
        owner.claim(fd, str(path), me, say=print, lock=other_writes_meanwhile)
    os.close(fd)


def test_a_file_that_was_taken_over_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BEAT_EVERY", 0.1)
    made = session(path)
    made.writer.add(0, [1])
    fd = owner.open_file(str(path))
    other = elsewhere()
    owner.write_owner(fd, other)

    def refused() -> bool:
        try:
            made.writer.add(1, [2])
        except CheckpointInUse:
            return True
        return False

    eventually(refused)
    made.end()
    assert owner.read_owner(fd) == other, "it is the other's"
    os.close(fd)


# The writer


def test_what_can_be_changed_is_kept_as_it_was(path: Path) -> None:
    made = session(path)
    results = [[1], [2]]
    made.writer.add(0, results)
    results[0].append("changed")
    made.end()
    assert dict(read_checkpoint(path)) == {0: [1], 1: [2]}


def test_it_can_be_read_while_it_grows(path: Path) -> None:
    made = session(path)
    made.writer.add(0, [0])
    eventually(lambda: dict(read_checkpoint(path)) == {0: 0})
    reader = read_checkpoint(path)
    assert next(reader) == (0, 0)
    made.writer.add(1, [1])
    eventually(lambda: len(list(read_checkpoint(path))) == 2)
    assert list(reader) == [(1, 1)]
    made.end()


def test_a_full_disk_is_told_once_and_the_rest_is_kept_when_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appending, "_TRY_EVERY", 0.05)
    full = threading.Event()
    pwrite = os.pwrite

    def short(fd: int, data: Any, offset: int) -> int:
        if full.is_set() and offset >= HEAD:
            if len(data) < 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(fd, data[:9], offset)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", short)
    said = Said()
    made = session(path, say=said)
    made.writer.add(0, [[0]])
    eventually(lambda: len(list(read_checkpoint(path))) == 1)
    full.set()
    for k in range(1, 5):
        made.writer.add(k, [[k]])
        time.sleep(0.01)
    eventually(lambda: bool(said))
    made.writer.add(5, [[5]])
    assert dict(read_checkpoint(path)) == {0: [0]}
    full.clear()
    eventually(lambda: len(list(read_checkpoint(path))) == 6)
    made.end()
    assert dict(read_checkpoint(path)) == {k: [k] for k in range(6)}
    assert len(said) == 1
    assert "No space left on device. The map goes on" in said[0]


def test_what_still_fits_on_a_full_disk_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def limited(fd: int, data: Any, offset: int) -> int:
        room = 1_000_000 - offset
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data[:room], offset)

    monkeypatch.setattr(os, "pwrite", limited)
    said = Said()
    made = session(path, say=said)
    for k in range(300):
        made.writer.add(k, [bytes([k % 251]) * 10_000])
    made.end()
    assert len(said) == 1
    kept = dict(read_checkpoint(path))
    assert len(kept) > 60
    assert all(value == bytes([k % 251]) * 10_000 for k, value in kept.items())
    assert path.stat().st_size <= 1_000_000


def test_a_disk_that_refuses_what_was_written_gets_it_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does: the write succeeds, the sync says that the disk is full."""
    monkeypatch.setattr(appending, "_TRY_EVERY", 0.05)
    monkeypatch.setattr(appending, "_SYNC_EVERY", 0.05)
    refusals = iter([True, True])

    def fdatasync(fd: int) -> None:
        if next(refusals, False):
            os.ftruncate(fd, HEAD)  # all that was not stored is gone
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    said = Said()
    made = session(path, say=said)
    made.writer.add(0, [[0]])
    eventually(lambda: bool(said))
    made.writer.add(1, [[1]])
    made.end()
    assert "Disk quota exceeded" in said[0]
    assert len(said) == 1


def test_a_file_that_is_removed_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BEAT_EVERY", 0.05)
    said = Said()
    made = session(path, say=said)
    path.unlink()
    eventually(lambda: bool(said))
    made.end()
    assert "no longer safe" in said[0]
    assert not path.exists()


def test_a_slow_disk_lets_the_map_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "WAITING_MOST", 1000)
    monkeypatch.setattr(writer, "_HURRY", 100)
    free = threading.Event()
    pwrite = os.pwrite

    def slow(fd: int, data: Any, offset: int) -> int:
        if offset > HEAD:
            assert free.wait(30)
        return pwrite(fd, data, offset)

    made = session(path)
    monkeypatch.setattr(os, "pwrite", slow)
    made.writer.add(0, [b"x" * 900])
    added = threading.Event()

    def add() -> None:
        for k in range(1, 10):
            made.writer.add(k, [b"x" * 900])
        added.set()

    thread = threading.Thread(target=add)
    thread.start()
    eventually(lambda: made.writer._intake.waiting > 1000)
    assert not added.is_set()
    free.set()
    thread.join(30)
    made.end()
    assert len(list(read_checkpoint(path))) == 10


def test_a_result_that_cannot_be_kept_is_told_once_and_its_neighbours_are_kept(path: Path) -> None:
    said = Said()
    made = session(path, say=said)
    made.writer.add(0, [[1], threading.Lock(), [3], threading.Lock()])
    made.end()
    assert dict(read_checkpoint(path)) == {0: [1], 2: [3]}
    assert len(said) == 1
    assert "the result of item 1 cannot be kept" in said[0]


def test_a_child_of_the_driver_does_not_give_its_file_up(path: Path) -> None:
    made = session(path)
    pid = os.fork()
    if pid == 0:
        made.end()
        os._exit(0)
    os.waitpid(pid, 0)
    made.writer.add(0, [1])
    made.end()
    assert dict(read_checkpoint(path)) == {0: 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda k: k,
        float,
        lambda k: (k, k / 7),
        lambda k: numpy.float64(k / 7),
        lambda k: f"item {k}",
        lambda k: {"loss": k / 7, "steps": [k, k + 1]},
    ],
    ids=["int", "float", "tuple", "numpy", "text", "dict"],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_small_results_take_little_more_than_their_own_bytes(
    path: Path, make: Callable[[int], Any], size: int
) -> None:
    results = [make(k) for k in range(20_000)]
    made = session(path, replace(SQUARE, items=len(results)))
    for k in sorted(range(0, len(results), size), key=lambda k: k ^ 3 * size):
        made.writer.add(k, results[k : k + size])
    made.end()
    own = sum(len(pickle.dumps(result)) for result in results)
    assert path.stat().st_size <= 1.3 * own
    assert [value for _, value in sorted(read_checkpoint(path))] == results


def test_a_key_that_cannot_be_pickled_is_told_and_others_are_kept(path: Path) -> None:
    said = Said()
    made = session(path, replace(SQUARE, keyed=True), said)
    made.writer.add([threading.Lock()], [1])
    eventually(lambda: bool(said))
    made.writer.add(["b"], [2])
    made.end()
    assert dict(read_checkpoint(path)) == {"b": 2}
    assert len(said) == 1
    assert "cannot pickle" in said[0]
    assert "no longer safe" in said[0]
    session(path, replace(SQUARE, keyed=True), Said()).end()


def test_keys(path: Path) -> None:
    keyed = replace(SQUARE, keyed=True, items=3)
    filled(path, (["a", ("b", 1)], [1, [2]]), (["c"], [3]), wanted=keyed)
    assert dict(read_checkpoint(path)) == {"a": 1, ("b", 1): [2], "c": 3}
    assert summary(str(path)).items == 3
    made = session(path, replace(keyed, items=5), Said())
    made.end()
    entry = made.found.entry(("b", 1))
    assert entry is not None
    assert made.found.result(entry) == [2]
    assert made.found.entry("d") is None


def test_results_of_records_that_were_let_go_are_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_KEPT_BYTES", 100)
    for k in range(9):
        filled(path, (k, [bytes([k]) * 60]))
    made = session(path, say=Said())
    made.end()
    for k in (*range(9), *range(9)):
        assert made.found.results(k, 1) == [bytes([k]) * 60]
    assert len(made.found._kept) <= 2
