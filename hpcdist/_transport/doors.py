"""Doors: how process 1 comes to one that cannot dial it.

The login node may let nobody in, or `interface=` may name the wrong network. A process of a job
that reaches process 1 nowhere opens a door: it listens, and says where in a file of the run's
folder, which both see and nobody else. Process 1 looks for such files, and dials. From then on all
is as if it had been dialled: TLS and the greeting keep their roles.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from hpcdist._transport import network
from hpcdist._transport.network import Address

T = TypeVar("T")

FOLDER = "doors"  # in the folder of a run, once somebody has opened one
_FIRST = 5.0  # seconds for dialling, before a door is opened
_LOOK_EVERY = 1.0
_AGREEING = 5.0  # how long one that comes and says nothing may keep us


def reach(
    targets: Sequence[Address],
    agree: Callable[[socket.socket, float], T],
    timeout: float,
    folder: str,
) -> T:
    """Reach process 1: by dialling, or where it does not answer, by a door.

    Args:
        targets: Where it may be reached.
        agree: See `network.dial`.
        timeout: How long to try, in seconds.
        folder: The run's folder.

    Raises:
        ConnectionError: Neither has succeeded.
    """
    deadline = time.monotonic() + timeout
    try:
        return network.dial(targets, agree, min(timeout, _FIRST))
    except ConnectionError as exc:
        why = exc
    try:
        with open_door(folder) as listeners:
            while (left := deadline - time.monotonic()) > 0:
                for sock in visitors(listeners, min(_LOOK_EVERY, left)):
                    with contextlib.suppress(OSError):  # a stranger, or by our other address
                        return agree(sock, min(_AGREEING, max(1.0, left)))
                    sock.close()
                try:  # it may have been busy
                    return network.dial(targets, agree, min(_FIRST, max(0.1, left)))
                except ConnectionError as exc:
                    why = exc
    except OSError as exc:
        raise ConnectionError(f"{why}; and no door can be opened: {exc}") from exc
    raise ConnectionError(f"{why}; nor did it dial this host ({socket.gethostname()}) for its part")


@contextlib.contextmanager
def open_door(folder: str) -> Iterator[list[socket.socket]]:
    """Listen, and say so in the run's folder."""
    listeners = network.listen()
    place = os.path.join(folder, FOLDER)
    path = os.path.join(place, f"{socket.gethostname()}-{os.getpid()}")
    try:
        os.makedirs(place, 0o700, exist_ok=True)
        with open(path + ".new", "w") as file:
            file.write(network.name(listeners))
        os.replace(path + ".new", path)
        yield listeners
    finally:
        with contextlib.suppress(OSError):  # the folder may have gone with process 1
            os.unlink(path)
        for listener in listeners:
            listener.close()


def visitors(listeners: Sequence[socket.socket], timeout: float) -> Iterator[socket.socket]:
    """Wait for those who come to a door, and yield those who have."""
    poll = select.poll()
    for listener in listeners:
        poll.register(listener, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(timeout * 1000)}
    for listener in listeners:
        if listener.fileno() in ready:
            with contextlib.suppress(OSError):  # it has gone again
                yield listener.accept()[0]


def doors(folder: str) -> dict[str, list[Address]]:
    """Return the doors that are open in a run's folder: where each is, by its file."""
    place = os.path.join(folder, FOLDER)
    try:
        names = [name for name in os.listdir(place) if not name.endswith(".new")]
    except OSError:
        return {}
    found = {}
    for name in names:
        path = os.path.join(place, name)
        with contextlib.suppress(OSError, ValueError), open(path) as file:  # just closed
            found[path] = network.targets(file.read())
    return found
