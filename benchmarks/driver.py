"""The measured programs: `python -m benchmarks.driver SCENARIO SCALE`.

Each prints one line that starts with MARK: a JSON object of key to [value, floor].
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from time import perf_counter, sleep
from typing import Any

from benchmarks import clients, floor, idle, parallel
from benchmarks.statistics import Pair, best_third, median, quantile
from tests.helpers import mpi_environment, mpiexec

MARK = "figures: "
LENGTH = 64 * 1024 * 1024 // 8  # of the array: 64 MB of float64
OUTSTANDING = 20_000
SPREAD = (2, 8, 32, 64)

noop = lambda: None
echo = lambda x: x

Figures = dict[str, Pair]


def rounds(count: int) -> range:
    """So many, fewer with --quick."""
    return range(max(3, round(count * SCALE)))


def in_world() -> Any:
    """Open the floor's communicator, then the package; only rank 0 comes back."""
    floor.open_world()
    import hpcdist

    hpcdist.init()
    return hpcdist


def outside(workers: int) -> Any:
    """Start workers, and open the floor between them."""
    import hpcdist

    pids = hpcdist.addprocs(workers)
    hpcdist.everywhere.call(floor.open_world, pids=pids)
    return hpcdist


def time_calls(pid: int, count: int) -> list[float]:
    """Time no-op calls from this process to another."""
    from hpcdist import remotecall_fetch

    f, times = noop, []
    for _ in range(count):
        start = perf_counter()
        remotecall_fetch(f, pid)
        times.append(perf_counter() - start)
    return times


def floor_to(pid: int, count: int, timed: Callable[..., Any], other: Callable[..., Any]) -> float:
    """Run the two sides of a floor, rank 0 being this process; return the middle time."""
    from hpcdist import remotecall

    there = remotecall(other, pid, 0, count)
    times = timed(pid - 1, count)
    there.fetch()
    return median(times)


def floor_between(a: int, b: int, timed: Any, other: Any, *args: int) -> float:
    """Run the two sides of a floor on two workers; return the middle time."""
    from hpcdist import remotecall

    ranks = {p: remotecall(floor.open_world, p).fetch() for p in (a, b)}
    there = remotecall(other, b, ranks[a], *args)
    here = remotecall(timed, a, ranks[b], *args)
    there.fetch()
    return median(here.fetch())


def both(samples: Sequence[tuple[list[float], float]]) -> Figures:
    """Make p50 and p99 of rounds of times and their floors."""
    return {
        "p50": best_third([Pair(median(t) * 1e6, f * 1e6) for t, f in samples]),
        "p99": best_third([Pair(quantile(t, 0.99) * 1e6, f * 1e6) for t, f in samples]),
    }


def calls() -> Figures:
    """Calls, and what is made of calls, from rank 0 to rank 1."""
    hpcdist = in_world()
    time_calls(2, 500)
    samples, outstanding, channel = [], [], []
    with hpcdist.RemoteChannel(1, 2) as rc:
        for _ in rounds(15):
            raw = floor_to(2, 2000, floor.ask, floor.answer)
            samples.append((time_calls(2, 2000), raw))
            outstanding.append(Pair(time_outstanding(hpcdist) * 1e6, raw * 1e6))
            channel.append(Pair(median(time_channel(rc, 1000)) * 1e6, raw * 1e6))
    return {
        **both(samples),
        "outstanding": best_third(outstanding),
        "channel": best_third(channel),
    }


def time_outstanding(hpcdist: Any) -> float:
    """Time each of many calls that are all made before the first is fetched."""
    remotecall, f = hpcdist.remotecall, noop
    start = perf_counter()
    futures = [remotecall(f, 2) for _ in range(OUTSTANDING)]
    for future in futures:
        future.fetch()
    return (perf_counter() - start) / OUTSTANDING


def time_channel(rc: Any, count: int) -> list[float]:
    """Time pairs of a put and a take on a channel that lives elsewhere."""
    times = []
    for _ in range(count):
        start = perf_counter()
        rc.put(1)
        rc.take()
        times.append(perf_counter() - start)
    return times


def between() -> Figures:
    """Calls from one worker to another."""
    hpcdist = in_world()
    samples = []
    for _ in rounds(15):
        raw = floor_between(2, 3, floor.ask, floor.answer, 2000)
        samples.append((hpcdist.remotecall_fetch(time_calls, 2, 3, 2000), raw))
    return both(samples)


def time_echo(hpcdist: Any) -> float:
    """Time the array's way to worker 2 and back; the middle of a few."""
    import numpy as np

    array, f, times = np.ones(LENGTH), echo, []
    for _ in range(5):
        start = perf_counter()
        back = hpcdist.remotecall_fetch(f, 2, array)
        times.append(perf_counter() - start)
    assert back[-1] == 1.0
    return median(times)


def bandwidth(seconds: float) -> float:
    """GB/s of an array that went there and back."""
    return 2 * LENGTH * 8 / seconds / 1e9


def echo_inside() -> Figures:
    """A large array from rank 0 to rank 1 and back."""
    hpcdist = in_world()
    pairs = []
    for _ in rounds(9):
        there = hpcdist.remotecall(floor.return_array, 2, 0, LENGTH, 5)
        raw = median(floor.send_array(1, LENGTH, 5))
        there.fetch()
        pairs.append(Pair(bandwidth(time_echo(hpcdist)), bandwidth(raw)))
    return {"echo": best_third(pairs, more_is_better=True)}


