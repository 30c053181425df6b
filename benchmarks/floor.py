"""The floor under every figure: what mpi4py alone does between the same two processes.

The duplicate communicator is made before the measured part, and the raw rounds alternate with
ours in the same processes: on a machine with neighbours only such pairs can be compared.
"""

from time import perf_counter
from typing import Any

_SIZE = 64
_SMALL, _LARGE = 7, 8  # tags
_comm: Any = None


def open_world() -> int:
    """Duplicate the world's communicator (all ranks together) and return our rank."""
    global _comm
    from mpi4py import MPI

    if _comm is None:
        _comm = MPI.COMM_WORLD.Dup()
    return int(_comm.rank)


def ask(peer: int, count: int) -> list[float]:
    """Time round trips of 64 bytes to a rank that runs `answer`."""
    out, back = bytearray(_SIZE), bytearray(_SIZE)
    times = []
    for _ in range(count):
        start = perf_counter()
        request = _comm.Isend(out, peer, _SMALL)
        _receive(peer, back)
        times.append(perf_counter() - start)
        request.Wait()
    return times


def answer(peer: int, count: int) -> None:
    """Send back what `ask` sends."""
    data = bytearray(_SIZE)
    for _ in range(count):
        _receive(peer, data)
        _comm.Isend(data, peer, _SMALL).Wait()


def _receive(peer: int, into: bytearray) -> None:
    probe = _comm.Improbe
    while (message := probe(peer, _SMALL)) is None:
        pass
    message.Recv(into)


def send_array(peer: int, length: int, count: int) -> list[float]:
    """Time a float64 array's way to a rank that runs `return_array`, and back."""
    import numpy as np

    array, back = np.ones(length), np.zeros(length)
    times = []
    for _ in range(count):
        start = perf_counter()
        _comm.Send(array, peer, _LARGE)
        _comm.Recv(back, peer, _LARGE)
        times.append(perf_counter() - start)
    return times


def return_array(peer: int, length: int, count: int) -> None:
    """Receive what `send_array` sends, into the same memory each time, and send it back."""
    import numpy as np

    array = np.zeros(length)
    for _ in range(count):
        _comm.Recv(array, peer, _LARGE)
        _comm.Send(array, peer, _LARGE)
