"""Where private folders with sockets in them are made; what is in a log."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import deque

# A socket's path has 107 bytes (unix(7)); after this come the folder's name and the socket's.
_LONGEST = 70
_PATIENCE = 0.5  # seconds: what makes something in a folder that is removed is about to end


def temporary() -> str:
    """Return the folder for temporary files; /tmp where a socket's path would not fit into it."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= _LONGEST else "/tmp"


def private() -> str:
    """Make a folder that only this user can read, for sockets and whatever else."""
    return tempfile.mkdtemp(prefix="hpcdist-", dir=temporary())


def remove(folder: str, patience: float = _PATIENCE) -> None:
    """Remove a folder that may still be filled, by a script or a process that is about to end.

    Args:
        patience: For how many seconds to try again.
    """
    give_up, pause = time.monotonic() + patience, 0.005
    shutil.rmtree(folder, ignore_errors=True)
    while os.path.lexists(folder) and time.monotonic() < give_up:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
        shutil.rmtree(folder, ignore_errors=True)


def last_lines(path: str, n: int) -> list[str]:
    """Return the last lines of a file, without reading all of a long one."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - (1 << 16)))
            return list(deque(file.read().decode(errors="replace").splitlines(), maxlen=n))
    except OSError:
        return []
