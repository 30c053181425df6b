"""A map that takes ten times as long as its jobs may run, with accidents: what of it is lost?

python -m benchmarks.walltime [--minutes 10] [--workers 4]

It starts the Slurm of the tests (root, on Linux; `tests/install.sh slurm`) with `OverTimeLimit=0`,
and runs a `pmap` of so many minutes on jobs of one minute, with `renew=True`. Meanwhile it cancels
a job, has one preempted, and takes the power from the node of a third.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks.walltime_map import MARK
from tests.helpers import eventually
from tests.slurm.cluster import PREEMPTING, ROOT, Job, Running, Slurm, missing_programs

_MOST_IDLE = 0.05
_CONF = f"OverTimeLimit=0\n{PREEMPTING}"


@dataclass(frozen=True)
class Times:
    """Seconds of the workers' time, all together, while the map ran.

    Attributes:
        there: From when a worker counts until it has left, or is known to be lost.
        busy: In items that came back.
        cut: In what ran on workers as they were lost, and until that was known.
        wanted: What the workers wanted would have had, with no queue and no accident.
        first: Until a worker's first item, of what was idle.
        last: From a worker's last item until it has left.
    """

    there: float
    busy: float
    cut: float
    wanted: float
    first: float
    last: float

    @property
    def idle(self) -> float:
        """The share of the time in which a worker was there and had nothing to do."""
        return max(0.0, self.there - self.busy - self.cut) / self.there


def times_of(figures: dict[str, Any], workers: int) -> Times:
    """Add up what the driver has said."""
    begin, end = figures["begin"], figures["end"]
    busy: dict[int, list[tuple[float, float]]] = {}
    for pid, start, stop in figures["runs"]:
        busy.setdefault(pid, []).append((start, stop))
    there = cut = first = last = 0.0
    for name, (came, left) in figures["lives"].items():
        came, left = max(begin, came), min(end, left)
        if left <= came:
            continue
        there += left - came
        runs = busy.get(int(name), [])
        first += min((start for start, _ in runs), default=came) - came
        after = left - max((stop for _, stop in runs), default=came)
        if int(name) in figures["lost"]:
            cut += after
        else:
            last += after
    spent = sum(stop - start for runs in busy.values() for start, stop in runs)
    return Times(there, spent, cut, workers * (end - begin), first, last)


def main() -> int:
    """Run it, and print how it went; 1 if an item is missing or too much time was idle."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walltime", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="of work (default: 10)")
    parser.add_argument("--workers", type=int, default=4, help="that a job has (default: 4)")
    options = parser.parse_args()
    if os.geteuid() != 0 or missing_programs():
        sys.exit(f"this takes root, and {', '.join(missing_programs()) or 'nothing else'}")
    slurm = Slurm(extra_conf=_CONF)
    slurm.up()
    try:
        argv = [slurm.python, "-m", "benchmarks.walltime_map"]
        argv += [str(options.minutes), str(options.workers)]
        driver = slurm.start(*argv, env={"PYTHONPATH": str(ROOT)})
        _accidents(slurm, driver, options.minutes * 60)
        done = driver.wait(options.minutes * 60 * 2 + 120)
        begun = [k for file in slurm.path("begun").iterdir() for k in file.read_text().split()]
    finally:
        slurm.down()
    sys.stderr.write(done.err)
    said = [line for line in done.out.splitlines() if line.startswith(MARK)]
    if done.rc or not said:
        print(f"the map has failed ({done.rc}): {done.out}")
        return 1
    return _report(json.loads(said[0].removeprefix(MARK)), begun, options.workers)


def _accidents(slurm: Slurm, driver: Running, seconds: float) -> None:
    """Cancel a job, have one preempted, lose the node of one: a fifth of the time apart."""
    begin = time.monotonic()
    for k, befall in enumerate((_cancel, _preempt, _lose_node), 1):
        at = begin + k * seconds / 5
        while time.monotonic() < at and driver.process.poll() is None:
            time.sleep(0.2)
        if driver.process.poll() is None:
            job = eventually(lambda: _running(slurm), 60)[-1]
            print(f"{time.monotonic() - begin:.0f} s: job {job.id} {befall.__doc__}", flush=True)
            befall(slurm, job)


def _running(slurm: Slurm) -> list[Job]:
    return [job for job in slurm.jobs() if job.state == "RUNNING"]


def _until_gone(slurm: Slurm, job: Job) -> None:
    eventually(lambda: job.id not in [other.id for other in _running(slurm)], 90)


def _cancel(slurm: Slurm, job: Job) -> None:
    """is cancelled by hand"""
    slurm.login("scancel", job.id)
    _until_gone(slurm, job)


def _preempt(slurm: Slurm, job: Job) -> None:
    """is preempted"""
    everything = ("--exclusive", f"--nodelist={job.nodes}", "-t", "5", "-o", "/dev/null")
    usurper = slurm.submit("#!/bin/sh\nexec sleep 300\n", "-p", "compute", *everything)
    _until_gone(slurm, job)
    slurm.login("scancel", usurper)


def _lose_node(slurm: Slurm, job: Job) -> None:
    """loses its node"""
    slurm.kill_node(int(job.nodes[1:]))
    _until_gone(slurm, job)
    slurm.heal_node(int(job.nodes[1:]))


def _report(figures: dict[str, Any], begun: list[str], workers: int) -> int:
    times = times_of(figures, workers)
    counts = Counter(begun)
    again = sum(count > 1 for count in counts.values())
    took = figures["end"] - figures["begin"]
    holds = figures["once"] and times.idle <= _MOST_IDLE
    share = lambda seconds: f"{seconds / times.there:.1%}"
    lines: list[tuple[str, str]] = [
        ("jobs of one minute", ", ".join(f"{id} {state}" for id, state, _ in figures["jobs"])),
        ("the map took", f"{took:.0f} s, for {times.busy / workers:.0f} s of work"),
        ("results", f"{figures['items']}, each once: {'yes' if figures['once'] else 'NO'}"),
        ("items begun again", f"{again}, of workers that were lost"),
        ("lost with workers", f"{times.cut:.0f} s of {times.there:.0f} s"),
        ("workers not there", f"{1 - times.there / times.wanted:.1%} (the queue, the accidents)"),
        ("idle", f"{times.idle:.1%} of the time of the workers there (at most {_MOST_IDLE:.0%})"),
        (
            "",
            f"{share(times.first)} before a first item, {share(times.last)} after a last one",
        ),
    ]
    for name, text in lines:
        print(f"{name:20}{text}")
    return int(not holds)


if __name__ == "__main__":
    sys.exit(main())
