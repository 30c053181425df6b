"""What hpcdist says about itself: single lines on stderr, from HPCDIST_LOG's level upwards.

Where the program has set `logging` up, they are records of the logger "hpcdist" instead. Importing
`logging` here would cost every worker more than this package's own start.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False  # of `typing`, whose import costs every worker

if TYPE_CHECKING:
    import logging

_LEVELS = ("debug", "info", "warning")
_NUMBERS = {"debug": 10, "info": 20, "warning": 30}  # of `logging`


class _Threshold:
    """The level from which lines are written, looked up at the first question."""

    def __init__(self) -> None:
        self._level: int | None = None

    def reached_by(self, level: str) -> bool:
        if self._level is None:
            self._level = _configured()
        return _LEVELS.index(level) >= self._level


_threshold = _Threshold()


def enabled(level: str) -> bool:
    """Tell whether lines of this level are written; worth asking before composing a costly one."""
    if _threshold.reached_by(level):
        return True
    logger = _logger()
    return logger is not None and logger.isEnabledFor(_NUMBERS[level])


def log(level: str, text: str) -> None:
    """Write `text` as one time-stamped line, or as a record; `level` is debug, info or warning."""
    if not enabled(level):
        return
    logger = _logger()
    if logger is not None:
        record = logger.makeRecord("hpcdist", _NUMBERS[level], __file__, 0, text, (), None)
        logger.handle(record)
        return
    if sys.stderr is None:
        return
    now = time.time()
    stamp = time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03d}"
    line = text.rstrip("\n").replace("\n", "\\n")
    try:
        sys.stderr.write(f"{stamp} hpcdist[{os.getpid()}] {level}: {line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # A closed stderr is no reason to fail.
        pass


def _logger() -> logging.Logger | None:
    """Return the logger "hpcdist" if somebody has set `logging` up."""
    module = sys.modules.get("logging")
    if module is None:
        return None
    logger: logging.Logger = module.getLogger("hpcdist")
    return logger if logger.hasHandlers() else None


def _configured() -> int:
    from hpcdist._config import setting

    try:
        return _LEVELS.index(setting("log"))
    except (OSError, ValueError):  # The wrong setting is an error where it is asked for, not here.
        return _LEVELS.index("warning")
