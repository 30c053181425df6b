"""A driver for driver_and_workers.sh: one worker for each task of the job, and pi from all."""

import operator
import os
import socket

import hpcdist
from hpcdist import SlurmManager, distributed, everywhere

TERMS = 2_000_000


def main() -> None:
    tasks = int(os.environ.get("SLURM_NTASKS", "4"))
    hpcdist.addprocs(SlurmManager(tasks), launcher="srun")
    hosts = set(everywhere.call(socket.gethostname, pids=hpcdist.workers()).values())

    @distributed(range(TERMS), operator.add, chunked=True)
    def total(part: range) -> float:
        return sum((-1.0 if k % 2 else 1.0) / (2 * k + 1) for k in part)

    print(f"{hpcdist.nworkers()} workers on {len(hosts)} nodes: pi is about {4 * total:.6f}")


if __name__ == "__main__":
    main()
