"""What the tests of ends share: the head of their drivers, and reading what drivers say."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers import eventually
from tests.slurm.cluster import Running, Slurm

# What their drivers begin with.
HEAD = """
import ctypes, json, os, signal, subprocess, sys, time
import hpcdist
from hpcdist import (
    ProcessExitedException, SlurmManager, addprocs, pmap, remote_do, remotecall, remotecall_fetch,
    rmprocs, spmd, workers,
)

def say(**facts):
    print(json.dumps(facts), flush=True)

def loss_of(future, limit=30):
    begin = time.monotonic()
    try:
        future.fetch(timeout=limit)
    except ProcessExitedException as exc:
        took = round(time.monotonic() - begin, 2)
        return {"pid": exc.pid, "host": exc.host, "why": exc.why, "took": took}
    raise AssertionError("its call came to an end")

def why_in_time(future, word, limit=30):
    '''Wait until the reason has the scheduler's word in it: that may come a little later.'''
    error = future.exception(timeout=limit)
    end = time.monotonic() + limit
    while word not in error.why and time.monotonic() < end:
        time.sleep(0.05)
    return error.why

def stuck(flag):
    open(flag, "w").close()
    ctypes.PyDLL(None).sleep(600)  # in C, and with the interpreter's lock held

def until(look, limit=30):
    end = time.monotonic() + limit
    while not look():
        assert time.monotonic() < end, "too late"
        time.sleep(0.02)

def hold(pids):
    '''Let workers be stuck in C; return when all of them are.'''
    futures = [remotecall(stuck, pid, f"stuck.{os.getpid()}.{pid}") for pid in pids]
    until(lambda: all(os.path.exists(f"stuck.{os.getpid()}.{pid}") for pid in pids))
    return futures

def total():
    return hpcdist.comm().allreduce(hpcdist.myid())

def on_two_nodes(n, **options):
    return addprocs(SlurmManager(n), nodes=2, ntasks_per_node=n // 2, **options)

def by_host(pids):
    hosts = {s.pid: s.host for s in hpcdist.status()}
    names = sorted({hosts[p] for p in pids})
    return {name: [p for p in pids if hosts[p] == name] for name in names}
"""


def facts(text: str) -> list[dict[str, Any]]:
    """Read what a driver has said."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def run(slurm: Slurm, text: str, *args: str, timeout: float = 90, **env: str) -> dict[str, Any]:
    """Run a driver to its good end; return all that it has said, as one."""
    done = slurm.driver(HEAD + text, *args, timeout=timeout, env=env or None)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    said: dict[str, Any] = {}
    for each in facts(done.out):
        said |= each
    return said


def says(running: Running, word: str, timeout: float = 60) -> dict[str, Any]:
    """Wait until a driver says something of this name; return what."""

    def look() -> list[dict[str, Any]]:
        found = [each for each in facts(running.out) if word in each]
        assert found or running.process.poll() is None, f"{running.out}\n{running.err}"
        return found

    return eventually(look, timeout, f"no {word!r} was said")[0]
