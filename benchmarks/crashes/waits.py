"""Threads of process 1 that wait for something, and how each wait has ended."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from hpcdist import CompositeException, ProcessExitedException, RemoteException


class Wait:
    """Something that process 1 waits for, on a thread of its own.

    Args:
        what: What is waited for, for the table.
        call: Waits, and returns what has come.
        right: Tells whether that is right.
        needs: The workers whose end may end the wait.
    """

    def __init__(
        self,
        what: str,
        call: Callable[[], Any],
        right: Callable[[Any], bool] = lambda value: True,
        needs: Iterable[int] = (),
    ) -> None:
        self.what = what
        self.right = right
        self.needs = frozenset(needs)
        self.value: Any = None
        self.error: BaseException | None = None
        self.ended_at = 0.0
        self._call = call
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.value = self._call()
        except BaseException as exc:
            self.error = exc
        self.ended_at = time.monotonic()
        self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._ended.is_set()

    def join(self, timeout: float) -> bool:
        """Wait for its end; tell whether it came."""
        return self._ended.wait(timeout)

    def __str__(self) -> str:
        if not self.ended:
            return f"{self.what}: still waits"
        if self.error is None:
            return f"{self.what}: {self.value!r:.100}"
        text = str(self.error).replace("\n", " | ")
        return f"{self.what}: {type(self.error).__name__}: {text:.300}"


class Repeated:
    """An operation that is done again and again, until it fails or somebody says that it is enough.

    So one of them is always under way, whenever the accident comes.
    """

    def __init__(self, operation: Callable[[], Any], right: Callable[[Any], bool]) -> None:
        self._operation, self._right = operation, right
        self.enough = threading.Event()
        self.begun = threading.Event()

    def __call__(self) -> str:
        while not self.enough.is_set():
            self.begun.set()
            value = self._operation()
            if not self._right(value):
                return f"wrong: {value!r:.100}"
        return "enough"


def deaths(error: BaseException | None) -> set[int]:
    """Return whose deaths an error tells of; empty if it is about anything else as well."""
    if isinstance(error, ProcessExitedException):
        return {error.pid}
    if isinstance(error, CompositeException):
        parts = [deaths(part) for part in error.exceptions]
        return set().union(*parts) if all(parts) else set()
    if isinstance(error, RemoteException):
        return deaths(error.cause)
    return set()


def is_of(error: BaseException | None, kind: type[Exception]) -> bool:
    """Tell whether an error, or each of several, is an error of a kind at a worker."""
    if isinstance(error, CompositeException):
        return all(is_of(part, kind) for part in error.exceptions)
    return isinstance(error, kind) or kind.__name__ in str(error)
