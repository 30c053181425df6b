"""What the programs that tests run on the login host share: `hosts.driver(PRELUDE + text)`."""

PRELUDE = """
import os, signal, socket, subprocess, sys, time
from pathlib import Path
import hpcdist as h
from hpcdist import LaunchError, SSHManager, addprocs, remotecall_fetch, rmprocs

def until(look, timeout=30):
    end = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < end, ("did not come true", found)
        time.sleep(0.02)
    return found

def death_of(later):
    try:
        later.fetch(timeout=60)
    except h.ProcessExitedException as exc:
        return exc
    raise AssertionError("it lives")
"""
