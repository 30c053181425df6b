"""Ends that come while a worker starts: `hook/sitecustomize.py` calls this in its interpreter.

The first process of a launch that comes to the place becomes the victim, says so, and waits there.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACE = "CRASH_AT"  # the moment, the cause, and the folder where the two sides meet
_LONG = 60.0


def stop_at(text: str) -> None:
    """Put the accident where it is to happen, in this process and in those that it forks."""
    moment, cause, folder = text.split(":", 2)
    from hpcdist._wire import greeting
    from hpcdist._worker import worker

    if moment == "launching":
        owner, name = worker.Worker, "_place"
    else:
        owner, name = greeting, "send_hello" if "late" in moment else "dial"
    as_it_was: Callable[..., Any] = getattr(owner, name)

    def with_accident(*args: Any) -> Any:
        accident(cause, Path(folder))
        return as_it_was(*args)

    setattr(owner, name, with_accident)


def accident(cause: str, folder: Path) -> None:
    """Let one of the processes that come by have it."""
    try:
        (folder / "victim").mkdir()
    except OSError:
        return
    (folder / "pid.new").write_text(f"{os.getpid()} {os.getppid()}")
    (folder / "pid.new").rename(folder / "pid")
    end = time.monotonic() + _LONG
    while not (folder / "go").exists() and time.monotonic() < end:
        time.sleep(0.002)
    from benchmarks.crashes import victim

    if cause == "memory":
        victim.befall(cause)
    elif cause in ("import", "disk"):
        victim.FATE.cause, victim.FATE.fired = cause, True
        victim.FATE.probe()
    else:
        victim.befall(cause)
    if cause in ("keeper", "SIGSTOP"):
        time.sleep(0.5)
