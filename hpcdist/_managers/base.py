"""The contract of a cluster manager: how workers are started, watched and ended.

A manager of one's own subclasses ClusterManager and writes `launch`; the rest has defaults.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcdist._managers.launch import Launch
    from hpcdist._managers.world import World


@dataclass
class WorkerConfig:
    """What a manager knows of a worker it has started (or of `count` equal ones)."""

    host: str | None = None
    port: int | None = None
    count: int = 1
    process: Any = None
    os_pid: int | None = None
    job_id: str | None = None
    ident: Any = None
    connect_idents: Iterable[Any] = ()
    userdata: Any = None


# What every manager is asked for; what else there is, is its own.
COMMON = frozenset(
    {
        *("dir", "env", "python", "exename", "exeflags", "topology", "lazy", "concurrency"),
        *("timeout", "isolation", "min_workers", "enable_threaded_blas"),
    }
)


_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# glibc's allocator, from the start as it becomes by itself once an array of 32 MB was freed: it
# keeps up to 64 MB, rather than giving the memory of each temporary array back to the system, which
# clears it for the next. numpy's temporaries of 800 KB are 1.5 times as quick. It reads these
# variables as a program starts.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_MALLOPT = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}  # in glibc's malloc.h


@dataclass
class Settings:
    """What a launch was asked for, apart from how many workers: see `addprocs`."""

    dir: str
    env: dict[str, str]
    python: str
    exeflags: list[str]
    topology: str
    concurrency: int | None
    timeout: float
    isolation: str
    min_workers: int | None
    enable_threaded_blas: bool
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
        """Make them of parameters of `addprocs`."""
        merged = {**defaults, **given}
        if "exename" in given:
            merged["python"] = given["exename"]
        flags = merged["exeflags"] or []
        return cls(
            dir=os.path.abspath(os.fspath(merged["dir"])),
            env={str(k): str(v) for k, v in dict(merged["env"] or {}).items()},
            python=os.fspath(merged["python"] or sys.executable),
            exeflags=shlex.split(flags) if isinstance(flags, str) else [str(f) for f in flags],
            topology=merged["topology"],
            concurrency=merged["concurrency"],
            timeout=float(merged["timeout"]),
            isolation=merged["isolation"],
            min_workers=merged["min_workers"],
            enable_threaded_blas=bool(merged["enable_threaded_blas"]),
            extra={name: value for name, value in merged.items() if name not in COMMON},
        )

    @property
    def variables(self) -> dict[str, str]:
        """The environment that workers are asked to have."""
        threads = {} if self.enable_threaded_blas else _ONE_THREAD
        return {**self.allocator, **threads, **self.env}

    @property
    def allocator(self) -> dict[str, str]:
        """What of it the interpreter has to start with; what its user has set stays."""
        return {name: os.environ.get(name, value) for name, value in _KEEP_MEMORY.items()} | {
            name: value for name, value in self.env.items() if name in _KEEP_MEMORY
        }


def keep_memory() -> None:
    """Ask the allocator of this process, which runs already, for the same."""
    try:
        import ctypes  # 3 ms

        mallopt = ctypes.CDLL(None).mallopt
    except (ImportError, OSError, AttributeError):  # another C library: it goes without
        return
    for name, value in _KEEP_MEMORY.items():
        if name not in os.environ:
            mallopt(_MALLOPT[name], int(value))


class ClusterManager:
    """Starts workers somewhere. Subclass it and write `launch`."""

    # Names of parameters of the manager's own, beyond the common ones; None: any.
    own_params: Iterable[str] | None = None
    # How many workers `addprocs` waits for unless it is told; None: for all.
    enough: int | None = None

    def launch(self, params: dict[str, Any]) -> Iterable[WorkerConfig]:
        """Start workers with `self.worker_command(params)` and yield their configs as they start.

        Args:
            params: The parameters of `addprocs`, with defaults filled in.
        """
        raise TypeError(f"{type(self).__name__} does not say how to launch workers")

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        """Take note of "register", "deregister", "interrupt" or "finalize" of a worker."""

    def kill(self, pid: int, config: WorkerConfig) -> None:
        """End a worker that did not leave when it was asked."""
        process = config.process
        if process is not None and hasattr(process, "kill"):
            process.kill()

    def connect(self, pid: int, config: WorkerConfig) -> Any:
        """Return the (reader, writer) to reach a worker by, or None: it dials in."""
        return None

    def default_addprocs_params(self) -> dict[str, Any]:
        """Return what `addprocs` uses where its caller says nothing."""
        return default_addprocs_params()

    def worker_command(self, params: dict[str, Any]) -> list[str]:
        """Return the command that becomes a worker of this launch, as an argv."""
        flags = params.get("exeflags") or []
        return [
            params.get("python") or sys.executable,
            *flags,
            "-m",
            "hpcdist",
            "worker",
            "--join",
            params["join"],
        ]


class KeptManager(ClusterManager):
    """A manager whose workers a keeper starts and watches."""

    own_params: Iterable[str] | None = ()
    # Whether its workers are on other hosts, and come in over the network.
    on_network = False
    # Whether each of its worlds is a host by itself, with folders of its own: it fails alone.
    hosts_apart = False

    def prepare(self, settings: Settings) -> None:
        """Refuse what is wrong with the settings, before anything is made."""

    def sizes(self, settings: Settings) -> Sequence[int | None]:
        """Return how many workers each world is to have; None: that is not known yet."""
        return [None]

    def interface(self, settings: Settings) -> str | None:
        """Return by which interface of this host others are to reach it; None: by any."""
        return None

    def start(self, launch: Launch) -> None:
        """Start the keepers of a launch's worlds, or see to it that they are started."""
        raise NotImplementedError


class JobManager(KeptManager):
    """A manager whose worlds are jobs of a scheduler, on hosts and at a time of its choice."""

    own_params = None
    on_network = True

    def make_folder(self, settings: Settings) -> str:
        """Make a folder for one job, which all hosts see."""
        raise NotImplementedError

    def forget_folder(self, world: World) -> None:
        """Remove the folder of a job that has ended, unless it is to be kept."""
        raise NotImplementedError

    def note(self, launch: Launch) -> str:
        """Return how a launch stands, as one line for people."""
        raise NotImplementedError

    def end_of(self, world: World) -> str | None:
        """Ask how the job of a world ended. May take a while."""
        raise NotImplementedError

    def cancel_jobs(self, launch: Launch) -> None:
        """End the jobs of a launch's closed worlds, also one being submitted. May take a while."""
        raise NotImplementedError


def default_addprocs_params(manager: ClusterManager | None = None) -> dict[str, Any]:
    """Return what `addprocs` uses where its caller says nothing.

    Example:
        >>> import hpcdist
        >>> hpcdist.default_addprocs_params()["topology"]
        'all_to_all'
    """
    if manager is not None:
        return manager.default_addprocs_params()
    import os

    from hpcdist import _config

    return {
        "dir": os.getcwd(),
        "env": {},
        "python": sys.executable,
        "exeflags": [],
        "topology": "all_to_all",
        "lazy": True,
        "enable_threaded_blas": False,
        "concurrency": 1,
        "timeout": _config.setting("timeout", 60.0),
        "isolation": "auto",
        "min_workers": None,
    }
