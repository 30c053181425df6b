"""Where private folders with sockets in them are made."""

from __future__ import annotations

import os
import tempfile

# A socket's path has 107 bytes (unix(7)); after this come the folder's name and the socket's.
_LONGEST = 70


def temporary() -> str:
    """Return the folder for temporary files; /tmp where a socket's path would not fit into it."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= _LONGEST else "/tmp"


def private() -> str:
    """Make a folder that only this user can read, for sockets and whatever else."""
    return tempfile.mkdtemp(prefix="hpcdist-", dir=temporary())
