"""The bar of `progress=True`: tqdm's on a terminal and in a notebook, else a line now and then."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from hpcdist._monitor import output
from hpcdist._remote.calls import Calls
from hpcdist._runtime.node import Node, Service
from hpcdist._transport.machine import Machine

_LINE_EVERY = 10.0  # seconds
_TELL_EVERY = 0.2
_MISSING = (
    "progress=True shows its bar by tqdm, which is not installed: pip install 'hpcdist[progress]'"
)


class Watched(Protocol):
    """What a bar asks of a map."""

    @property
    def workers(self) -> int:
        """How many workers it has."""

    failures: int


class Bar:
    """No bar."""

    def watch(self, engine: Watched) -> None:
        """Know the map whose failures and workers are shown."""

    def sink(self, sink: Callable[[int, list[Any]], None]) -> Callable[[int, list[Any]], None]:
        """Count what goes into a sink."""
        return sink

    def add(self, count: int) -> None:
        """Count items that are done."""

    def failed(self) -> None:
        """Count an item that failed."""

    def close(self) -> None:
        """Leave the bar as it is."""


class _Counting(Bar):
    """Counts; others show it."""

    def __init__(self, machine: Machine, total: int | None) -> None:
        self._total = total
        self._done = 0
        self._failures = 0
        self._watched: Watched | None = None
        self._lock = machine.rlock()  # guards the count, which several threads may add to

    def watch(self, engine: Watched) -> None:
        self._watched = engine

    def sink(self, sink: Callable[[int, list[Any]], None]) -> Callable[[int, list[Any]], None]:
        def counted(start: int, results: list[Any]) -> None:
            sink(start, results)
            self.add(len(results))

        return counted

    def failed(self) -> None:
        self._failures += 1

    def _facts(self) -> dict[str, int]:
        watched = self._watched
        if watched is None:
            return {"failures": self._failures, "workers": 1}
        return {"failures": watched.failures, "workers": watched.workers}


class _Tqdm(_Counting):
    """A bar of tqdm's."""

    def __init__(self, machine: Machine, kind: Any, total: int | None, **more: Any) -> None:
        super().__init__(machine, total)
        self._bar = kind(total=total, unit="item", **more)

    def add(self, count: int) -> None:
        with self._lock:
            self._bar.set_postfix(**self._facts(), refresh=False)
            self._bar.update(count)

    def close(self) -> None:
        with self._lock:
            self._bar.set_postfix(**self._facts(), refresh=False)
            self._bar.close()


class _Lines(_Counting):
    """Lines in a log file: none for what is over soon."""

    def __init__(self, machine: Machine, total: int | None, every: float = _LINE_EVERY) -> None:
        super().__init__(machine, total)
        self._every = every
        self._now = machine.now
        self._start = self._said = self._now()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = self._now()
            if now - self._said >= self._every:
                self._said = now
                self._say(now)

    def close(self) -> None:
        with self._lock:
            if self._said > self._start:
                self._say(self._now())

    def _say(self, now: float) -> None:
        of = "" if self._total is None else f" of {self._total}"
        facts = ", ".join(f"{name}={value}" for name, value in self._facts().items())
        rate = self._done / max(now - self._start, 1e-9)
        output.say(f"hpcdist: {self._done}{of} items, {rate:.3g} items/s, {facts}")


def bar(machine: Machine, total: int | None) -> Bar:
    """Make the bar for so many items, where there is somebody to see it."""
    if sys.stderr is None:
        return Bar()
    if _in_notebook():
        return _in_a_notebook(machine, total)
    if not sys.stderr.isatty():
        return _Lines(machine, total)
    return _Tqdm(machine, _quiet(_tqdm()), total, file=sys.stderr, **_width())


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(_MISSING) from None
    return tqdm


def _quiet(kind: Any) -> Any:
    """Make a kind of bar without the thread that would outlive the map."""
    return type("Quiet", (kind,), {"monitor_interval": 0})


def _in_notebook() -> bool:
    """Tell whether a Jupyter kernel shows what we print."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def _in_a_notebook(machine: Machine, total: int | None) -> Bar:
    text = _tqdm()
    if find_spec("ipywidgets") is None:
        return _Tqdm(machine, _quiet(text), total, file=sys.stderr, ncols=100, nrows=24)
    from tqdm.notebook import tqdm_notebook

    return _Tqdm(machine, _quiet(tqdm_notebook), total)


def _width() -> dict[str, Any]:
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 100, "nrows": 24}


# Loops: their workers tell how far they are


class Place(NamedTuple):
    """Where the workers of a loop say how far they are."""

    pid: int
    number: int


class LoopBar:
    """The bar of a loop."""

    def __init__(self, loop_bars: LoopBars, place: Place, total: int, workers: int) -> None:
        self.place = place
        self.workers = workers
        self.failures = 0
        self._loop_bars = loop_bars
        self._left = total
        self._bar = bar(loop_bars.node.machine, total)
        self._bar.watch(self)

    def count(self, items: int) -> None:
        """Take note of items that are done."""
        self._left -= items
        self._bar.add(items)

    def end(self, failures: int) -> None:
        """Leave the bar as it is; what workers have to tell may still be on its way."""
        if not self._loop_bars.forget(self.place):
            return
        self.failures = failures
        if not failures:
            self._bar.add(self._left)
        self._bar.close()


class LoopBars(Service):
    """The bars of the loops that go on, and what this process tells those of others."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._calls = node.service(Calls)
        self._shown: dict[Place, LoopBar] = {}

    def show(self, total: int, workers: int) -> LoopBar:
        """Show the bar of a loop, until its end."""
        place = Place(self.node.me, next(self.node.ids))
        self._shown[place] = LoopBar(self, place, total, workers)
        return self._shown[place]

    def forget(self, place: Place) -> bool:
        """Take in nothing more for a bar; tell whether it was shown until now."""
        return self._shown.pop(place, None) is not None

    @contextmanager
    def of_loop(self, total: int, workers: int, progress: bool) -> Iterator[Place | None]:
        """Show the bar of a loop while it runs, if that is wanted."""
        shown = self.show(total, workers) if progress else None
        failures = 1
        try:
            yield None if shown is None else shown.place
            failures = 0
        finally:
            if shown is not None:
                shown.end(failures)

    def count(self, place: Place, items: int) -> None:
        """Take note of items that a worker has done."""
        shown = self._shown.get(place)
        if shown is not None:
            shown.count(items)

    # The workers

    def reported(self, place: Place, items: Iterator[object]) -> Iterator[Any]:
        """Say now and then how many of these are done."""
        now = self.node.machine.now
        done, due = 0, now() + _TELL_EVERY
        for item in items:
            yield item
            done += 1
            if now() > due:
                self._report(place, done)
                done, due = 0, now() + _TELL_EVERY
        self._report(place, done)

    def _report(self, place: Place, items: int) -> None:
        if items:
            self._calls.tell(_count, place.pid, (place, items), {})


def _count(place: Place, items: int) -> None:
    LoopBars.here().count(place, items)
