"""What a map does with its checkpoint: leave out what is finished, keep what finishes."""

from __future__ import annotations

import os
from collections.abc import Callable
from os import PathLike
from typing import Any

from hpcdist._checkpoints import records
from hpcdist._checkpoints.belonging import Belonging, describe
from hpcdist._checkpoints.session import Session
from hpcdist._maps.engine import Engine
from hpcdist._maps.lanes import Batch, Early
from hpcdist._maps.map_worker import Report
from hpcdist._maps.remaining import Remaining, RemainingByKey
from hpcdist._maps.sources import Source
from hpcdist._monitor import output
from hpcdist._wire import codec
from hpcdist._wire.frames import FAILED, OURS, OUTCOME, REFS

Sink = Callable[[int, list[Any]], None]
Key = Callable[[Any], Any]


class Keeping:
    """The checkpoint of a map that has none: everything is to run, and nothing is kept.

    Attributes:
        seed: Of the map, where the file has one.
        given: How many finished items the map has been given.
    """

    seed: int | None = None
    given = 0

    def begin(self, source: Source) -> Source:
        """Give the items that are to run."""
        return source

    def sink(self, sink: Sink) -> Sink:
        """Keep what goes into a sink."""
        return sink

    def watch(self, engine: Engine) -> None:
        """Keep also what an engine has got and not filed yet."""

    def has(self, index: int | None = None) -> bool:
        """Tell whether items have been found finished: any, or from an index on."""
        return False

    def take(self, index: int | None = None) -> tuple[int, list[Any]] | None:
        """Take the results of such items, with the index of the first; None if there are none."""
        return None

    def end(self) -> None:
        """Write what is left."""


class InFile(Keeping):
    """A checkpoint in a file.

    Args:
        path: The file.
        key: Gives an item's key; None: items go by index.
        f: The function of the map.
        size: How many items there are, where that is known.
        seed: Of the map.
        seeded: Whether the user has chosen it.
    """

    def __init__(
        self,
        path: str,
        key: Key | None,
        f: Callable[..., Any],
        size: int | None,
        seed: int,
        *,
        seeded: bool,
    ) -> None:
        belonging = Belonging(describe(f), size, key is not None, seed)
        self._session = Session(path, belonging, seeded=seeded, say=output.say)
        self.seed = self._session.seed
        self._key = key
        self._source: Remaining | None = None
        self._engine: Engine | None = None
        self._waited: set[Any] = set()  # answers that had not been filed at the last look
        self._seen: set[Any] = set()  # those among them that have been read
        # Of batches that are being kept early, by the index of the first item: who keeps them.
        self._early: set[int] = set()
        self._keepers: dict[int, str] = {}

    def begin(self, source: Source) -> Source:
        """Open the file, and give the items that are to run."""
        self._session.begin()
        found = self._session.found
        if self._key is None:
            self._source = Remaining(source, found)
        else:
            self._source = RemainingByKey(source, found, self._key)
        return self._source

    def end(self) -> None:
        """Write what is left."""
        if self._source is not None:
            self._engine = None
            self._session.end()
            self._waited, self._seen = set(), set()

    # What was found

    def has(self, index: int | None = None) -> bool:
        """Tell whether items have been found finished: any, or from an index on."""
        if self._source is None or not self._source.finished:
            return False
        return index is None or self._source.finished[0].start == index

    def take(self, index: int | None = None) -> tuple[int, list[Any]] | None:
        """Take the results of such items, with the index of the first; None if there are none."""
        if self._source is None or not self.has(index):
            return None
        run = self._source.finished.popleft()
        self.given += run.size
        return run.start, run.results()

    # What finishes

    def sink(self, sink: Sink) -> Sink:
        """Keep what goes into a sink, before its owner may change it."""

        def kept(start: int, results: list[Any]) -> None:
            if not self._was_kept_early(start):
                self._session.writer.add(self._names(start, len(results)), results)
            if isinstance(self._source, RemainingByKey):
                self._source.forget(start, len(results))
            sink(start, results)

        return kept

    def _names(self, start: int, count: int) -> Any:
        source = self._source
        return [*source.keys_of(start, count)] if isinstance(source, RemainingByKey) else start

    # What has arrived, and is not filed because the map waits for the user's program

    def watch(self, engine: Engine) -> None:
        """Keep also what an engine has got and not filed yet."""
        assert self._source is not None
        self._engine = engine
        self._source.on_finished = engine.poke
        self._session.writer.look = self._look

    def _look(self) -> None:
        """Keep the results in answers that have been there since the last look.

        Between two `next` of an `imap` the user's program may take hours, and its iterator in the
        middle of a map, too. The writer's thread calls this, beside the thread that maps.
        """
        engine = self._engine
        if engine is None:
            return
        try:
            arrived = [*engine._arrived]
        except RuntimeError:  # they changed meanwhile: so they are being filed
            arrived = []
        waiting = [what for what in arrived if type(what) is Early or _has_come(what)]
        for what in waiting:
            if what in self._waited and what not in self._seen:
                self._seen.add(what)
                self._keep_early(what, engine)
        self._waited = set(waiting)
        self._seen &= self._waited

    def _keep_early(self, what: Batch | Early, engine: Engine) -> None:
        try:
            start, results = _results_of(what)
            names, packed = self._names(start, len(results)), records.pack_values(results)
        except Exception:  # the thread that maps will tell
            return
        if not results:
            return
        self._early.add(start)
        if what not in engine._arrived:  # its sink may have looked before we said so
            self._early.discard(start)
        # Of the two threads, the one that enters itself first keeps it. Nobody has seen the results
        # before: so they are as they came.
        elif self._keepers.setdefault(start, "early") == "early":
            self._session.writer.add_packed(names, len(results), packed)

    def _was_kept_early(self, start: int) -> bool:
        if start not in self._early:
            return False
        return self._keepers.setdefault(start, "sink") == "early"


def _has_come(what: object) -> bool:
    return type(what) is Batch and what.error is None


def _results_of(what: Batch | Early) -> tuple[int, list[Any]]:
    """Decode the results in an answer, with the index of the first item.

    None where they are no plain values.
    """
    if isinstance(what, Early):
        return what.batch.start + what.first, codec.loads(what.body, what.buffers)
    flags, body, buffers = what.value
    if flags & OUTCOME == FAILED or flags & REFS:
        return what.start, []
    answer = body if flags & OUTCOME == OURS else codec.loads(body, buffers) if len(body) else None
    if not answer:
        return what.start, []
    report = Report(*answer)
    return what.start + report.first, report.results


def keeping(
    checkpoint: str | PathLike[str] | None,
    key: Key | None,
    f: Callable[..., Any],
    size: int | None,
    seed: int,
    *,
    seeded: bool,
) -> Keeping:
    """Make what keeps a map's results, from its keywords."""
    if checkpoint is None:
        if key is not None:
            raise ValueError("key= names the items of a checkpoint: give checkpoint= a file, too")
        return Keeping()
    if key is not None and not callable(key):
        raise TypeError(f"key is a function, not {key!r}")
    path = os.fspath(checkpoint) if isinstance(checkpoint, str | PathLike) else None
    if not isinstance(path, str) or not path:
        raise TypeError(f"checkpoint is the name of a file, not {checkpoint!r}")
    return InFile(path, key, f, size, seed, seeded=seeded)
