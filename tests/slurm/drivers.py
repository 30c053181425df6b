"""What the programs that tests run on the login node share: `slurm.driver(PRELUDE + text)`."""

from tests.helpers import eventually
from tests.slurm.cluster import Running, Slurm

PRELUDE = '''
import json, os, signal, subprocess, sys, time
from pathlib import Path
import hpcdist as h
from hpcdist import LaunchError, SlurmManager, addprocs, everywhere, remotecall_fetch, rmprocs

RUNS = Path.home() / ".hpcdist" / "jobs"

def until(look, timeout=20):
    begin = time.monotonic()
    while not (found := look()):
        crowding = min(5, max(1, os.getloadavg()[0] / (3 * os.cpu_count())))
        assert time.monotonic() < begin + timeout * crowding, ("did not come true", found, queue())
        time.sleep(0.02)
    return found

def shown(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

def queue(*options):
    return shown("squeue", "-h", "-r", "-t", "PD,R,CF", *(options or ("-o", "%i %T"))).splitlines()

def block(nodes="n1,n2,n3"):
    job = shown("sbatch", "--parsable", "--exclusive", f"--nodelist={nodes}", "-t", "9",
                "-o", "/dev/null", "--wrap", "exec sleep 600")
    until(lambda: f"{job} RUNNING" in queue())
    return job

def refused(kind, *words, n=1, **params):
    begin = time.monotonic()
    try:
        pids = addprocs(SlurmManager(n), **params)
    except kind as exc:
        text = str(exc)
        missing = [word for word in words if word not in text]
        assert not missing, (missing, params, text)
        print(params, "->", round(time.monotonic() - begin, 1), "s:", text.splitlines()[0])
        return exc
    raise AssertionError(f"{params} gave {pids}")

def asked(pid, f, *args):
    """The answer of one worker, which then goes."""
    try:
        return remotecall_fetch(f, pid, *args)
    finally:
        rmprocs(h.workers())

def commands():
    """The commands in the record of the run that began last."""
    last = max(RUNS.glob("*/commands.jsonl"), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for line in last.read_text().splitlines()]

def nothing_left():
    until(lambda: not queue())
    until(lambda: not RUNS.exists() or not list(RUNS.iterdir()))
'''

# Not in MPI: what is killed in it leaves files in /dev/shm, which are not this module's business.
SLEEPER = """
import time

print("at work", flush=True)
time.sleep(600)
"""


def submit_sleeper(slurm: Slurm) -> tuple[Running, str]:
    """Return `hpcdist submit --wait` under way, and its job, in which a driver is at work."""
    slurm.file("sleeper.py", SLEEPER)
    waiting = slurm.start(
        *(slurm.python, "-m", "hpcdist", "submit", "sleeper.py", "-n", "2", "-t", "1", "--wait")
    )
    job = eventually(lambda: waiting.out.strip(), timeout=30)
    logs = slurm.path("../.hpcdist/jobs")

    def at_work() -> bool:
        return any("at work" in log.read_text() for log in logs.glob("*/log"))

    try:
        eventually(at_work, timeout=60)
    except AssertionError:
        seen = [log.read_text() for log in logs.glob("*/log")]
        waiting.kill()
        raise AssertionError(f"{slurm.jobs()}, {seen}, {waiting.err}") from None
    return waiting, job
