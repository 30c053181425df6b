"""Process 1 of some cells of one way: plays them one after the other, and says how each was.

python -m benchmarks.crashes.driver SEED CELL...
"""

import ctypes
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

import hpcdist
from benchmarks.crashes.leftovers import Trace
from benchmarks.crashes.matrix import AT_START, DEADLY, Cell
from benchmarks.crashes.moments import SCENES
from benchmarks.crashes.stage import Stage, Wrong
from benchmarks.crashes.starting import Start
from tests._leftovers import MARK, Leftovers
from tests._own_shm import hide_shm
from tests.helpers import mpi_environment

SAID = "@cell "
_DISK = b"size=192m,mode=1777"
_MS_NOSUID, _MS_NODEV, _MS_REMOUNT = 2, 4, 32
_MNT_DETACH = 2
_HOOK = Path(__file__).with_name("hook")


def main() -> None:
    """Play the cells that the command line names."""
    seed, *names = sys.argv[1:]
    todo = [Cell.named(name) for name in names]
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    way = todo[0].way
    disk = way != "slurm" and hide_shm() and _small_disk()
    folder = Path(os.environ["TMPDIR"]) if way != "slurm" else Path.cwd()
    cells_folder = folder / "cells"
    cells_folder.mkdir(exist_ok=True)
    os.environ["CRASH_FOLDER"] = str(cells_folder)
    if way == "slurm":
        leftovers = None
    else:
        os.environ.update(mpi_environment())
        mark = uuid.uuid4().hex
        outer = os.environ.get(MARK)
        os.environ[MARK] = f"{outer}:{mark}" if outer else mark
        leftovers = Leftovers(mark, folder)
    far = _launch(way, 1, 60.0)[0]
    _warm_up(way, far)
    trace = Trace(leftovers, folder, far)
    for cell in todo:
        print(f"{SAID}{json.dumps({'begins': str(cell)})}", flush=True)
        if cell.cause == "disk" and not disk:
            found: dict[str, Any] = {"faults": [], "seconds": None, "skipped": True}
        else:
            found = _play(cell, random.Random(f"{seed} {cell}"), far, trace)
        print(f"{SAID}{json.dumps({'cell': str(cell), **found})}", flush=True)
    hpcdist.shutdown()


def _small_disk() -> bool:
    """Put small disks of memory in place of the temporary folder and of /dev/shm."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    temporary = os.environ["TMPDIR"].encode()
    first = libc.mount(b"tmpfs", temporary, b"tmpfs", flags, _DISK)
    again = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_REMOUNT)
    return bool(first == 0 and libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", again, _DISK) == 0)


def _remove(folder: str) -> None:
    """Remove the temporary folder, and first the disk that has been put in its place."""
    ctypes.CDLL(None).umount2(folder.encode(), _MNT_DETACH)
    shutil.rmtree(folder, ignore_errors=True)


def _launch(way: str, count: int, timeout: float) -> list[int]:
    if way == "slurm":
        setup = [f"export PYTHONPATH={os.environ['PYTHONPATH']}"]
        if "CRASH_AT" in os.environ:
            setup.append(f"export CRASH_AT={os.environ['CRASH_AT']}")
        return hpcdist.addprocs(
            hpcdist.SlurmManager(count), nodes=1, setup=setup, timeout=timeout, keep=False
        )
    isolation = "process" if way == "process" else "auto"
    return hpcdist.addprocs(count, isolation=isolation, timeout=timeout)


def _warm_up(way: str, far: int) -> None:
    """Have all done once that comes to stay: modules, caches, descriptors of the interpreter."""
    cell = Cell(way, "SIGKILL", "reduce")
    faults = _play(cell, random.Random(0), far, None)["faults"]
    if faults:
        sys.exit("\n".join([f"{cell} is wrong, which is played before the others:", *faults]))


def _play(cell: Cell, rng: random.Random, far: int, trace: Trace | None) -> dict[str, Any]:
    begin = time.monotonic()
    scene: Any = None
    crash = ""
    try:
        if cell.moment in AT_START:
            scene = Start(cell, rng, far, lambda timeout: _launch(cell.way, 2, timeout))
            scene.play()
        else:
            scene = Stage(cell, rng, far, lambda: _launch(cell.way, 3, 60.0))
            scene.bystanders()
            scene.always_waiting()
            SCENES[cell.moment](scene)
            scene.act()
            scene.judge()
    except Wrong as exc:
        crash = str(exc)
    except Exception:
        crash = traceback.format_exc()
    faults = [] if scene is None else scene.faults
    seconds = None if scene is None else scene.slowest()
    try:
        if scene is not None:
            scene.close()
    except Exception:
        crash += traceback.format_exc()
    if crash:
        faults.append(crash)
    scene = None
    if trace is not None:
        faults += trace.left()
    took = time.monotonic() - begin
    return {"faults": faults, "seconds": seconds, "took": took, "dead": cell.cause in DEADLY}


if __name__ == "__main__":
    if "CRASH_FOLDER" in os.environ:
        sys.exit("one of these within another")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(_HOOK), str(_HOOK.parents[2]), os.environ.get("PYTHONPATH")])
    )
    made = "" if os.environ.get("CRASH_KEEP_TMPDIR") else tempfile.mkdtemp(prefix="hc-", dir="/tmp")
    if made:
        os.environ["TMPDIR"] = made
        os.environ["HPCDIST_DIR"] = f"{made}/state"
        tempfile.tempdir = None
    try:
        main()
    finally:
        if made:
            _remove(made)
