"""States that only move forward, as their tables say."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

S = TypeVar("S", bound=enum.Enum)


class Moving(Generic[S]):
    """Where something is in its life.

    Args:
        table: Which states may follow each.
        first: Where it begins.
    """

    __slots__ = ("_table", "now")

    def __init__(self, table: Mapping[S, Collection[S]], first: S) -> None:
        self._table = table
        self.now = first

    def to(self, state: S) -> bool:
        """Go on to a state; tell whether that is forward: nothing else is done."""
        if state not in self._table[self.now]:
            return False
        self.now = state
        return True


def in_order(kind: type[S]) -> dict[S, frozenset[S]]:
    """Let each state be followed by any of those below it.

    >>> Two = enum.Enum("Two", "A B")
    >>> in_order(Two) == {Two.A: {Two.B}, Two.B: set()}
    True
    """
    states = list(kind)
    return {state: frozenset(states[k + 1 :]) for k, state in enumerate(states)}
