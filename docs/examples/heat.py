"""The heat equation in two dimensions: each worker holds a strip, neighbours exchange halos.

Run it with `python heat.py` (4 workers), or with `mpirun -n 5 python heat.py`.
"""

import numpy as np

import hpcdist
from hpcdist import comm, spmd

SIZE, STEPS, ALPHA = 120, 200, 0.2


def start(size: int) -> np.ndarray:
    """A cold plate with two hot squares; its edge stays as it is."""
    plate = np.zeros((size, size))
    plate[size // 4 : size // 3, size // 4 : size // 3] = 100.0
    plate[size // 2 : 3 * size // 4, size // 2 : size // 3 * 2] = 50.0
    return plate


def step(u: np.ndarray) -> np.ndarray:
    """One explicit step for all inner points of `u`."""
    new = u.copy()
    around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
    new[1:-1, 1:-1] += ALPHA * (around - 4 * u[1:-1, 1:-1])
    return new


def serial(size: int, steps: int) -> np.ndarray:
    plate = start(size)
    for _ in range(steps):
        plate = step(plate)
    return plate


def strip(size: int, steps: int) -> np.ndarray:
    """Compute this worker's rows, with one row of each neighbour beside them."""
    world = comm()
    rank, last = world.rank, world.size - 1
    bounds = np.linspace(0, size, world.size + 1).astype(int)
    first, end = bounds[rank], bounds[rank + 1]
    above = rank - 1 if rank > 0 else -1
    below = rank + 1 if rank < last else -1

    lo, hi = max(0, first - 1), min(size, end + 1)
    u = start(size)[lo:hi].copy()
    for _ in range(steps):
        u = step(u)
        # `step` has left the halo rows as they were: the neighbours know their new values.
        if above >= 0:
            world.Sendrecv(u[1], above, recvbuf=u[0], source=above)
        if below >= 0:
            world.Sendrecv(u[-2], below, recvbuf=u[-1], source=below)
    return u[first - lo : end - lo]


def main() -> None:
    hpcdist.init(4)
    parts = spmd(strip, SIZE, STEPS)
    plate = np.concatenate(parts)
    error = float(abs(plate - serial(SIZE, STEPS)).max())
    print(f"{len(parts)} workers, {STEPS} steps, difference from serial: {error:.1e}")
    assert error < 1e-12
    print(f"warmest point after {STEPS} steps: {plate.max():.3f}")


if __name__ == "__main__":
    main()
