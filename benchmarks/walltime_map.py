"""The map of `python -m benchmarks.walltime`: what runs on the login node, as its driver.

It prints one line that starts with MARK, a JSON object: what came back, and how workers lived.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from hpcdist import SlurmManager, launch, myid, on_worker, pmap

MARK = "map: "
SHORTEST, LONGEST = 0.2, 2.0  # seconds an item


def lengths(minutes: float, workers: int) -> list[float]:
    """Return items that so many workers need so many minutes for, the same ones every time."""
    draw, total, found = random.Random(0), minutes * 60 * workers, list[float]()
    while sum(found) < total:
        found.append(draw.uniform(SHORTEST, LONGEST))
    return found


def item(k: int, seconds: float) -> tuple[int, int, float, float]:
    """Take so long; note first on the shared disk that it has begun."""
    begin = time.time()
    with Path("begun", f"{os.uname().nodename}-{os.getpid()}").open("a") as file:
        print(k, file=file)
    time.sleep(seconds)
    return k, myid(), begin, time.time()


def main() -> None:
    """Run the map on jobs of one minute, and say how it went."""
    minutes, workers = float(sys.argv[1]), int(sys.argv[2])
    came: dict[int, float] = {}
    left: dict[int, float] = {}
    lost: list[int] = []
    on_worker(
        added=lambda pid: came.setdefault(pid, time.time()),
        removed=lambda pid: left.setdefault(pid, time.time()),
        lost=lambda pid: (left.setdefault(pid, time.time()), lost.append(pid)),
    )
    Path("begun").mkdir()
    kept = launch(SlurmManager(workers), t=1, partition="scavenge", isolation="process", renew=True)
    kept.wait(timeout=60)
    items = lengths(minutes, workers)
    begin = time.time()
    found = pmap(item, range(len(items)), items)
    end = time.time()
    figures: dict[str, Any] = {
        "items": len(items),
        "once": [k for k, *_ in found] == list(range(len(items))),
        "begin": begin,
        "end": end,
        "runs": [run[1:] for run in found],
        "lives": {pid: (came[pid], left.get(pid, end)) for pid in came},
        "lost": lost,
        "jobs": [(str(job.id), str(job.state), job.workers) for job in kept.history],
    }
    kept.cancel()
    print(MARK + json.dumps(figures))


if __name__ == "__main__":
    main()
