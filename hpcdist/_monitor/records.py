"""A worker's records of `logging`, which it sends to process 1 if `log_to()` asks for them.

`logging` is imported when it is asked for: it would cost every worker more than its own start.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._wire.messages import ForwardRecords, Line, Records

_MOST = 1000  # records that a worker sends in a second
_WINDOW = 1.0  # seconds within which equal records are folded, and what was left out is told
_WARNING = 30
_LAST_WORDS = 0.05  # seconds


class Sieve:
    """Leaves out what is too much: records beyond so many a second, and equal ones in a row.

    Args:
        clock: Tells the time.
        most: How many records pass in a second.
    """

    def __init__(self, clock: Callable[[], float], most: int = _MOST) -> None:
        self._clock = clock
        self._most = most
        self._key: object = None  # what the last record said
        self._shown_at = 0.0  # when it passed
        self._last: Line | None = None  # the last of those folded into it
        self._folded = 0
        self._second = clock()
        self._passed = 0  # in this second
        self._left_out = 0

    @property
    def holds(self) -> bool:
        """Whether there is something to be told later."""
        return bool(self._folded or self._left_out)

    def take(self, line: Line) -> list[Line]:
        """Take a record; return what is to be sent now."""
        now = self._clock()
        key = line._replace(created=0.0, thread="")
        if key == self._key and now - self._shown_at < _WINDOW:
            self._last = line
            self._folded += 1
            return []
        found = self._unfold()
        self._key, self._shown_at = key, now
        if now - self._second >= 1.0:
            self._second, self._passed = now, 0
        if self._passed >= self._most:
            self._left_out += 1
            return found
        self._passed += 1
        return [*found, line]

    def settle(self) -> Records:
        """Return what has been held back, and how many records were left out."""
        lines, left_out = self._unfold(), self._left_out
        self._key, self._left_out = None, 0
        return Records(lines, left_out)

    def _unfold(self) -> list[Line]:
        if self._last is None:
            return []
        line, times = self._last, self._folded
        self._last, self._folded = None, 0
        return [line._replace(text=f"{line.text} ({times} more like it)")]


class LoggedRecords(Service):
    """Sends the records of this worker to process 1, from the level on that it asks for."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.lock()  # guards the sieve, and the order of what is sent
        self._sieve = Sieve(node.machine.now)
        self._settles = False
        self._stop: Callable[[], None] | None = None

    @on(ForwardRecords)
    def _on_forward(self, said: ForwardRecords, mail: Mail) -> None:
        from hpcdist._monitor.record_handler import install

        if self._stop is not None:
            self._stop()
        self._stop = install(self.node, said.level, self.send) if said.level else None

    def send(self, line: Line) -> None:
        """Send a record to process 1, unless it is one too many."""
        with self._lock:
            lines = self._sieve.take(line)
            if lines:
                self._post(Records(lines, 0))
            waits = self._sieve.holds and not self._settles
            self._settles = self._settles or waits
        if waits:
            self.node.progress.call_later(_WINDOW, self._settle)
        if lines:  # warnings may be last words: they leave before this thread goes on
            self.node.progress.nudge(_LAST_WORDS if line.level >= _WARNING else 0.0)

    def _settle(self) -> None:
        with self._lock:
            self._settles = False
            self._post(self._sieve.settle())
        self.node.progress.soon()

    def _post(self, records: Records) -> None:
        master = self.node.peers.get(1)
        if master is not None and master.alive:
            master.send(records)
