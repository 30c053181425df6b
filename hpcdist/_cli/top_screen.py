"""`hpcdist top` on a terminal: a picture every second, and what the keys do."""

from __future__ import annotations

import os
import select
import shutil
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Any

from hpcdist._cli.onlooking import PATIENCE, read
from hpcdist._cli.schedulers import print_line
from hpcdist._cli.top_page import SORTS, page
from hpcdist._events.windows import Closed, FolderView, View
from hpcdist._numbers import whole

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, no cursor
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_ASK_EVERY = 2.0
_LATE = 4.0  # seconds without a new picture after which that is said
_ESCAPE, _BACK = "\x1b", ("\x7f", "\x08")


class Screen:
    """A terminal whose other screen is ours for a while."""

    def __enter__(self) -> Screen:
        self._keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        if self._keys is not None:
            self._before = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys)
        sys.stdout.write(_ENTER)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._keys is not None:
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._before)
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()

    def size(self) -> tuple[int, int]:
        """Return columns and lines."""
        columns, lines = shutil.get_terminal_size()
        return max(columns, 1), max(lines, 1)

    def draw(self, lines: list[str]) -> None:
        """Show lines in place of what was there."""
        _, height = self.size()
        text = f"{_END_OF_LINE}\r\n".join(lines[:height])
        sys.stdout.write(f"{_HOME}{text}{_END_OF_LINE}{_BELOW}")
        sys.stdout.flush()

    def key(self, seconds: float) -> str:
        """Return what was typed within so many seconds."""
        if self._keys is None:
            time.sleep(seconds)
            return ""
        if not select.select([self._keys], [], [], seconds)[0]:
            return ""
        typed = os.read(self._keys, 64).decode(errors="replace")
        return typed or "q"  # the terminal is gone


class Top:
    """What is shown, and what the keys have changed about it."""

    def __init__(self, view: View | FolderView) -> None:
        self._view = view
        self._seen: dict[str, Any] | None = None
        self._came = time.monotonic()
        self._asked = float("-inf")
        self._sort = "pid"
        self._word = ""
        self._typing = ""  # for what, "/" or "k"
        self._typed = ""
        self._stacks_of = 0
        self._held = False
        self.over = False

    def look(self) -> None:
        """Take in the newest picture.

        Raises:
            Closed: The driver is gone.
        """
        now = time.monotonic()
        if now - self._asked > _ASK_EVERY:
            self._asked = now
            self._view.ask(self._stacks_of)
        seen = read(self._view)
        if seen is not None and not self._held and seen != self._seen:
            self._seen, self._came = seen, now

    def typed(self, keys: str) -> None:
        """Do what keys are for."""
        if keys == _ESCAPE:
            self._word = "" if self._typing == "/" else self._word
            self._typing, self._stacks_of = "", 0
        for key in "" if keys.startswith(_ESCAPE) else keys:  # a key of several: an arrow, say
            if self._typing:
                self._type(key)
            else:
                self._press(key)

    def _type(self, key: str) -> None:
        if key in "\r\n":
            if self._typing == "k":
                self._stacks_of = whole(self._typed) or 0
                self._asked = float("-inf")  # at once
            self._typing = ""
        elif key in _BACK:
            self._typed = self._typed[:-1]
        elif key.isprintable():
            self._typed += key
        if self._typing == "/":
            self._word = self._typed

    def _press(self, key: str) -> None:
        if key in "qQ\x03\x04":
            self.over = True
        elif key == "s":
            names = list(SORTS)
            self._sort = names[(names.index(self._sort) + 1) % len(names)]
        elif key in "/k":
            self._typing, self._typed = key, ""
            self._word = self._word if key == "k" else ""
        elif key == " ":
            self._held = not self._held

    def lines(self, width: int, height: int) -> list[str]:
        """Lay out what is to be shown."""
        if self._seen is None:
            waits = time.monotonic() - self._came > PATIENCE
            return [("the driver does not answer" if waits else "waiting for the driver")[:width]]
        room = max(height - 1, 1)
        if self._stacks_of:
            text = self._seen["stacks"].get(str(self._stacks_of), "(no such process, or not yet)")
            told = [line[:width] for line in text.splitlines()[-room:]]
            return [*told, f"stacks of {self._stacks_of}: Esc goes back"[:width]]
        shown = page(self._seen, width, height=room, sort=self._sort, word=self._word)[:room]
        return [*shown, self._foot()[:width]]

    def _foot(self) -> str:
        if self._typing:
            return f"/{self._typed}" if self._typing == "/" else f"stacks of: {self._typed}"
        parts = ["q quit  s sort  / filter  k stacks  space hold", f"by {self._sort}"]
        if self._word:
            parts.append(f"/{self._word}")
        if self._held:
            parts.append("HELD")
        elif (late := time.monotonic() - self._came) > _LATE:
            parts.insert(0, f"NO ANSWER FOR {late:.0f} s")
        return "  ".join(parts)


def watch(view: View | FolderView) -> int:
    """Show the picture until a key, Ctrl-C, or the driver's end."""
    top = Top(view)
    try:
        with Screen() as screen:
            while not top.over:
                top.look()
                screen.draw(top.lines(*screen.size()))
                top.typed(screen.key(0.25))
    except Closed:
        print_line("hpcdist top: the driver has ended")
    return 0
