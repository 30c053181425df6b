"""Errors of tasks as the standard library's executors give them: the original exceptions."""

from __future__ import annotations

from hpcdist import _errors
from hpcdist._errors import ProcessExitedException, RemoteException
from hpcdist._integrations.tasks import Task, one
from hpcdist._items import item_names


class RemoteTraceback(Exception):
    """The traceback of a task's error, as the worker would have printed it."""

    def __init__(self, pid: int, text: str) -> None:
        super().__init__(text)
        self.pid = pid

    def __str__(self) -> str:
        return f'\nOn worker {self.pid}:\n"""\n{self.args[0].rstrip()}\n"""'


def original(error: BaseException | None) -> BaseException | None:
    """Give back what the function raised, its remote traceback attached."""
    if not isinstance(error, RemoteException):
        return error
    cause = error.cause
    if isinstance(cause, _errors.RemoteCause):  # only its name and text came through
        return error
    cause.__cause__ = RemoteTraceback(error.pid, error.traceback)
    return cause


def named(task: Task, error: BaseException | None) -> BaseException | None:
    """Say which item of a map an error belongs to."""
    if error is not None and task.index is not None:
        what = ""
        if isinstance(error, ProcessExitedException):
            what = f"ended worker {error.pid}"
        item_names.name_item(error, task.index, one(task.item), what)
    return error
