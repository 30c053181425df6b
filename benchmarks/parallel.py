"""The parallel layer, measured: maps, loops, trees and values on four workers.

The floor of a row is what stands beside it in the same run: `multiprocessing`, a raw MPI operation,
or the same work done in one process.
"""

import multiprocessing
import operator
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

from benchmarks import floor
from benchmarks.statistics import Pair, best_third, median

ITEMS = 10_000
MANY = 1_000_000
LENGTH = 8_000_000  # float64: 64 MB
SMALL = 1_000_000  # 8 MB

nothing = lambda x: None


def bare(x: int) -> None:
    """The same for `multiprocessing`, which finds functions by name."""


def timed(work: Callable[[], object]) -> float:
    """Time one call."""
    start = perf_counter()
    work()
    return perf_counter() - start


def maps(hpcdist: Any, rounds: Callable[[int], range]) -> dict[str, Pair]:
    """`pmap` of no-ops, against `multiprocessing.Pool.map`; a large closure; many calls."""
    auto, single, calls, closure = [], [], [], []
    large = b"x" * (16 << 20)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(bare, range(ITEMS))
        hpcdist.pmap(nothing, range(ITEMS))
        for _ in rounds(18):
            raw = timed(lambda: pool.map(bare, range(ITEMS)))
            ours = timed(lambda: hpcdist.pmap(nothing, range(ITEMS)))
            auto.append(Pair(ITEMS / ours / 1e6, ITEMS / raw / 1e6))
        for _ in rounds(9):
            raw = timed(lambda: pool.map(bare, range(ITEMS), chunksize=1))
            ours = timed(lambda: hpcdist.pmap(nothing, range(ITEMS), batch_size=1))
            single.append(Pair(ITEMS / ours / 1e3, ITEMS / raw / 1e3))
        for _ in rounds(18):
            ours = timed(lambda: burst(hpcdist))
            calls.append(Pair(1000 / ours / 1e3, 0.0))
        for k in rounds(5):
            tagged = large + bytes([k])  # a new one each time: it is sent once to each worker
            ours = timed(lambda data=tagged: hpcdist.pmap(lambda i: len(data), range(200)))
            closure.append(Pair(ours * 1e3, 0.0))
    return {
        "checkpoint": best_third(checkpoints(hpcdist, rounds)),
        "auto": best_third(auto, more_is_better=True),
        "single": best_third(single, more_is_better=True),
        "calls": best_third(calls, more_is_better=True),
        "closure": best_third(closure),
    }


def checkpoints(hpcdist: Any, rounds: Callable[[int], range]) -> list[Pair]:
    """`pmap` of a million no-ops that keeps its results in a file, against one that does not."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for k in rounds(9):
            file = os.path.join(folder, f"{k}.ckpt")
            without = timed(lambda: hpcdist.pmap(nothing, range(MANY)))
            kept = timed(lambda file=file: hpcdist.pmap(nothing, range(MANY), checkpoint=file))
            pairs.append(Pair(kept * 1e3, without * 1e3))
            os.unlink(file)
    return pairs


def burst(hpcdist: Any) -> None:
    """A thousand calls, round robin, and then all of their results."""
    pids = hpcdist.workers()
    futures = [hpcdist.remotecall(nothing, pids[k % len(pids)], k) for k in range(1000)]
    for future in futures:
        future.fetch()


def ranks(hpcdist: Any, rounds: Callable[[int], range]) -> dict[str, Pair]:
    """Tasks of four ranks that meet at one barrier, on eight workers; by a map, too."""
    submitted, mapped = [], []
    submit, count = hpcdist.spmd.submit, 500
    for _ in rounds(9):
        ours = timed(lambda: [f.fetch() for f in [submit(meet, k, ranks=4) for k in range(count)]])
        submitted.append(Pair(count / ours, 0.0))
        ours = timed(lambda: hpcdist.pmap(meet, range(count), ranks=4))
        mapped.append(Pair(count / ours, 0.0))
    return {
        "submit": best_third(submitted, more_is_better=True),
        "map": best_third(mapped, more_is_better=True),
    }


def habits(hpcdist: Any, rounds: Callable[[int], range]) -> dict[str, Pair]:
    """`Pool.map` of no-ops, against `multiprocessing`'s; methods of an object, against calls."""
    mapped, asked = [], []
    count, calls = 10 * ITEMS, 200
    with multiprocessing.get_context("fork").Pool(4) as raw, hpcdist.Pool(4) as ours:
        raw.map(bare, range(count))
        ours.map(nothing, range(count))
        for _ in rounds(9):
            theirs = timed(lambda: raw.map(bare, range(count)))
            mapped.append(
                Pair(
                    count / timed(lambda: ours.map(nothing, range(count))) / 1e6,
                    count / theirs / 1e6,
                )
            )
    pid = hpcdist.workers()[0]
    call, method = hpcdist.remotecall_fetch, hpcdist.RemoteObject(list, pid).count
    for _ in rounds(18):
        plain = timed(lambda: [call(nothing, pid, k) for k in range(calls)])
        asked.append(
            Pair(
                timed(lambda: [method(k) for k in range(calls)]) / calls * 1e6, plain / calls * 1e6
            )
        )
    return {"pool": best_third(mapped, more_is_better=True), "object": best_third(asked)}


