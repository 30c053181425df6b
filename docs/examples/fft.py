"""A two-dimensional FFT over several workers: rows, a transposition by Alltoall, columns.

Run it with `python fft.py` (4 workers), or with `mpirun -n 5 python fft.py`.
"""

import numpy as np

import hpcdist
from hpcdist import comm, spmd

SIZE = 240  # divisible by the number of workers


def signal(size: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((size, size)) + 0j


def transposed(rows: np.ndarray) -> np.ndarray:
    """Exchange blocks with every other worker: from my rows to my columns, as rows."""
    world = comm()
    each, size = rows.shape
    # One block for each worker, contiguous: what goes to worker j is columns of j, transposed.
    blocks = np.ascontiguousarray(rows.reshape(each, world.size, each).transpose(1, 2, 0))
    got = np.empty_like(blocks)
    world.Alltoall(blocks, got)
    return got.transpose(1, 0, 2).reshape(each, size)


def fft2(size: int) -> np.ndarray:
    """Compute this worker's rows of the transformed signal."""
    world = comm()
    each = size // world.size
    mine = signal(size)[world.rank * each : (world.rank + 1) * each]
    rows = np.fft.fft(mine, axis=1)
    columns = np.fft.fft(transposed(rows), axis=1)
    return transposed(columns)


def main() -> None:
    hpcdist.init(4)
    size = SIZE // hpcdist.nworkers() * hpcdist.nworkers()
    parts = spmd(fft2, size)
    found, expected = np.concatenate(parts), np.fft.fft2(signal(size))
    error = float(abs(found - expected).max() / abs(expected).max())
    print(f"{len(parts)} workers, {size} x {size}, relative error: {error:.1e}")
    assert error < 1e-12


if __name__ == "__main__":
    main()
