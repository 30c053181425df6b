"""Which GPUs each worker sees: its share of those that its host was granted.

Vendors hide GPUs by a variable each: a list, of which a share is left to the worker. In a job each
task finds its own share, from what the launcher says of it; workers of this machine are told theirs
by process 1, in their places (see `affinity`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, MutableMapping
from itertools import takewhile

from hpcdist import _log
from hpcdist._numbers import whole

CUDA = "CUDA_VISIBLE_DEVICES"
# NVIDIA's, AMD's (ROCm: what it hides, HIP and OpenCL do not see either) and Intel's (Level Zero:
# "0.1" is the second tile of the first).
VARIABLES = (CUDA, "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
# By this a job script tells its tasks that each is to take its share.
ASKED = "HPCDIST_GPUS"

# How launchers tell a task its number on its host, and how many there are: Open MPI's, hydra's.
# Slurm comes last: hydra's proxies are tasks of it, and leave their variables to the ranks.
_SEATS = (
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def take_share(environ: MutableMapping[str, str] = os.environ) -> None:
    """Leave this task of a job its share of the host's GPUs, if the job's script asks for that."""
    if environ.pop(ASKED, None) is None:
        return
    seat = seat_of(environ)
    if seat is None:
        _log.log(
            "warning",
            "gpus='auto': what started this worker does not say how many there are on its host, "
            "so it sees all of the host's GPUs",
        )
        return
    environ.update(share_of(environ, *seat))


def seat_of(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Return this task's number on its host, and how many tasks there are; None: unknown.

    >>> seat_of({"SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2"})
    (1, 2)
    """
    for number, count in _SEATS:
        found = whole(environ.get(number, "")), whole(environ.get(count, ""))
        if found[0] is not None and found[1]:
            return found[0], found[1]
    node, number_here = whole(environ.get("SLURM_NODEID", "")), environ.get("SLURM_LOCALID", "")
    counts = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    here = whole(number_here)
    if node is None or here is None or node >= len(counts):
        return None
    return here, counts[node]


def _tasks_per_node(text: str) -> list[int]:
    """Read Slurm's list of numbers.

    >>> _tasks_per_node("4(x2),2")
    [4, 4, 2]
    """
    found = re.findall(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def share_of(environ: Mapping[str, str], number: int, count: int) -> dict[str, str]:
    """Return the variables of one of `count` tasks of a host; those not set stay so.

    >>> granted = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    >>> share_of(granted, 1, 2), share_of(granted, 5, 8)
    ({'CUDA_VISIBLE_DEVICES': '1,3'}, {'CUDA_VISIBLE_DEVICES': '1'})

    What the scheduler has given to this very task stays: Slurm has, with --gpus-per-task.

    >>> share_of({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, 1, 2)
    {}
    """
    lists = {name: listed(environ[name]) for name in VARIABLES if name in environ}
    on_host = whole(environ.get("SLURM_GPUS_ON_NODE", "")) or 0
    if any(len(found) < on_host for found in lists.values()):
        return {}
    return {name: shares(found, count)[number] for name, found in lists.items() if found}


def shares_here(
    n: int, environ: Mapping[str, str], devices: Collection[str]
) -> list[dict[str, str]]:
    """Return the variables of each of `n` workers of this machine.

    Args:
        environ: What this process may use, if it says so.
        devices: Otherwise: the files of NVIDIA's driver.
    """
    if not any(name in environ for name in VARIABLES):
        environ = {CUDA: ",".join(gpus({}, devices))}
    return [share_of(environ, k, n) for k in range(n)]


def gpus(environ: Mapping[str, str], devices: Collection[str]) -> list[str]:
    """List the NVIDIA GPUs of this machine that may be used.

    Args:
        environ: If it names them, these are all.
        devices: Otherwise: the files of their driver.

    >>> gpus({}, ["/dev/nvidia10", "/dev/nvidia0"]), gpus({"CUDA_VISIBLE_DEVICES": "2,-1,3"}, [])
    (['0', '10'], ['2'])
    """
    told = environ.get(CUDA)
    if told is None:
        return [str(k) for k in sorted(int(path.partition("nvidia")[2]) for path in devices)]
    return listed(told)


def listed(text: str) -> list[str]:
    """Read the list of a variable; CUDA reads up to the first that is none.

    >>> listed("GPU-7d0a, GPU-88e1"), listed("2,-1,3"), listed("")
    (['GPU-7d0a', 'GPU-88e1'], ['2'], [])
    """
    names = (name.strip() for name in text.split(","))
    return list(takewhile(lambda name: name and not name.startswith("-"), names))


def shares(found: list[str], n: int) -> list[str]:
    """Deal GPUs to `n` workers, one after the other; where they are fewer, workers share them.

    >>> shares(["0", "1", "2"], 2), shares(["0", "1"], 3), shares([], 2)
    (['0,2', '1'], ['0', '1', '0'], [])
    """
    if not found:
        return []
    return [",".join(found[k::n] or [found[k % len(found)]]) for k in range(n)]
