"""What the programs that tests run on the login node share."""

import json
from typing import Any

from tests.helpers import eventually
from tests.pbs.cluster import Pbs
from tests.slurm.cluster import Running

PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import hpcdist as h
from hpcdist import (
    LaunchError, PBSManager, ProcessExitedException, addprocs, remotecall, remotecall_fetch, rmprocs
)

RUNS = Path.home() / ".hpcdist" / "jobs"

def say(**facts):
    print(json.dumps(facts), flush=True)

def until(look, timeout=40):
    begin = time.monotonic()
    while not (found := look()):
        crowding = min(5, max(1, os.getloadavg()[0] / (3 * os.cpu_count())))
        assert time.monotonic() < begin + timeout * crowding, ("did not come true", found)
        time.sleep(0.02)
    return found

def refused(kind, *words, n=1, **params):
    try:
        pids = addprocs(PBSManager(n), **params)
    except kind as exc:
        text = str(exc)
        missing = [word for word in words if word not in text]
        assert not missing, (missing, params, text)
        return exc
    raise AssertionError(f"{params} gave {pids}")

def sizes():
    from mpi4py import MPI
    return MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank

def rows(pids):
    return [(row.host, row.rank) for row in h.status() if row.pid in pids]
"""


def run(pbs: Pbs, text: str, *args: str, timeout: float = 100) -> dict[str, Any]:
    """Run a driver to its good end; return all that it has said, as one."""
    done = pbs.driver(PRELUDE + text, *args, timeout=timeout)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    said: dict[str, Any] = {"out": done.out, "err": done.err}
    for line in done.out.splitlines():
        if line.startswith("{"):
            said |= json.loads(line)
    return said


def says(running: Running, word: str, timeout: float = 60) -> Any:
    """Wait until a driver says something of this name; return what."""

    def look() -> list[Any]:
        lines = [json.loads(line) for line in running.out.splitlines() if line.startswith("{")]
        found = [line[word] for line in lines if word in line]
        assert found or running.process.poll() is None, f"{running.out}\n{running.err}"
        return found

    return eventually(look, timeout, f"no {word!r} was said")[0]