def meet(k: int) -> int:
    """Meet the other ranks of a task once."""
    import hpcdist

    hpcdist.comm().Barrier()
    return k


def loops(hpcdist: Any, rounds: Callable[[int], range]) -> dict[str, Pair]:
    """The latency of small loops and of `everywhere`, against the bare messages and additions."""
    found: dict[str, list[float]] = {"loop": [], "everywhere": []}
    raw: dict[str, list[float]] = {"loop": [], "everywhere": []}
    body = lambda i: i
    for _ in rounds(6):
        raw["loop"] += floor_of_all(hpcdist, 1000)
        raw["everywhere"] += floor_of_all(hpcdist, 0)
        for _ in rounds(100):
            found["loop"].append(
                timed(lambda: hpcdist.distributed(range(1000), operator.add)(body))
            )
            found["everywhere"].append(timed(lambda: hpcdist.everywhere("1")))
    return {k: Pair(median(times) * 1e6, median(raw[k]) * 1e6) for k, times in found.items()}


def floor_of_all(hpcdist: Any, items: int) -> list[float]:
    """Time one rank's messages to all others, the items added up there, and the answers.

    By addprocs process 1 has no rank: one of the workers takes its place, and three are left.
    """
    outside = hpcdist.remotecall_fetch(floor.open_world, hpcdist.workers()[0]) == 0
    root, *others = hpcdist.workers() if outside else hpcdist.procs()
    count = 100
    ranks = hpcdist.everywhere.call(floor.open_world, pids=[root, *others])
    answering = [hpcdist.remotecall(floor.add_up, p, ranks[root], count) for p in others]
    args = [ranks[p] for p in others], items // len(others), count
    times = hpcdist.remotecall_fetch(floor.ask_all, root, *args)
    for future in answering:
        future.fetch()
    return times


def values(hpcdist: Any, rounds: Callable[[int], range]) -> dict[str, Pair]:
    """64 MB on all workers, against MPI_Bcast; the sum of 8 MB arrays."""
    import numpy

    array = numpy.arange(LENGTH, dtype=float)
    casts, sums = [], []
    for _ in rounds(9):
        raw = max(hpcdist.spmd(raw_bcast))
        start = perf_counter()
        value = hpcdist.bcast(array)
        ours = perf_counter() - start
        value.free()
        casts.append(Pair(ours * 1e3, raw * 1e3))
        raw = max(hpcdist.spmd(raw_reduce))
        ours = timed(lambda: hpcdist.reduce(operator.add, eight_megabytes))
        sums.append(Pair(ours * 1e3, raw * 1e3))
    return {"bcast": best_third(casts), "sum": best_third(sums)}


def raw_bcast() -> float:
    """MPI's own broadcast of 64 MB between the workers."""
    import numpy

    import hpcdist

    comm, array = hpcdist.comm(), numpy.empty(LENGTH)
    comm.Bcast(array)
    comm.Barrier()
    return timed(lambda: (comm.Bcast(array), comm.Barrier()))


