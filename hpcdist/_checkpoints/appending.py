"""The end of a checkpoint: records are appended, and again where the disk did not take them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable

from hpcdist._checkpoints import records

_SYNC_EVERY = 1.0  # seconds: how often the disk itself, or the file server, has to have all
_TRY_EVERY = 1.0  # after the disk was full
_KEPT_MOST = 64 << 20  # bytes that wait for room on the disk


class End:
    """Where a file grows. Its writer's thread alone uses it.

    Args:
        fd: The file.
        end: Where the next record goes.
        tell: Called with what went wrong.

    Attributes:
        failing: The disk has not taken what was written last.
    """

    def __init__(self, fd: int, end: int, tell: Callable[[OSError], None]) -> None:
        self.failing = False
        self._fd = fd
        self._end = end
        self._tell = tell
        self._todo: list[bytes] = []  # payloads that are to be written
        self._unsynced: list[bytes] = []  # written, but not yet known to be on the disk
        self._sync: _Sync | None = None
        self._synced_end = end
        self._synced_at = time.monotonic()
        self._try_at = 0.0

    def append(self, payloads: Iterable[bytes], *, last: bool = False) -> None:
        """Write payloads, and what could not be written before.

        Args:
            last: Try in any case, however little time has gone by since the disk was full.
        """
        self._todo += payloads
        if time.monotonic() < self._try_at and not last:
            self._shed()
            return
        try:
            while self._todo:
                frame = records.framed(self._todo[0], self._end)
                records.write(self._fd, frame, self._end)
                self._end += len(frame)
                self._unsynced.append(self._todo.pop(0))
            self.failing = False
        except OSError as exc:
            self._fail(exc)

    def store(self, *, wait: bool = False) -> None:
        """Have the disk store what was written: a write alone survives this process, not the host.

        A thread of its own waits for it, so that writing goes on.
        """
        sync = self._sync
        if sync is not None:
            if sync.is_alive() and not wait:
                return
            sync.join()
            self._sync = None
            self._take_note(sync)
        now = time.monotonic()
        if self._unsynced and now - self._synced_at > _SYNC_EVERY:
            self._synced_at = now
            self._sync = _Sync(self._fd, self._end, len(self._unsynced))
            if wait:
                self.store(wait=True)

    def _take_note(self, sync: _Sync) -> None:
        if sync.error is None:
            self._synced_end = sync.end
            del self._unsynced[: sync.count]
            return
        # The system may have let go of any of it: write it again.
        self._todo = [*self._unsynced, *self._todo]
        self._unsynced = []
        self._end = self._synced_end
        self._fail(sync.error)

    def _fail(self, exc: OSError) -> None:
        self.failing = True
        self._try_at = time.monotonic() + _TRY_EVERY
        self._tell(exc)
        try:
            os.ftruncate(self._fd, self._end)  # leave the room to others
        except OSError:  # it stands behind the last whole record, and is none
            pass
        self._shed()

    def _shed(self) -> None:
        """Let go of what has waited for the disk in vain, and is too much to go on waiting."""
        size = sum(map(len, self._todo))
        while self._todo and size > _KEPT_MOST:
            size -= len(self._todo.pop())


class _Sync(threading.Thread):
    """One request to the disk to store all that was written so far.

    Attributes:
        end: How far that is.
        count: How many records it has been since the last one.
    """

    def __init__(self, fd: int, end: int, count: int) -> None:
        super().__init__(name="hpcdist checkpoint sync", daemon=True)
        self.end = end
        self.count = count
        self.error: OSError | None = None
        self._fd = fd
        self.start()

    def run(self) -> None:
        """Wait for the disk."""
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            self.error = exc
