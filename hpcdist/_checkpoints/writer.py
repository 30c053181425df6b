"""The writer of a checkpoint: takes finished items in, and brings them to disk a moment later.

A thread writes, a few times a second, what has come since: so items cost the map next to nothing,
and many small ones share a record. What can still be changed by its owner is pickled at once.
What has to wait because the disk is slow waits in memory, up to a limit; then the map waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hpcdist._checkpoints import owner, records
from hpcdist._checkpoints.appending import End
from hpcdist._checkpoints.intake import WAITING_MOST, Intake, Names, size_of_plain
from hpcdist._checkpoints.owner import BEAT_EVERY, CheckpointInUse, Owner

FLUSH_EVERY = 0.25  # seconds
_HURRY = WAITING_MOST // 8
_MANY = 64  # results that come together so have a pickle of their own: it costs little for each


class Writer:
    """Appends finished items to the file it owns.

    Args:
        fd: The file, claimed.
        path: Where it is.
        me: This process, as its owner.
        end: Where the next record goes.
        say: Tells the user.
        keyed: Whether items go by the user's keys.
        look: Called before each write: results that nobody has filed yet may be kept early.
    """

    def __init__(
        self,
        fd: int,
        path: str,
        me: Owner,
        end: int,
        *,
        say: Callable[[str], None],
        keyed: bool = False,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self.look = look
        self._fd = fd
        self._path = path
        self._me = me
        self._say = say
        self._told: set[str] = set()  # what the user knows already
        self._intake = Intake(keyed)
        self._end = End(fd, end, self._tell_unsafe)
        self._taken: CheckpointInUse | None = None  # by whom
        self._beaten_at = time.monotonic()
        self._stopped = False
        self._tick = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="hpcdist checkpoint", daemon=True)
        self._thread.start()

    # What the map calls

    def add(self, names: Names, values: Sequence[Any]) -> None:
        """Take in the results of neighbouring items.

        Raises:
            CheckpointInUse: Another driver has taken the file.
        """
        if not values:
            return
        nbytes = size_of_plain(values) if len(values) < _MANY else None
        if nbytes is not None:
            self._intake.put(names, values, nbytes)
            self._put()
            return
        packed = self._pack(names, values)
        if packed is not None:
            self.add_packed(names, len(values), packed)

    def add_packed(self, names: Names, count: int, values: bytes) -> None:
        """Take in results that are pickled already."""
        self._intake.put_packed(names, count, values)
        self._put()

    def close(self) -> None:
        """Write what is left, and give the file up."""
        self._stopped = True
        self._tick.set()
        if self._me.pid == os.getpid():
            self._thread.join()

    def _put(self) -> None:
        """Take note that there is more; wait where it is too much."""
        if self._taken is not None:
            raise self._taken
        if self._intake.waiting > _HURRY:
            self._tick.set()
            if threading.current_thread() is not self._thread:
                self._intake.await_room(self._drains)

    def _drains(self) -> bool:
        return self._taken is None and self._thread.is_alive() and not self._end.failing

    def _pack(self, names: Names, values: Sequence[Any]) -> bytes | None:
        try:
            return records.pack_values(values)
        except Exception as exc:  # the user's classes, or a reference to what lives on a worker
            if len(values) > 1:  # only those that cannot be kept are lost
                for k, value in enumerate(values):
                    own = names + k if isinstance(names, int) else names[k : k + 1]
                    self.add(own, [value])
                return None
            first = f"item {names}" if isinstance(names, int) else f"the item {names[0]!r}"
            self._tell_once(
                "unkeepable",
                f"the result of {first} cannot be kept in {self._path} ({exc}): it will run again "
                "the next time, and so will others of its kind",
            )
            return None

    # The thread

    def _serve(self) -> None:
        try:
            while not self._stopped:
                self._tick.wait(FLUSH_EVERY)
                self._tick.clear()
                self._round()
            self._round(last=True)
        finally:
            self._release()

    def _round(self, last: bool = False) -> None:
        try:
            self.look()
            if self._taken is None:
                self._end.append(self._intake.payloads(), last=last)
                self._end.store()
                self._beat()
        except Exception as exc:  # the user's keys, say; what comes after them is still kept
            self._tell_unsafe(exc)

    def _tell_unsafe(self, exc: Exception) -> None:
        why = getattr(exc, "strerror", None) or str(exc)
        self._tell_once(
            "unsafe",
            f"{self._path}: {why}. The map goes on, but its checkpoint is no longer safe: what "
            "finishes from now on may have to run again",
        )

    def _tell_once(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._say(f"hpcdist: {text}")

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beaten_at < BEAT_EVERY:
            return
        self._beaten_at = now
        self._me = replace(self._me, beat=self._me.beat + 1, time=time.time())
        try:
            owner.beat(self._fd, self._path, self._me)
        except CheckpointInUse as exc:
            self._taken = exc

    def _release(self) -> None:
        try:
            self._end.store(wait=True)
            if self._taken is None:
                owner.beat(self._fd, self._path, self._me)
                owner.write_owner(self._fd, None)
        except CheckpointInUse:
            pass
        except OSError as exc:
            self._tell_unsafe(exc)
        finally:
            os.close(self._fd)
