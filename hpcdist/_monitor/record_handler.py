"""The handler of `logging` that passes a worker's records on."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hpcdist._runtime.node import Node, here
from hpcdist._wire.messages import Line

_PLAIN = (str, int, float, bool, type(None))
_OF_EVERY_RECORD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}
_format = logging.Formatter()


class _Forwarding(logging.Handler):
    """Passes the records of one process on."""

    def __init__(self, node: Node, send: Callable[[Line], None]) -> None:
        super().__init__()
        self._node = node
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on as texts and numbers, whatever its arguments are."""
        if here.node is not self._node:  # of another process, in a simulation
            return
        try:
            self._send(_line_of(record))
        except Exception:
            self.handleError(record)


def _line_of(record: logging.LogRecord) -> Line:
    trace = record.exc_text or ""
    if record.exc_info and not trace:
        trace = _format.formatException(record.exc_info)
    if record.stack_info:
        trace = "\n".join(filter(None, (trace, record.stack_info)))
    extra = tuple(
        (name, value)
        for name, value in record.__dict__.items()
        if name not in _OF_EVERY_RECORD and type(value) in _PLAIN
    )
    return Line(
        record.name,
        record.levelno,
        record.pathname,
        record.lineno,
        record.funcName or "",
        record.getMessage(),
        trace,
        extra,
        record.created,
        record.threadName or "",
        record.process or 0,
    )


def install(node: Node, level: int, send: Callable[[Line], None]) -> Callable[[], None]:
    """Pass records and warnings on from a level on; return what ends that."""
    root = logging.getLogger()
    handler, before = _Forwarding(node, send), root.level
    handler.setLevel(level)
    root.addHandler(handler)
    root.setLevel(min(level, before))
    logging.captureWarnings(True)

    def stop() -> None:
        root.removeHandler(handler)
        root.setLevel(before)
        logging.captureWarnings(False)

    return stop
