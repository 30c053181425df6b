"""What `hpcdist doctor` runs elsewhere: under another interpreter, and in a job on a compute node.

    python -m hpcdist._cli.probe - [FOLDER ...]
    python -m hpcdist._cli.probe ANSWER TARGETS WORD

It writes what it finds to the file ANSWER as JSON, `-` being standard output; there it also says
which of the folders are not visible. With TARGETS, which `network.name` has written, it dials each
of them, expects WORD there, and starts MPI. Where none answers, it waits at a door for process 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import sys
import time
from typing import Any

from hpcdist._version import VERSION

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PATIENCE = 5.0
_PATIENCE_AT_DOOR = 15.0


def main(args: list[str]) -> None:
    """Look, and write down what was seen."""
    answer = args[0]
    found = versions()
    if answer == "-":
        found["hidden"] = [folder for folder in args[1:] if not os.path.isdir(folder)]
    elif len(args) > 1:
        found["host"] = socket.gethostname()
        found["reach"] = reach(args[1], args[2])
        if all(found["reach"].values()):
            found["door"] = at_door(os.path.dirname(answer), args[2])
        _write(answer, found)  # MPI may end or stop us
        found |= world()
    if found.get("rank", 0) == 0:
        _write(answer, found)


def versions() -> dict[str, Any]:
    """Return what this interpreter has."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "prefixes": sorted({sys.prefix, sys.base_prefix}),
        "hpcdist": VERSION,
        "package": PACKAGE,
        "mpi4py": None,
        "library": None,
    }
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI

        found |= {"mpi4py": mpi4py.__version__, "library": MPI.Get_library_version()}
    except (ImportError, RuntimeError) as exc:
        found["mpi error"] = f"{type(exc).__name__}: {exc}"
    return found


def reach(targets: str, word: str) -> dict[str, str]:
    """Dial each address of process 1; return what went wrong there, nothing where it answered."""
    from hpcdist._transport import network

    return {
        f"{host} port {port}": _dial(host, port, word) for host, port in network.targets(targets)
    }


def at_door(folder: str, word: str) -> str:
    """Wait for process 1 to dial this host; return what went wrong, nothing if it did."""
    from hpcdist._transport import doors

    deadline = time.monotonic() + _PATIENCE_AT_DOOR
    try:
        with doors.open_door(folder) as listeners:
            while (left := deadline - time.monotonic()) > 0:
                for sock in doors.visitors(listeners, left):
                    with sock:
                        sock.settimeout(_PATIENCE)
                        if _heard(sock) == word:
                            return ""
    except OSError as exc:
        return exc.strerror or str(exc)
    return f"it was not dialled within {_PATIENCE_AT_DOOR:g} s"


def _heard(sock: socket.socket) -> str:
    with contextlib.suppress(OSError), sock.makefile("rb") as said:
        return said.readline().strip().decode(errors="replace")
    return ""


def _dial(host: str, port: int, word: str) -> str:
    try:
        with socket.create_connection((host, port), _PATIENCE) as connection:
            heard = connection.makefile("rb").readline().strip().decode(errors="replace")
    except OSError as exc:
        return exc.strerror or str(exc)
    return "" if heard == word else "another program answered there"


def world() -> dict[str, Any]:
    """Start MPI; return the rank, and rank 0 the hosts of all."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return {}
    MPI.Init()
    try:
        comm = MPI.COMM_WORLD
        hosts = comm.gather(socket.gethostname())
        return {"rank": comm.rank, "size": comm.size, "hosts": hosts}
    finally:
        MPI.Finalize()


def _write(answer: str, found: dict[str, Any]) -> None:
    text = json.dumps(found)
    if answer == "-":
        print(text)
        return
    draft = f"{answer}.{socket.gethostname()}.{os.getpid()}"
    with open(draft, "w") as file:
        file.write(text)
    os.replace(draft, answer)


if __name__ == "__main__":
    main(sys.argv[1:])
