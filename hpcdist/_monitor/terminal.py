"""Workers have no terminal: what asks for one fails at once and says what to do instead.

Whatever a worker's standard input was, nobody types there: `input()` and a debugger's prompt would
wait for ever.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from hpcdist._runtime.node import Node

_NO_INPUT = (
    "worker {pid} has no standard input to read from: read on process 1, and send the value as an "
    "argument"
)
_NO_BREAKPOINT = (
    "worker {pid} has no terminal for breakpoint(): call the function on process 1 to step through "
    "it, as f(x) or pmap(f, xs, distributed=False), or set PYTHONBREAKPOINT to a debugger that "
    "needs no terminal. `kill -USR1 {os_pid}` on its host prints its stacks"
)


class _NoInput(io.TextIOBase):
    """Standard input at its end, which says why to who reads a line of it."""

    encoding = "utf-8"
    name = "<no input>"

    def __init__(self, node: Node) -> None:
        self._node = node

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> str:
        return ""

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        raise EOFError(_NO_INPUT.format(pid=self._node.me))

    def __next__(self) -> NoReturn:
        raise StopIteration


def take_away(node: Node) -> None:
    """Leave this process without standard input and debugger."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    if nothing:
        os.dup2(nothing, 0)
        os.close(nothing)
    sys.stdin = _NoInput(node)
    sys.breakpointhook = partial(_no_breakpoint, node)


def set_aside(node: Node) -> Callable[[], None]:
    """Do the same for a while; return what gives both back."""
    kept = os.dup(0) if _is_open(0) else None
    stdin, hook = sys.stdin, sys.breakpointhook
    take_away(node)

    def give_back() -> None:
        sys.stdin, sys.breakpointhook = stdin, hook
        if kept is not None:
            os.dup2(kept, 0)
            os.close(kept)

    return give_back


def _no_breakpoint(node: Node, *args: object, **kwargs: object) -> Any:
    if os.environ.get("PYTHONBREAKPOINT", "") not in ("", "pdb.set_trace"):
        return sys.__breakpointhook__(*args, **kwargs)  # the user knows how
    raise RuntimeError(_NO_BREAKPOINT.format(pid=node.me, os_pid=os.getpid()))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
