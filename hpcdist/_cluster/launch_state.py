"""Where a launch is."""

from __future__ import annotations

import enum


class LaunchState(enum.Enum):
    """Where a launch is. A scheduler's own word is one too: `LaunchState("CONFIGURING")`."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @classmethod
    def _missing_(cls, value: object) -> LaunchState:
        word = object.__new__(cls)
        word._name_ = word._value_ = str(value)
        return cls._value2member_map_.setdefault(word._value_, word)  # type: ignore[return-value]

    def __str__(self) -> str:
        return str(self.value)