def raw_reduce() -> float:
    """MPI's own sum of 8 MB arrays."""
    import numpy

    import hpcdist

    comm, array, total = hpcdist.comm(), numpy.ones(SMALL), numpy.empty(SMALL)
    comm.Reduce(array, total)
    comm.Barrier()
    return timed(lambda: (comm.Reduce(array, total), comm.Barrier()))


def eight_megabytes() -> Any:
    """What each worker adds to the sum."""
    import numpy

    return numpy.ones(SMALL)


def speedups(hpcdist: Any, rounds: Callable[[int], range]) -> dict[str, Pair]:
    """How many times quicker than one process: π, and sixty decompositions.

    The floor is two bare forked processes with half of the work each. All use one thread.
    """
    import numpy

    strips = 3_000_000
    term = lambda i: 4.0 / (1.0 + ((i + 0.5) / strips) ** 2) / strips
    matrices = [numpy.random.default_rng(k).normal(size=(300, 300)) for k in range(60)]
    largest = lambda m: float(numpy.linalg.svd(m, compute_uv=False)[0])
    pi, svd = [], []
    for _ in rounds(9):
        alone = timed(lambda: sum(map(term, range(strips))))
        raw = timed(lambda: in_halves(lambda half: sum(map(term, half)), range(strips)))
        ours = timed(lambda: hpcdist.distributed(range(strips), operator.add)(term))
        pi.append(Pair(alone / ours, alone / raw))
        alone = timed(lambda: [largest(m) for m in matrices])
        raw = timed(lambda: in_halves(lambda half: [largest(m) for m in half], matrices))
        ours = timed(lambda: hpcdist.pmap(largest, matrices))
        svd.append(Pair(alone / ours, alone / raw))
    return {
        "pi": best_third(pi, more_is_better=True),
        "svd": best_third(svd, more_is_better=True),
    }


def in_halves(work: Callable[[Any], object], items: Any) -> None:
    """Do work on both halves of a sequence at once, in a forked child and here."""
    middle = len(items) // 2
    child = os.fork()
    if not child:
        try:
            work(items[:middle])
        finally:
            os._exit(0)
    work(items[middle:])
    os.waitpid(child, 0)


def death(hpcdist: Any) -> dict[str, Pair]:
    """A map of 200 items of 5 ms on four workers, one of which is killed in its middle."""
    import time

    victim = next(s for s in hpcdist.status() if s.pid == hpcdist.workers()[-1])
    killer = threading.Timer(0.1, lambda: os.kill(victim.os_pid, signal.SIGKILL))

    def item(i: int) -> int:
        time.sleep(0.005)
        return i

    killer.start()
    taken = timed(lambda: hpcdist.pmap(item, range(200)))
    killer.join()
    assert hpcdist.pmap(item, range(8)) == list(range(8))
    return {"death": Pair(taken, 0.25)}


def spread(hpcdist: Any, rounds: Callable[[int], range]) -> dict[str, Pair]:
    """What `everywhere` costs: messages that process 1 sends, and time."""
    for _ in range(5):
        hpcdist.everywhere("1")
    sent = messages_of(lambda: hpcdist.everywhere("1"))
    times = [timed(lambda: hpcdist.everywhere("1")) for _ in rounds(60)]
    return {"messages": Pair(sent, 0.0), "time": Pair(median(times) * 1e3, 0.0)}


def messages_of(work: Callable[[], object]) -> int:
    """Count the messages that this process sends while it works."""
    from hpcdist._transport.router import Peer

    sent = []
    post, dispatch = Peer.post, Peer.dispatch

    def counted(how: Any) -> Any:
        def send(peer: Any, *message: Any) -> None:
            sent.append(peer.pid)
            how(peer, *message)

        return send

    Peer.post, Peer.dispatch = counted(post), counted(dispatch)
    try:
        work()
    finally:
        Peer.post, Peer.dispatch = post, dispatch
    return len(sent)
