"""The results of `imap`: those that have come, and what hands them out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator
from itertools import chain
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Arrived(ABC):
    """The results of a map that have come and have not been handed out."""

    @abstractmethod
    def put(self, start: int, results: list[Any]) -> None:
        """Take in the results of neighbouring items, with the index of the first."""

    @abstractmethod
    def next(self, given: int) -> int | None:
        """Return the index of the item that is next after so many results; None: any is."""

    @abstractmethod
    def has(self, given: int) -> bool:
        """Tell whether the next result is there."""

    @abstractmethod
    def take(self, given: int) -> list[Any] | None:
        """Take the next result and those that came with it; None: it is not there."""


class InOrder(Arrived):
    """They are handed out in the order of their items."""

    def __init__(self) -> None:
        self._ready: dict[int, list[Any]] = {}

    def put(self, start: int, results: list[Any]) -> None:
        self._ready[start] = results

    def next(self, given: int) -> int | None:
        return given

    def has(self, given: int) -> bool:
        return given in self._ready

    def take(self, given: int) -> list[Any] | None:
        return self._ready.pop(given, None)


class AsTheyCome(Arrived):
    """They are handed out as they come."""

    def __init__(self) -> None:
        self._ready: deque[list[Any]] = deque()

    def put(self, start: int, results: list[Any]) -> None:
        self._ready.append(results)

    def next(self, given: int) -> int | None:
        return None

    def has(self, given: int) -> bool:
        return bool(self._ready)

    def take(self, given: int) -> list[Any] | None:
        return self._ready.popleft() if self._ready else None


class Results(chain[T]):
    """The results of a map, as they are asked for: a generator, but for the seed it has."""

    seed: int  # of its random numbers
    _results: Generator[T, None, None]

    def __new__(cls, results: Generator[T, None, None], seed: int) -> Self:
        self = super().__new__(cls, results)
        self.seed = seed
        self._results = results
        return self

    def close(self) -> None:
        """End the map; what runs then ends by itself."""
        self._results.close()

    def send(self, value: Any) -> Any:
        """Give the next result: the value is of no use to a map."""
        return self._results.send(value)

    def throw(self, *error: Any) -> Any:
        """End the map by an error."""
        return self._results.throw(*error)


Generator.register(Results)
