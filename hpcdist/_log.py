"""What hpcdist says about itself: single lines on stderr, from HPCDIST_LOG's level upwards.

Not `logging`: importing it would cost every worker more than this package's own start.
"""

from __future__ import annotations

import os
import sys
import time

_LEVELS = ("debug", "info", "warning")
_threshold: int | None = None


def enabled(level: str) -> bool:
    """Tell whether lines of this level are written; worth asking before composing a costly one."""
    global _threshold
    if _threshold is None:
        _threshold = _configured()
    return _LEVELS.index(level) >= _threshold


def log(level: str, text: str) -> None:
    """Write `text` as one time-stamped line; `level` is debug, info or warning."""
    if not enabled(level) or sys.stderr is None:
        return
    now = time.time()
    stamp = time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03d}"
    line = text.rstrip("\n").replace("\n", "\\n")
    try:
        sys.stderr.write(f"{stamp} hpcdist[{os.getpid()}] {level}: {line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # A closed stderr is no reason to fail.
        pass


def _configured() -> int:
    from hpcdist._config import setting

    try:
        return _LEVELS.index(setting("log"))
    except (OSError, ValueError):  # Whoever asks for the setting that is wrong is told; not here.
        return _LEVELS.index("warning")
