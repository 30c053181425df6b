"""A /dev/shm of its own for a run: what runs side by side must not see each other's files.

As root, a process gets it in a mount namespace of its own, which its children share. Other users
go without, and `_leftovers` has to tell whose a file is.

    python -m tests._own_shm COMMAND ARGUMENT...

runs a command in this way: the ranks of one world have to share theirs.
"""

import ctypes
import os
import sys

__all__ = ["hide_shm"]

# From <sched.h> and <sys/mount.h>; `os.unshare` came with Python 3.12, and nothing mounts yet.
_CLONE_NEWNS = 0x00020000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 2, 4, 16384, 1 << 18


def hide_shm() -> bool:
    """Put an empty /dev/shm in place of the machine's; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    # Private first: a mount made here would otherwise show on the whole machine.
    private = libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
    if private != 0:
        return False
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    return bool(libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", flags, b"mode=1777") == 0)


if __name__ == "__main__":
    hide_shm()
    os.execvp(sys.argv[1], sys.argv[1:])
