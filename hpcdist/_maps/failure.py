"""What ends a map early."""

from __future__ import annotations


class Failure(Exception):
    """Carries the error that ends a map."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def taken(self) -> BaseException:
        """Hand out the error, to be raised: kept here, it and its frames would keep each other."""
        error = self._error
        del self._error
        self.args, self.__traceback__ = (), None
        return error
