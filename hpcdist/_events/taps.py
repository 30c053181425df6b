"""Taps: functions put around methods of single objects for a while.

So what is to be noted in a trace costs nothing where there is none: not even a question.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import Any

Wrapper = Callable[[Any], Any]  # takes what was there, returns what takes its place


class Taps:
    """What is around methods and entries at present."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def method(self, owner: object, name: str, wrapper: Wrapper) -> None:
        """Put a function around a method of one object, or around what an attribute holds."""
        mine = vars(owner)
        inner = getattr(owner, name)
        if name in mine:
            self._undo.append(lambda: mine.__setitem__(name, inner))
        else:
            self._undo.append(lambda: mine.pop(name, None))
        mine[name] = wrapper(inner)

    def entry(self, table: MutableMapping[Any, Any], key: Hashable, wrapper: Wrapper) -> None:
        """Put a function around an entry of a table."""
        inner = table[key]
        self._undo.append(lambda: table.__setitem__(key, inner))
        table[key] = wrapper(inner)

    def remove(self) -> None:
        """Take all of them off again, the last first."""
        while self._undo:
            self._undo.pop()()
