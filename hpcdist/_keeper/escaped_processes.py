"""Ending what workers have started in sessions of their own, which no kill of a group reaches.

What a worker starts inherits a mark in its environment. It is of one world, and in a batch job of
one worker: on a host that others use too, it tells what may be ended. A job that a worker submits
inherits the mark as well, as schedulers hand the environment on. It has another id, and stays.
"""

from __future__ import annotations

import glob
import os
import signal

MARK = "HPCDIST_MARK"
# By which a process knows its job: sbatch(1), qsub(1B) of PBS, qsub(1) of Grid Engine, bsub(1).
_JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "JOB_ID", "LSB_JOBID")

# Waits for the end of a worker and ends what carries its mark, more than once: it may just have
# started something. A scheduler's own kill comes to the same hosts, but not into every session, nor
# to what has become init's. This runs in the background of a shell that ends: it is where only
# what escapes from a scheduler is. (An interpreter would take ten times the memory.)
_SWEEPER = """exec 3<&0
(
read -r never <&3
for round in 1 2 3; do
    found=$(grep -lasF -e "$1" /proc/[0-9]*/environ)
    [ -n "$found" ] || exit 0
    for path in $found; do
        ids=$(tr '\\0' '\\n' <"$path" | grep -aE -e "$2" | sort | tr '\\n' ' ')
        [ "$ids" = "$3" ] || continue
        pid=${path#/proc/}
        kill -9 "${pid%/environ}"
    done
done
) >/dev/null 2>&1 &
"""


def marked(mark: str, rank: int | None = None) -> str:
    """Return the value of the mark: a world's, or that of one of its ranks."""
    return f"{mark}." if rank is None else f"{mark}.{rank}."


def sweep_after(value: str) -> None:
    """Have what this process starts from now on ended after it, in whatever way it ends."""
    import subprocess

    os.environ[MARK] = value
    pattern = f"^({'|'.join(_JOB_IDS)})="
    found = _job_of([os.fsencode(f"{name}={text}") for name, text in os.environ.items()])
    ours = "".join(f"{os.fsdecode(setting)} " for setting in found)
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stdin:
        subprocess.run(
            ["/bin/sh", "-c", _SWEEPER, "sh", f"{MARK}={value}", pattern, ours],
            stdin=stdin,
            env={"PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,
            check=False,
        )
    held = [write]

    def let_go() -> None:
        if held:  # a fork of a fork has something else by that number
            os.close(held.pop())

    os.register_at_fork(after_in_child=let_go)  # the pipe ends with this process


def sweep(value: str | None) -> None:
    """End all other processes that carry a mark; without a value, none."""
    if not value:
        return
    wanted = f"{MARK}={value}".encode()
    ours = _job_of([os.fsencode(f"{name}={text}") for name, text in os.environ.items()])
    for path in glob.glob("/proc/[0-9]*/environ"):
        pid = int(path.split("/")[2])
        try:
            with open(path, "rb") as file:
                settings = file.read().split(b"\0")
                if pid != os.getpid() and wanted in settings and _job_of(settings) == ours:
                    os.kill(pid, signal.SIGKILL)
        except OSError:  # it has ended, or is none of ours
            pass


def _job_of(settings: list[bytes]) -> list[bytes]:
    """Return which job an environment is of."""
    return sorted(s for s in settings if s.partition(b"=")[0].decode("latin-1") in _JOB_IDS)
