"""One line at the foot of a terminal that says how things stand, as long as somebody waits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from hpcdist._runtime.node import Node, Service

_CLEAR = "\r\x1b[K"


class StatusLine(Service):
    """The line, which all that hpcdist prints goes above. It is shown on terminals only."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.rlock()  # guards the text, and what stands in the terminal
        self._text = ""

    def show(self, text: str) -> None:
        """Show this in place of what is there; "" takes it away."""
        stream = sys.stderr
        if stream is None or not stream.isatty() or _has_bars():
            text = ""
        text = text[: _columns(stream) - 1]  # a line that wraps could not be taken away
        with self._lock:
            if text != self._text:
                self._text = text
                _write(stream, f"{_CLEAR}{text}")

    @contextmanager
    def taken_off(self, stream: TextIO) -> Iterator[None]:
        """Take it away while whole lines are written to a terminal."""
        with self._lock:
            shown = bool(self._text) and stream.isatty()
            if shown:
                _write(sys.stderr, _CLEAR)
            try:
                yield
            finally:
                if shown:
                    _write(sys.stderr, self._text)


def _columns(stream: TextIO | None) -> int:
    try:
        columns = 0 if stream is None else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0
    return columns or 80


def _has_bars() -> bool:
    """Tell whether bars of tqdm's are there, which say how far a map is."""
    kind = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return bool(getattr(kind, "_instances", None))


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):  # closed: there is nobody to read it
        pass
