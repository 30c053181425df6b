"""What happened in a simulation, as a list that is equal for equal seeds, on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, overload


class Record(NamedTuple):
    """Something that happened.

    Attributes:
        at: Seconds since the beginning, by the virtual clock.
        pid: The process it happened to.
        what: "send", "receive", "timer", "switch", "kill" and so on.
        about: Details, in words.
    """

    at: float
    pid: int
    what: str
    about: str

    def __str__(self) -> str:
        return f"{self.at:12.6f}  {self.pid:>4}  {self.what:<8} {self.about}"


class Trace:
    """All records of a simulation, in order. Prints as one line each."""

    def __init__(self, beginning: float) -> None:
        self._beginning = beginning
        self._records: list[Record] = []
        self.is_on = True

    def add(self, now: float, pid: int, what: str, about: str) -> None:
        """Write something down."""
        if self.is_on:
            self._records.append(Record(round(now - self._beginning, 9), pid, what, about))

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> list[Record]: ...
    def __getitem__(self, at: int | slice) -> Record | list[Record]:
        return self._records[at]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        return self._records == other._records

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return "\n".join(map(str, self._records))
