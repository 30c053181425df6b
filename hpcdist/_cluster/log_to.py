"""`log_to()`: the workers' records of `logging` arrive in process 1's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from hpcdist._monitor.crowds import WINDOW, Crowds
from hpcdist._public import public
from hpcdist._runtime.node import Mail, Node, Service, here, on
from hpcdist._wire.messages import ForwardRecords, Line, Records

if TYPE_CHECKING:
    import logging

_WARNING = 30
_FALLBACK = "%(levelname)s %(processName)s (%(host)s) %(name)s: %(message)s"


class Sink(NamedTuple):
    """Where records go."""

    logger: logging.Logger | None  # None: the logger of the record's own name
    level: int


class LoggedByWorkers(Service):
    """The records of workers, on process 1, and those who have asked for them."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._sinks: list[Sink] = []
        self._fallback: logging.Handler | None = None
        self._lock = node.machine.lock()  # guards the crowds
        self._crowds = Crowds(node.machine.now)
        self._settles = False
        node.on_join.append(self._on_join)

    def add(self, sink: Sink) -> None:
        """Have records go to one more place."""
        self._sinks.append(sink)
        self._tell_all()

    def remove(self, sink: Sink) -> None:
        """Have them no longer go there."""
        if sink in self._sinks:
            self._tell_of_crowds(everything=True)
            self._sinks.remove(sink)
            self._tell_all()

    def _tell_all(self) -> None:
        level = self._level()
        for pid in list(self.node.members.living):
            self.node.send(pid, ForwardRecords(level))
        self.node.progress.soon()

    def _level(self) -> int:
        return min((sink.level for sink in self._sinks), default=0)

    def _on_join(self, pid: int) -> None:
        if self._sinks:
            self.node.send(pid, ForwardRecords(self._level()))
            self.node.progress.soon()

    @on(Records)
    def _on_records(self, said: Records, mail: Mail) -> None:
        pid = mail.peer.pid
        for line in said.lines:
            with self._lock:
                held = self._crowds.take(pid, line)
            if not held:
                self._hand_out(pid, line)
        if said.left_out:
            what = f"{said.left_out:,} more records of worker {pid} were left out: it logs too many"
            self._hand_out(pid, Line("hpcdist", _WARNING, text=what))
        if len(self._crowds) and not self._settles:
            self._settles = True
            self.node.progress.call_later(WINDOW, self._settle)

    def _settle(self) -> None:
        self._settles = False
        self._tell_of_crowds()
        if len(self._crowds):
            self._settles = True
            self.node.progress.call_later(WINDOW, self._settle)

    def _tell_of_crowds(self, *, everything: bool = False) -> None:
        with self._lock:
            found = self._crowds.settle(everything=everything)
        for line, pids in found:
            self._hand_out(pids[-1], line, pids)

    def _hand_out(self, pid: int, line: Line, pids: tuple[int, ...] = ()) -> None:
        """Make a record of a worker's line, or of that of several, and have it handled."""
        import logging

        member = self.node.members.living.get(pid)
        made = {
            "name": line.name,
            "levelno": line.level,
            "levelname": logging.getLevelName(line.level),
            "pathname": line.path,
            "filename": line.path.rpartition("/")[2],
            "module": line.path.rpartition("/")[2].removesuffix(".py"),
            "lineno": line.number,
            "funcName": line.function,
            "msg": line.text,
            "exc_text": line.trace or None,
            "threadName": line.thread,
            "process": line.process,
            "processName": f"worker {pid}",
            "pid": pid,
            "pids": pids or (pid,),
            "host": member.host if member is not None else "",
        }
        record = logging.makeLogRecord({**dict(line.extra), **made})
        if line.created:
            record.created = line.created
            record.msecs = line.created % 1 * 1000
        for sink in list(self._sinks):
            if line.level >= sink.level:
                self._hand(record, sink.logger or logging.getLogger(line.name))

    def _hand(self, record: logging.LogRecord, logger: logging.Logger) -> None:
        """Have a record handled; on stderr, where nobody has set `logging` up."""
        if logger.hasHandlers():
            logger.handle(record)
            return
        if self._fallback is None:
            import logging

            self._fallback = logging.StreamHandler()
            self._fallback.setFormatter(logging.Formatter(_FALLBACK))
        self._fallback.handle(record)


@public
def log_to(
    logger: logging.Logger | str | None = None, level: int | str = "INFO"
) -> Callable[[], None]:
    """Have what the workers log arrive in this process's `logging`, and their warnings too.

    Each record arrives under its own logger's name, with `.pid` and `.host` of its worker, in the
    order in which that worker made them: those of a call before its result. A worker sends at most
    1,000 records a second; what was left out is counted, and equal records in a row are folded.
    Where more than three workers log the same within a second, the others are one record, which
    says how many they are and has their `.pids`.
    Workers that join later are included.

    Handlers are called on the thread that receives messages: they must not wait for a worker.

    Args:
        logger: The logger whose handlers get them, whatever the records' own loggers are.
        level: The least level that is sent, such as "DEBUG", or a number.

    Returns:
        A function that ends it.

    Example:
        >>> import hpcdist
        >>> stop = hpcdist.log_to(level="WARNING")
        >>> stop()
    """
    import logging

    node = here.node
    node.admit()
    if node.me != 1:
        raise RuntimeError("Only process 1 receives what workers log")
    if logger is not None and not isinstance(logger, (str, logging.Logger)):
        raise TypeError(f"logger is a logger or its name, not {logger!r}")
    node.start()
    given = logging.getLogger(logger) if isinstance(logger, str) else logger
    sink = Sink(given, _number(level))
    records = node.service(LoggedByWorkers)
    records.add(sink)
    return lambda: records.remove(sink)


def _number(level: int | str) -> int:
    import logging

    if isinstance(level, str):
        names = logging.getLevelNamesMapping()
        if level.upper() not in names:
            raise ValueError(f"level is one of {', '.join(names)}, not {level!r}")
        return max(names[level.upper()], 1)
    if isinstance(level, bool) or not isinstance(level, int):
        raise TypeError(f"level is a name or a number, not {level!r}")
    if level < 0:
        raise ValueError(f"level is at least 0, not {level}")
    return max(level, 1)  # 0 would be nothing at all
