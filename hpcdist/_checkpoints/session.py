"""One map's use of its checkpoint: looked at when it is called, claimed when it begins."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

from hpcdist._checkpoints import belonging, owner, records
from hpcdist._checkpoints.belonging import Belonging, CheckpointMismatch
from hpcdist._checkpoints.reading import Found, look
from hpcdist._checkpoints.records import HEAD
from hpcdist._checkpoints.writer import Writer


class Session:
    """The checkpoint of one map.

    Args:
        path: The file; it need not exist.
        wanted: The map.
        seeded: Whether the user has chosen the map's seed.
        say: Tells the user something.

    Raises:
        CheckpointMismatch: The file is another map's, or no checkpoint.
        OSError: It cannot be read, or its folder is not there.
    """

    found: Found
    writer: Writer

    def __init__(
        self, path: str, wanted: Belonging, *, seeded: bool, say: Callable[[str], None]
    ) -> None:
        self.path = os.path.abspath(path)
        self._shown = path
        self._wanted = wanted
        self._seeded = seeded
        self._say = say
        try:
            known = look(self.path).belonging
        except FileNotFoundError as exc:
            folder = os.path.dirname(self.path)
            if not os.path.isdir(folder):
                exc.add_note(f"The folder {folder} of the checkpoint is not there")
                raise
            known = None
        else:
            os.close(owner.open_file(self.path))  # it will be written to
        if known is not None:
            self._check(known)
            self._wanted = replace(wanted, seed=known.seed)

    @property
    def seed(self) -> int:
        """The map's seed: the file's, where it has one, so that all items are of one map."""
        return self._wanted.seed

    def _check(self, known: Belonging) -> None:
        belonging.check(self._shown, known, self._wanted, seeded=self._seeded)

    def begin(self) -> None:
        """Become the owner of the file, and find what is finished.

        Raises:
            CheckpointInUse: Another driver is its owner.
            CheckpointMismatch: It has become another map's since.
            OSError: It cannot be written.
        """
        fd = owner.open_file(self.path, make=True)
        me = owner.this_process()
        try:
            owner.claim(fd, self.path, me, say=self._say)
            self.found = self._find(fd)
            self.writer = self._writer(fd, me)
        except BaseException:
            self._give_up(fd, me)
            raise
        self._tell()

    def _find(self, fd: int) -> Found:
        found = Found.in_file(fd, self.path)
        if found.belonging is not None:
            self._check(found.belonging)
        items = self._wanted.items
        if items is not None and found.highest >= items:
            raise CheckpointMismatch(
                f"the checkpoint {self._shown} belongs to another map: it holds item "
                f"{found.highest}, and this one has {items} items",
                self.path,
                f"{found.belonging}",
                f"{self._wanted}",
            )
        if os.fstat(fd).st_size > found.end:
            os.ftruncate(fd, found.end)  # what a killed writer has left unfinished
        return found

    def _writer(self, fd: int, me: owner.Owner) -> Writer:
        """Make the writer; a new file first says whose it is."""
        end = self.found.end
        if self.found.belonging is None:
            body = records.payload(records.MAP, time.time(), 0, self._wanted.to_json())
            frame = records.framed(body, HEAD)
            records.write(fd, frame, HEAD)
            end = HEAD + len(frame)
        return Writer(fd, self.path, me, end, keyed=self._wanted.keyed, say=self._say)

    def _give_up(self, fd: int, me: owner.Owner) -> None:
        try:
            now = owner.read_owner(fd)
            if now is not None and now.token == me.token:
                owner.write_owner(fd, None)
        except OSError:  # the error that led here says more
            pass
        finally:
            os.close(fd)

    def _tell(self) -> None:
        found, known = self.found, self.found.belonging
        if known is None or not found.count:
            return
        of = "" if self._wanted.items is None else f" of {self._wanted.items}"
        text = f"hpcdist: {self._shown}: {found.count}{of} items are finished and do not run again"
        if belonging.was_changed(known, self._wanted):
            text += f". {known.function} was changed since: remove the file to run them again"
        self._say(text)

    def end(self) -> None:
        """Write what is left, and give the file up."""
        self.writer.close()
