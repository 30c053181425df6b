"""Leibniz's series for pi, summed by all workers: `python leibniz.py`, or under mpiexec."""

import operator

import hpcdist
from hpcdist import distributed

TERMS = 2_000_000


def main() -> None:
    hpcdist.init(4)

    @distributed(range(TERMS), operator.add, chunked=True)
    def total(part: range) -> float:
        return sum((-1.0 if k % 2 else 1.0) / (2 * k + 1) for k in part)

    print(f"{hpcdist.nworkers()} workers: pi is about {4 * total:.6f}")


if __name__ == "__main__":
    main()
