"""The frames of an exception: whose they are, and when they go."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

OWN_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_PLAIN = (KeyboardInterrupt, TimeoutError)


def drop_frames(exc: BaseException) -> None:
    """Take the frames off an exception that has been reported, and off those behind it."""
    left: list[BaseException | None] = [exc]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if each is None or id(each) in seen or (each is not exc and _is_handled_above(each)):
            continue
        seen.add(id(each))
        BaseException.with_traceback(each, None)
        left += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions


def _is_handled_above(exc: BaseException) -> bool:
    """Tell whether a caller of ours has caught it: a call to this very process in its `except`."""
    if exc.__traceback__ is None:
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not exc.__traceback__.tb_frame:
        frame = frame.f_back
    return frame is not None


def without_top(frames: TracebackType | None, hide: str) -> TracebackType | None:
    """Return the frames below the first ones of ours; all of them where there are no others.

    One of ours alone says only that we called something in C: that is none.
    """
    inner = frames
    while hide and inner is not None and inner.tb_frame.f_code.co_filename.startswith(hide):
        inner = inner.tb_next
    if inner is None and frames is not None and frames.tb_next is not None:
        return frames
    return inner


def brief(f: Callable[P, R]) -> Callable[P, R]:
    """Let what a public function raises end with the user's line, and this one frame of ours."""
    from functools import wraps

    @wraps(f)
    def call(*args: P.args, **kw: P.kwargs) -> R:
        try:
            return f(*args, **kw)
        except BaseException as exc:
            cut(exc)
            raise

    return call


def cut(exc: BaseException) -> None:
    """Take the frames below the present one off an error, where all are ours.

    Done to what tells of the user's cluster. What may be a fault of ours stays as it is, and so
    does what passed through code of the user's that we called.
    """
    here = exc.__traceback__
    if here is None or not (isinstance(exc, _PLAIN) or type(exc).__module__ == __package__):
        return
    below = here.tb_next
    while below is not None:
        if not _is_ours(below.tb_frame.f_code.co_filename):
            return
        below = below.tb_next
    here.tb_next = None


def _is_ours(file: str) -> bool:
    """Tell whether a file is ours, or the standard library's, which we wait and start with."""
    if file.startswith((OWN_FOLDER, "<frozen ")):
        return True
    return file.startswith(_LIBRARY) and "-packages" + os.sep not in file
