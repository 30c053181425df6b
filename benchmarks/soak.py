"""Work for a long time, with workers that join and leave, and say what grows, on every process.

python -m benchmarks.soak [--minutes N] [--workers N] [--isolation process]

Process 1, the workers that stay, and their keepers are looked at all the time: memory, descriptors,
threads, and on process 1 and workers references, waits, and blocks of Python's memory. What the
first fifth of the time brings is warming up. One worker joins and leaves again and again.
"""

import argparse
import gc
import operator
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.idle import rss_mb

_WARM = 0.2  # of the time
_ENDS = 5  # samples at each end, whose medians are compared
_SAMPLES = 100
_MEMORY = 8.0  # MB that a process may have grown by, of what its allocator has not given back
_BLOCKS = 5000  # of Python's allocator: some caches fill slowly
_SLACK = {"memory": _MEMORY, "files": 1.0, "threads": 2.0, "references": 4.0, "blocks": _BLOCKS}


@dataclass(frozen=True)
class Look:
    """How a process is; -1: it cannot be asked."""

    memory: float
    files: int
    threads: int
    references: int = -1
    blocks: int = -1


def inside() -> tuple[int, int]:
    """Count, in the process that is asked, what it keeps for others and awaits; and its blocks."""
    from hpcdist._runtime.node import here
    from hpcdist._runtime.references import References

    gc.collect()
    node = here.node
    return len(node.service(References).owned) + len(node.pending), sys.getallocatedblocks()


def look(os_pid: int, within: tuple[int, int] = (-1, -1)) -> Look:
    """Look at a process from outside."""
    proc = Path(f"/proc/{os_pid}")
    files, threads = len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))
    return Look(rss_mb(os_pid), files, threads, *within)


def children(os_pid: int) -> list[int]:
    """List the processes that another has started."""
    tasks = Path(f"/proc/{os_pid}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def fails() -> None:
    """Fail."""
    raise ValueError("as it should")


def work(hpcdist: Any, pids: list[int]) -> None:
    """Do some of everything, and check it."""
    assert hpcdist.pmap(abs, range(-200, 0)) == list(range(200, 0, -1))
    assert hpcdist.distributed(range(500), operator.add)(operator.pos) == 124_750
    assert hpcdist.reduce(operator.add, lambda: 1, pids=pids) == len(pids)
    futures = [hpcdist.remotecall(operator.neg, pid, k) for pid in pids for k in range(50)]
    assert sum(future.fetch() for future in futures) == -1225 * len(pids)
    del futures
    for pid in pids:
        [hpcdist.remotecall(bytearray, pid, 100) for _ in range(20)]  # dropped at once
        hpcdist.remote_do(abs, pid, 1)
        try:
            hpcdist.remotecall_fetch(fails, pid)
        except ValueError:
            pass
    with hpcdist.bcast(bytearray(300_000)) as value:
        lengths = [hpcdist.remotecall_fetch(len, pid, value) for pid in pids]
    assert lengths == [300_000] * len(pids)
    channel = hpcdist.RemoteChannel(lambda: hpcdist.Channel(10), pids[0])
    for k in range(20):
        hpcdist.remotecall_fetch(channel.put, pids[-1], k)
        assert channel.take() == k
    hpcdist.everywhere("soaked = 1")


def soak(hpcdist: Any, minutes: float, workers: int, how: dict[str, Any]) -> int:
    """Work, and print what has grown; 1 if anything has."""
    pids: list[int] = hpcdist.addprocs(workers, **how)
    names = {1: os.getpid()}
    names |= {pid: hpcdist.remotecall_fetch(os.getpid, pid) for pid in pids}
    keepers = [p for p in children(os.getpid()) if p not in names.values()]
    samples: dict[str, list[Look]] = {}

    def sample() -> None:
        for pid, os_pid in names.items():
            name = "process 1" if pid == 1 else f"worker {pid}"
            within = hpcdist.remotecall_fetch(inside, pid)
            samples.setdefault(name, []).append(look(os_pid, within))
        for os_pid in keepers:
            samples.setdefault(f"keeper {os_pid}", []).append(look(os_pid))

    begin = time.monotonic()
    end, every = begin + 60 * minutes, 60 * minutes / _SAMPLES
    rounds = joins = taken = 0
    while time.monotonic() < end:
        work(hpcdist, pids)
        rounds += 1
        if rounds % 5 == 0:
            new = hpcdist.addprocs(1, **how)
            work(hpcdist, [*pids, *new])
            hpcdist.rmprocs(*new)
            joins += 1
        if time.monotonic() > begin + taken * every:
            sample()
            taken += 1
    print(f"{minutes:g} minutes, {rounds} rounds, {joins} joins and leaves, {taken} samples\n")
    grown = _report(samples)
    hpcdist.shutdown()
    return int(grown)


def _report(samples: dict[str, list[Look]]) -> bool:
    print(f"{'':16}{'memory':>22}{'files':>14}{'threads':>14}{'references':>14}{'blocks':>22}")
    grown = False
    for name, seen in samples.items():
        seen = seen[int(len(seen) * _WARM) :]
        cells = []
        for what, slack in _SLACK.items():
            read: Callable[[Look], float] = operator.attrgetter(what)
            first, last = (median(map(read, part)) for part in (seen[:_ENDS], seen[-_ENDS:]))
            wrong = last - first > slack
            grown |= wrong
            width = 22 if what in ("memory", "blocks") else 14
            unit = " MB" if what == "memory" else ""
            text = (
                f"{first:,.0f} -> {last:,.0f}{unit}{' !' if wrong else ''}" if first >= 0 else "-"
            )
            cells.append(f"{text:>{width}}")
        print(f"{name:16}{''.join(cells)}")
    print("\nsomething grows: see '!'" if grown else "\nnothing grows")
    return grown


def main() -> int:
    """Soak."""
    import hpcdist

    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--isolation", help='"process": workers without MPI between them')
    options = parser.parse_args()
    how = {"isolation": options.isolation} if options.isolation else {}
    return soak(hpcdist, options.minutes, options.workers, how)


if __name__ == "__main__":
    sys.exit(main())
