"""Finding the driver that `hpcdist top` is to look into."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any

from hpcdist._events.windows import PROTOCOL, FolderView, View, views
from hpcdist._numbers import whole

if TYPE_CHECKING:
    from hpcdist._cli.runs import Run

PATIENCE = 15.0  # seconds for the first picture: a driver in a job looks every 2 s whether one asks
_ASK_EVERY = 2.0
_LOOK_EVERY = 0.02


class NotFound(Exception):
    """There is no such driver, or it is not clear which is meant."""


def find(name: str | None) -> View | FolderView:
    """Find a driver.

    Args:
        name: The number of its process, a job's id or a run's name; None: the only one there is.

    Raises:
        NotFound: There is none, or several are.
    """
    if name is None:
        return _the_only_one()
    os_pid = whole(name)
    view = View.of(os_pid) if os_pid else None
    if view is not None:
        return _of_our_version(view)
    found = _of_job(name)
    if found is not None:
        return found
    if os_pid and os.path.exists(f"/proc/{os_pid}"):
        raise NotFound(f"process {name} is no driver of yours that has workers")
    raise NotFound(f"there is no driver and no job {name}; `hpcdist jobs` lists jobs. {_drivers()}")


def _of_our_version(view: View) -> View:
    theirs = view.protocol()
    if theirs != PROTOCOL:
        raise NotFound(
            f"the driver {view.os_pid} runs another version of hpcdist, which shows itself in "
            f"another way ({theirs}, not {PROTOCOL}): use the hpcdist of its environment"
        )
    return view


def _the_only_one() -> View:
    found = views()
    if len(found) == 1:
        return _of_our_version(found[0])
    if not found:
        raise NotFound(
            "no driver of yours on this host has workers; name a job (`hpcdist jobs` lists them)"
        )
    raise NotFound(f"which one? Say `hpcdist top NUMBER`. {_drivers(found)}")


def _drivers(found: list[View] | None = None) -> str:
    found = views() if found is None else found
    if not found:
        return "No driver of yours on this host has workers"
    lines = "".join(f"\n  {view.os_pid}  {_command_of(view.os_pid)}" for view in found)
    return f"Your drivers on this host:{lines}"


def _command_of(os_pid: int) -> str:
    try:
        with open(f"/proc/{os_pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()[:100]
    except OSError:
        return "(has just ended)"


def _of_job(name: str) -> View | FolderView | None:
    """Find the driver of a job: one that is in it, or the one that has submitted it."""
    from hpcdist._cli.runs import named, runs

    found = named(runs(), name)
    if not found:
        return None
    if len(found) > 1 and len({run.folder for run in found}) > 1:
        raise NotFound(f"{name} stands for jobs {', '.join(run.job for run in found)}: name one")
    run = found[0]
    return _in_job(run) if run.is_program else _submitter(run)


def _in_job(run: Run) -> FolderView:
    if os.path.exists(os.path.join(run.exit_folder, "exit")):
        raise NotFound(f"job {run.job} has ended")
    return FolderView(run.exit_folder)


def _submitter(run: Run) -> View:
    host, os_pid = run.host, run.os_pid
    if host != socket.gethostname():
        raise NotFound(f"job {run.job} has workers of process {os_pid} on {host}: look there")
    view = View.of(os_pid)
    if view is None:
        raise NotFound(
            f"the driver of job {run.job}, process {os_pid}, has ended, or has no workers yet"
        )
    return _of_our_version(view)


def read(view: View | FolderView) -> dict[str, Any] | None:
    """Return what is seen; None: nothing that is whole.

    Raises:
        Closed: The driver is gone.
    """
    import json

    data = view.read()
    try:
        seen: dict[str, Any] | None = json.loads(data) if data else None
    except ValueError:  # it was being written
        return None
    return seen


def fresh(view: View | FolderView, patience: float) -> dict[str, Any] | None:
    """Have the driver look, and return its second picture: the first knows no rates.

    Raises:
        Closed: The driver is gone.
    """
    began = time.monotonic()
    old, first = _at(read(view)), 0.0
    due = began
    while (now := time.monotonic()) < began + patience:
        if now >= due:
            view.ask()
            due = now + _ASK_EVERY
        seen = read(view)
        at = _at(seen)
        if first and at > first:
            return seen
        if at > old:
            first = first or at
        time.sleep(_LOOK_EVERY)
    return None


def _at(seen: dict[str, Any] | None) -> float:
    return 0.0 if seen is None else float(seen["at"])
