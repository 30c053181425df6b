"""The floor under every figure: what mpi4py alone does between the same two processes.

The duplicate communicator is made before the measured part, and the raw rounds alternate with
ours in the same processes: on a machine with neighbours only such pairs can be compared.
"""

import os
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


def _receive(peer: int, into: bytearray, give_way: bool = False) -> None:
    probe = _comm.Improbe
    while (message := probe(peer, _SMALL)) is None:
        if give_way:
            os.sched_yield()
    message.Recv(into)


def ask_all(peers: list[int], items: int, count: int) -> list[float]:
    """Time a message to each of several ranks that run `add_up`, and all of their answers."""
    out, back = bytearray(_SIZE), bytearray(_SIZE)
    out[:8] = items.to_bytes(8, "little")
    times = []
    for _ in range(count):
        start = perf_counter()
        requests = [_comm.Isend(out, peer, _SMALL) for peer in peers]
        for peer in peers:
            _receive(peer, back, give_way=True)
        times.append(perf_counter() - start)
        for request in requests:
            request.Wait()
    return times


def add_up(peer: int, count: int) -> None:
    """Answer what `ask_all` sends: run a body for so many items, and add."""
    data = bytearray(_SIZE)
    body = lambda i: i
    for _ in range(count):
        _receive(peer, data, give_way=True)
        data[8:16] = sum(map(body, range(int.from_bytes(data[:8], "little")))).to_bytes(8, "little")
        _comm.Isend(data, peer, _SMALL).Wait()


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
