"""What runs in a job: all ranks start this; rank 0 calls the function, the others are its workers.

    python -m hpcdist._jobs.run_call FOLDER FUNCTION

FOLDER has the arguments and gets the result; FUNCTION is the file with the function.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import traceback
from types import CoroutineType
from typing import Any

from hpcdist import _errors
from hpcdist._jobs import envelopes
from hpcdist._jobs.envelopes import CALL, OUTCOME, PATH, STARTED, STDERR, STDOUT
from hpcdist._managers import driver, lifecycle
from hpcdist._runtime.node import here
from hpcdist._runtime.running import Runners


def main(folder: str, function: str) -> int:
    """Make the call; return the exit code of the job."""
    driver.begin(here.node)
    lifecycle.init()  # the other ranks serve, and do not return
    _say_started(folder)
    _redirect(folder)
    try:
        value = _call(folder, function)
        sys.stdout.flush()  # whoever sees the result sees all that was printed
        envelopes.write_bytes(folder, OUTCOME, *envelopes.pack(value), failed=False)
    except BaseException as exc:  # the edge of the process: the reader of the result gets it
        traceback.print_exc()
        body = _errors.encode_error(exc, 1)
        envelopes.write_bytes(folder, OUTCOME, body, True, failed=True)
        return 1
    return 0


def _call(folder: str, function: str) -> Any:
    path = envelopes.read(os.path.join(os.path.dirname(function), PATH))
    sys.path += [part for part in path if part not in sys.path]
    f = envelopes.read(function)
    args, kw = envelopes.read(os.path.join(folder, CALL))
    value = f(*args, **kw)
    return Runners.here().awaited(value) if type(value) is CoroutineType else value


def _say_started(folder: str) -> None:
    """Note that Python runs: what ends the job from now on, its prints tell."""
    with open(os.path.join(folder, STARTED), "w") as file:
        file.write(f"{socket.gethostname()}\n")


def _redirect(folder: str) -> None:
    """Have what is printed, also by C code and child processes, stand in files of its own."""
    for name, stream in ((STDOUT, sys.stdout), (STDERR, sys.stderr)):
        stream.flush()
        fd = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, stream.fileno())
        os.close(fd)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if not faulthandler.is_enabled():
        faulthandler.enable()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