def outside_calls() -> Figures:
    """Calls from a process outside the world, over a socket."""
    hpcdist = outside(2)
    workers = [w.os_pid for w in hpcdist.status() if w.pid != 1]
    time_calls(2, 500)
    rss = max(map(idle.rss_mb, workers))
    samples, pairs = [], []
    for _ in rounds(15):
        raw = floor_between(2, 3, floor.ask, floor.answer, 2000)
        samples.append((time_calls(2, 2000), raw))
    for _ in rounds(9):
        raw = floor_between(2, 3, floor.send_array, floor.return_array, LENGTH, 5)
        pairs.append(Pair(bandwidth(time_echo(hpcdist)), bandwidth(raw)))
    return {
        **both(samples),
        "echo": best_third(pairs, more_is_better=True),
        "rss": Pair(rss, bare_rss()),
    }


def bare_rss() -> float:
    """The memory of a process that has initialised MPI and nothing else."""
    # One write each: two ranks must not print into each other's line.
    code = (
        "from mpi4py import MPI; from benchmarks.idle import *; "
        "os.write(1, b'%.1f;' % rss_mb(os.getpid()))"
    )
    done = subprocess.run(
        [*mpiexec(2), sys.executable, "-c", code],
        env={**os.environ, **mpi_environment()},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return max(float(part) for part in done.stdout.split(";") if part.strip())


def idleness(hpcdist: Any) -> Figures:
    """What an idle process costs, and what the first call after idleness does."""
    time_calls(2, 500)
    sleep(0.5)
    processes = [w.os_pid for w in hpcdist.status()]
    sleep(0.5)
    cpu = idle.cpu_percent(processes, 3.0)
    wakes = []
    with idle.sleeper() as bare:
        for _ in rounds(12):
            sleep(1)
            raw = bare.wake()
            sleep(1)
            wakes.append(Pair(time_calls(2, 1)[0] * 1e6, raw * 1e6))
    ours, raw = (median([getattr(w, side) for w in wakes]) for side in ("ours", "floor"))
    return {"cpu": Pair(cpu, 0.0), "wake": Pair(ours, raw)}


def crowd(hpcdist: Any) -> Figures:
    """More workers than cores: calls to each in turn."""
    samples = []
    for _ in rounds(9):
        raw = floor_between(2, 3, floor.ask, floor.answer, 500)
        times = [t for _ in range(100) for p in hpcdist.workers() for t in time_calls(p, 1)]
        samples.append((times, raw))
    return both(samples)


def start() -> Figures:
    """From addprocs(4) to the first result of all four, each time in a new process."""
    ours, bare = [], []
    for _ in rounds(6):
        bare.append(time_bare_start())
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.driver", "start_once", "1"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        ours.append(float(done.stdout.split()[-1]))
    return {"start": best_third([Pair(o, b) for o, b in zip(ours, bare, strict=True)])}


def time_bare_start() -> float:
    """Time the launcher alone: four ranks meet and rank 0 says so."""
    code = "from mpi4py import MPI; MPI.COMM_WORLD.gather(1); print(MPI.COMM_WORLD.rank)"
    begin = perf_counter()
    with subprocess.Popen(
        [*mpiexec(4), sys.executable, "-c", code],
        env={**os.environ, **mpi_environment()},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() not in ("0", ""):
            pass
        taken = perf_counter() - begin
        process.stdout.read()
    return taken


def start_once() -> None:
    """One start; the process is a plain one, as a user's."""
    import hpcdist

    begin = perf_counter()
    pids = hpcdist.addprocs(4)
    for future in [hpcdist.remotecall(os.getpid, p) for p in pids]:
        future.fetch()
    print(perf_counter() - begin)


SCENARIOS: dict[str, Callable[[], Figures]] = {
    "calls": calls,
    "between": between,
    "echo": echo_inside,
    "outside": outside_calls,
    "idle": lambda: idleness(in_world()),
    "idle_outside": lambda: idleness(outside(2)),
    "crowd": lambda: crowd(in_world()),
    "crowd_outside": lambda: crowd(outside(8)),
    "start": start,
    "links": lambda: clients.links(importlib.import_module("hpcdist")),
    "maps": lambda: parallel.maps(outside(4), rounds),
    "ranks": lambda: parallel.ranks(outside(8), rounds),
    "habits": lambda: parallel.habits(outside(4), rounds),
    "loops": lambda: parallel.loops(outside(4), rounds),
    "loops_world": lambda: parallel.loops(in_world(), rounds),
    "values": lambda: parallel.values(outside(4), rounds),
    "speedups": lambda: parallel.speedups(outside(2), rounds),
    "death": lambda: parallel.death(outside(4)),
    **{f"everywhere_{n}": lambda n=n: parallel.spread(outside(n), rounds) for n in SPREAD},
}

SCALE = 1.0

if __name__ == "__main__":
    SCALE = float(sys.argv[2])
    if sys.argv[1] == "start_once":
        start_once()
    else:
        figures = SCENARIOS[sys.argv[1]]()
        print(MARK + json.dumps({k: [p.ours, p.floor] for k, p in figures.items()}), flush=True)
