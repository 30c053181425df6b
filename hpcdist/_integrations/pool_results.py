"""What `Pool` returns: results on their way, as those of `multiprocessing.pool`."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from hpcdist._errors import ChannelClosed, HpcdistError
from hpcdist._integrations.originals import RemoteTraceback
from hpcdist._integrations.waiting import TaskFuture, TurnEvent
from hpcdist._remote.channels import Channel
from hpcdist._runtime.node import Node

T = TypeVar("T")
_ENDED = "the pool was terminated"


class PoolTimeout(multiprocessing.TimeoutError, TimeoutError):
    """A result has not come in time: caught by either name."""


class Terminated(HpcdistError):
    """A result will not come: its pool was terminated."""

    def __init__(self) -> None:
        super().__init__(_ENDED)


class AsyncResult(Generic[T]):
    """A result on its way, or those of a map.

    Args:
        node: The process that waits for it.
        futures: Those of its tasks.
        joined: Makes the result of theirs.
        callback: Called with the result, once it is there.
        error_callback: Called with the error instead.
    """

    def __init__(
        self,
        node: Node,
        futures: Sequence[Future[Any]],
        joined: Callable[[list[Any]], T],
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> None:
        self._futures = futures
        self._joined = joined
        self._value: T
        self._has_value = False
        self._callback = callback
        self._error_callback = error_callback
        self._now = node.machine.now
        self._lock = node.machine.lock()  # guards what follows
        self._left = len(futures)
        self._called_back: TurnEvent | None = None
        if futures and (callback is not None or error_callback is not None):
            self._called_back = TurnEvent(node)
            for future in futures:
                future.add_done_callback(self._one_has_ended)

    def ready(self) -> bool:
        """Tell whether it has ended, and its callback with it."""
        if self._called_back is not None:
            return self._called_back.is_set()
        return all(future.done() for future in self._futures)

    def successful(self) -> bool:
        """Tell whether it has ended well.

        Raises:
            ValueError: It has not ended.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._error() is None

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end, for `timeout` seconds at most."""
        left = _countdown(self._now, timeout)
        try:
            for future in self._futures:
                wait_for(future, left())
        except TimeoutError:
            return
        if self._called_back is not None:
            self._called_back.wait(left())

    def get(self, timeout: float | None = None) -> T:
        """Return the result, or raise the error.

        Raises:
            multiprocessing.TimeoutError: It has not come in time.
        """
        self.wait(timeout)
        if not self.ready():
            raise PoolTimeout(f"no result after {timeout} s")
        error = self._error()
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # the traceback would keep them
        return self._result()

    def _result(self) -> T:
        with self._lock:
            if not self._has_value:
                self._value = self._joined([future.result() for future in self._futures])
                self._has_value = True
                self._futures = ()
            return self._value

    def _error(self) -> BaseException | None:
        for future in self._futures:
            error = error_of(future)
            if error is not None:
                return error
        return None

    def _one_has_ended(self, _: Future[Any]) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        assert self._called_back is not None
        try:
            error = self._error()
            if error is None:
                if self._callback is not None:
                    self._callback(self._result())
            elif self._error_callback is not None and not isinstance(error, Terminated):
                self._error_callback(error)
        finally:
            self._called_back.set()


class ResultIterator(Generic[T]):
    """The results of `imap`, in the order of the items, or as they come."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._futures = Channel(sys.maxsize)
        self._next: Future[Any] | None = None

    def add(self, future: Future[Any]) -> None:
        """Let this be one of the next results."""
        self._futures.put(future)

    def fail(self, error: BaseException) -> None:
        """Let the next result be an error."""
        failed = TaskFuture(self._node)
        failed.fail(error)
        self.add(failed)

    def end(self) -> None:
        """Let those that were added be all."""
        self._futures.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def next(self, timeout: float | None = None) -> T:
        """Return the next result.

        Raises:
            multiprocessing.TimeoutError: It has not come in time.
        """
        left = _countdown(self._node.machine.now, timeout)
        try:
            if self._next is None:
                self._next = self._futures.take(timeout=timeout)
            wait_for(self._next, left())
        except ChannelClosed:
            raise StopIteration from None
        except TimeoutError:
            raise PoolTimeout(f"no result after {timeout} s") from None
        future, self._next = self._next, None
        error = error_of(future)
        if error is not None:
            try:
                raise error
            finally:
                del error, future, self  # the traceback would keep them
        found: T = future.result()
        return found

    __next__ = next


def wait_for(future: Future[Any], timeout: float | None) -> None:
    """Wait for a future's end.

    Raises:
        TimeoutError: It has not come in time.
    """
    if not future.done():
        future.exception(timeout)


def error_of(future: Future[Any]) -> BaseException | None:
    """Return the error of a future that has ended, as `multiprocessing` has it."""
    error = future.exception()
    if error is not None and isinstance(error.__cause__, RemoteTraceback):
        text = str(error.__cause__)
        error.__cause__ = multiprocessing.pool.RemoteTraceback(text)  # type: ignore[attr-defined]
    return error


def _countdown(now: Callable[[], float], timeout: float | None) -> Callable[[], float | None]:
    """Return what tells how many seconds are left from now on."""
    if timeout is None:
        return lambda: None
    deadline = now() + timeout
    return lambda: max(0.0, deadline - now())
