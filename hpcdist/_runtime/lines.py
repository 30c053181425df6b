"""The calls of one object: its methods run one at a time, in the order they came.

`Turns` asks a call's line before it starts the call, and keeps it up to date, under its own lock.
"""

from __future__ import annotations


class Line:
    """Whether a method of one object may start."""

    __slots__ = ("beginning", "busy")

    def __init__(self) -> None:
        self.busy = False  # a method runs, and does not wait for something of ours
        self.beginning = 0  # coroutines that have not come to their first `await`

    @property
    def is_free(self) -> bool:
        """Whether the next method may start."""
        return not self.busy and not self.beginning
