"""What a large cluster costs: simulated workers, and real ones on this machine.

python -m benchmarks.size [--simulated N] [--worlds N] [--local N]

Simulated: memory for each pair of processes that know each other, processor time to join, and for
`status()`. Real, with `isolation="process"`: time to start, memory of process 1 for each worker,
`status()`, and what the driver uses of a core when nothing happens.
"""

import argparse
import os
import sys
import time
from typing import Any

from benchmarks.clients import descriptors
from benchmarks.idle import cpu_percent, rss_mb

_IDLE = 3.0


def simulated(workers: int, worlds: int) -> None:
    """Join that many simulated workers."""
    from hpcdist.testing import Simulation

    begin, before = time.process_time(), rss_mb(os.getpid())
    with Simulation(workers + 1, worlds=worlds, timeout=3600) as sim:
        sim.trace.is_on = False
        taken, memory = time.process_time() - begin, rss_mb(os.getpid()) - before
        print(f"{workers} simulated workers in {worlds} worlds join in {taken:.1f} s of processor")
        print(f"  {memory:,.0f} MB, {memory * 1e6 / workers**2:,.0f} bytes for each pair")
        begin = time.process_time()
        rows = sim.node(1).run(_count_rows)
        taken = time.process_time() - begin
        print(f"  status(): {rows} rows in {taken:.2f} s of processor, the workers' part in it")


def _count_rows() -> int:
    import hpcdist

    return len(hpcdist.status())


def local(hpcdist: Any, workers: int) -> None:
    """Start that many workers here."""
    before = rss_mb(os.getpid()), descriptors()
    begin = time.perf_counter()
    pids = hpcdist.addprocs(workers, isolation="process")
    taken = time.perf_counter() - begin
    memory, files = rss_mb(os.getpid()) - before[0], descriptors() - before[1]
    print(f"{workers} workers here start in {taken:.1f} s, {taken / workers * 1e3:.1f} ms each")
    print(f"  process 1: {memory * 1e3 / workers:.0f} KB and {files / workers:.1f} files each")
    begin = time.perf_counter()
    rows = hpcdist.status()
    print(f"  status(): {len(rows)} rows in {time.perf_counter() - begin:.2f} s")
    begin = time.perf_counter()
    assert len(hpcdist.everywhere.call(os.getpid, pids=pids)) == workers
    print(f"  everywhere: {(time.perf_counter() - begin) * 1e3:.0f} ms")
    time.sleep(1.0)  # what follows the start is over
    print(f"  idle: {cpu_percent([os.getpid()], _IDLE):.2f} % of a core for process 1")
    begin = time.perf_counter()
    hpcdist.rmprocs(*pids)
    print(f"  rmprocs: {time.perf_counter() - begin:.1f} s")


def main() -> int:
    """Measure."""
    import hpcdist

    parser = argparse.ArgumentParser(prog="python -m benchmarks.size", description=__doc__)
    parser.add_argument("--simulated", type=int, default=512)
    parser.add_argument("--worlds", type=int, default=8)
    parser.add_argument("--local", type=int, default=64)
    options = parser.parse_args()
    if options.local:
        local(hpcdist, options.local)
    if options.simulated:
        simulated(options.simulated, options.worlds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
