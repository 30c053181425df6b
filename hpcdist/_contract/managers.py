"""The contract of a cluster manager: how workers are started, watched and ended.

A manager of one's own subclasses ClusterManager and writes `launch`; the rest has defaults.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcdist._contract import adapting
from hpcdist._contract.adapting import Adapt
from hpcdist._contract.interpreters import KEYWORDS, chosen, command_of, interpreter, wrapper_of
from hpcdist._public import public, public_in


@public
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
        *("dir", "env", *KEYWORDS, "exeflags", "topology", "lazy", "concurrency"),
        *("timeout", "isolation", "min_workers", "enable_threaded_blas", "renew", "tag"),
        *("adapt", "max_queued", "idle"),
    }
)


_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# glibc's allocator, from the start as it becomes by itself once an array of 32 MB was freed: it
# keeps up to 64 MB, rather than giving the memory of each temporary array back to the system, which
# clears it for the next. numpy's temporaries of 800 KB are 1.5 times as quick. It reads these
# variables as a program starts.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_MALLOPT = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}  # in glibc's malloc.h


@public_in("managers")
@dataclass
class Settings:
    """What a launch was asked for, apart from how many workers: see `addprocs`."""

    dir: str
    env: dict[str, str]
    python: tuple[str, ...]  # a command; the interpreter is its last word
    exeflags: list[str]
    topology: str
    concurrency: int | None
    timeout: float
    isolation: str
    min_workers: int | None
    enable_threaded_blas: bool
    renew: bool = False
    wrapper: tuple[str, ...] = ()  # the words of `python` that stand before the interpreter's own
    adapt: Adapt | None = None  # in place of a fixed number of workers
    tags: tuple[str, ...] = ()  # by which the workers may be named in place of their pids
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
        """Make them of parameters of `addprocs`."""
        merged = {**defaults, **chosen(given)}
        if given.get("container_args") is not None and merged.get("container") is None:
            raise ValueError("container_args= needs container=, the image that they are for")
        flags = merged["exeflags"] or []
        return cls(
            dir=os.path.abspath(os.fspath(merged["dir"])),
            env={str(k): str(v) for k, v in dict(merged["env"] or {}).items()},
            python=command_of(merged),
            wrapper=wrapper_of(merged.get("wrapper")),
            exeflags=shlex.split(flags) if isinstance(flags, str) else [str(f) for f in flags],
            topology=merged["topology"],
            concurrency=merged["concurrency"],
            timeout=float(merged["timeout"]),
            isolation=merged["isolation"],
            min_workers=merged["min_workers"],
            enable_threaded_blas=bool(merged["enable_threaded_blas"]),
            renew=merged["renew"],
            adapt=adapting.read(merged),
            tags=_tags(merged.get("tag")),
            extra={name: value for name, value in merged.items() if name not in COMMON},
        )

    @property
    def keeper(self) -> tuple[str, ...]:
        """What runs a keeper that starts a launcher: our own Python, if `python` is a command."""
        plain = self.python[len(self.wrapper) :]
        return plain if len(plain) == 1 else (sys.executable,)

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


def _tags(given: object) -> tuple[str, ...]:
    """Read what `tag=` says: a text, or several.

    >>> _tags("gpu"), _tags(["gpu", "big"]), _tags(None)
    (('gpu',), ('gpu', 'big'), ())
    """
    listed = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(listed, list | tuple) or not all(isinstance(tag, str) for tag in listed):
        raise TypeError(f"tag= is a text or a list of texts, not {given!r}")
    for tag in listed:
        if tag == "any":
            raise ValueError('"any" is no tag: as a place to call it is any worker')
        if not tag or any(c.isspace() or c == "," for c in tag):
            raise ValueError(f"a tag is a word without blanks and commas, not {tag!r}")
    return tuple(dict.fromkeys(listed))


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


@public
class ClusterManager:
    """Starts workers somewhere. Subclass it and write `launch`."""

    # Names of parameters of the manager's own, beyond the common ones; None: any.
    own_params: Iterable[str] | None = None
    # How many workers `addprocs` waits for by default; None: for all.
    enough: int | None = None
    # Whether Ctrl-C in `addprocs` ends what it was starting.
    ends_when_interrupted = True

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
            *interpreter(params.get("python")),
            *flags,
            "-m",
            "hpcdist",
            "worker",
            "--join",
            params["join"],
        ]


@public
def default_addprocs_params(manager: ClusterManager | None = None) -> dict[str, Any]:
    """Return what `addprocs` uses where its caller says nothing.

    Example:
        >>> import hpcdist
        >>> hpcdist.default_addprocs_params()["topology"]
        'all_to_all'
    """
    if manager is not None:
        return manager.default_addprocs_params()
    from hpcdist import _config

    return {
        "dir": os.getcwd(),
        "env": {},
        "python": sys.executable,
        "wrapper": None,
        "container": None,
        "container_args": None,
        "exeflags": [],
        "topology": "all_to_all",
        "lazy": True,
        "enable_threaded_blas": False,
        "concurrency": 1,
        "timeout": _config.setting("timeout", 60.0),
        "isolation": "auto",
        "min_workers": None,
        "renew": False,
        "adapt": None,
        "max_queued": None,
        "idle": None,
        "tag": None,
    }
