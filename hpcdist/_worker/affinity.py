"""Which core each worker of this machine gets, and with it its GPUs.

Pid 1 reads the machine and writes the places into the join file; each worker takes its own before
it does anything else, so that every thread it ever starts is there too.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from hpcdist._numbers import whole
from hpcdist._worker.gpus import shares_here

MODES = ("balanced", "compact")

# Package, last-level cache and core of a CPU: from far to near.
Where = tuple[int, int, int]

_SYSFS = "/sys/devices/system/cpu"


def places(n: int, mode: str | None) -> list[dict[str, Any]]:
    """Return the places of `n` workers: the `cpu` of each, and the `env` that goes with it.

    The cores are those that this process may use, which is what its cgroup, its scheduler or
    `taskset` has left it. More workers than cores share them, one after the other.

    Args:
        mode: How cores are chosen; None: they are not.
    """
    envs = shares_here(n, os.environ, glob.glob("/dev/nvidia[0-9]*"))
    if mode is None:
        return [{"env": env} for env in envs]
    cpus = ordered(topology(os.sched_getaffinity(0)), mode)
    return [{"cpu": cpus[k % len(cpus)], "env": envs[k]} for k in range(n)]


def pin(place: Mapping[str, Any]) -> None:
    """Keep this process at its place, if it has one."""
    if "cpu" in place:
        os.sched_setaffinity(0, {place["cpu"]})


def topology(cpus: Iterable[int], sysfs: str = _SYSFS) -> dict[int, Where]:
    """Read each CPU's position; a CPU without topology data counts as its own core."""
    return {
        cpu: (
            _number(f"{sysfs}/cpu{cpu}/topology/physical_package_id", 0),
            _number(f"{sysfs}/cpu{cpu}/cache/index3/shared_cpu_list", 0),
            _number(f"{sysfs}/cpu{cpu}/topology/core_id", cpu),
        )
        for cpu in sorted(cpus)
    }


def _number(path: str, default: int) -> int:
    """Return the first number in a file: a list of CPUs is known by its first."""
    try:
        with open(path) as file:
            text = file.read().replace("-", ",").partition(",")[0].strip()
    except OSError:
        return default
    number = whole(text)
    return default if number is None else number


def ordered(where: Mapping[int, Where], mode: str) -> list[int]:
    """Return CPUs in the order in which they are given to workers.

    "compact" fills core after core, cache after cache, package after package. "balanced" takes one
    of each package in turn, in it one of each cache in turn, and second threads of cores last.

    >>> two_packages = {0: (0, 0, 0), 1: (0, 0, 1), 2: (1, 2, 0), 3: (1, 2, 1)}
    >>> ordered(two_packages, "compact"), ordered(two_packages, "balanced")
    ([0, 1, 2, 3], [0, 2, 1, 3])
    """
    near = sorted(where, key=lambda cpu: (where[cpu], cpu))
    if mode == "compact":
        return near
    threads: dict[Where, list[int]] = {}
    for cpu in near:
        threads.setdefault(where[cpu], []).append(cpu)
    rows = zip_longest(*threads.values())
    return [cpu for row in rows for cpu in _spread([c for c in row if c is not None], where, 0)]


def _spread(cpus: list[int], where: Mapping[int, Where], level: int) -> list[int]:
    if level == 2:
        return cpus
    groups: dict[int, list[int]] = {}
    for cpu in cpus:
        groups.setdefault(where[cpu][level], []).append(cpu)
    rows = zip_longest(*(_spread(group, where, level + 1) for group in groups.values()))
    return [cpu for row in rows for cpu in row if cpu is not None]
