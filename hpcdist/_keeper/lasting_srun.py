"""What mpirun finds under the name of srun in a job of Slurm: an srun that no lost node ends.

    python -I -S lasting_srun.py SRUN [argument ...]

Open MPI's mpirun starts its daemons on other nodes by one srun, and takes the end of that for the
end of them all: it ends too, and its ranks with it. Slurm ends an srun whose nodes are lost (seen
with 22.05: with status 0). So this runs the real one, and when that has told of a lost node, stays
for as long as mpirun does. It imports nothing of hpcdist.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading

# The words of srun (src/api/step_launch.c).
_LOST = b"Node failure on "
# As for an srun that starts workers: no task ends the others, nor does a lost node.
_OPTIONS = ("--no-kill", "--kill-on-bad-exit=0", "--wait=0")
_DAEMONS = frozenset({"prted", "orted"})
_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PDEATHSIG = 1


def put_first(folder: str, srun: str) -> str:
    """Put a program of that name into a folder; return the PATH by which mpirun finds it."""
    os.makedirs(folder, 0o700, exist_ok=True)
    path = f"{folder}/srun"
    command = shlex.join((sys.executable, "-I", "-S", os.path.abspath(__file__), srun))
    with open(path, "w") as file:
        file.write(f'#!/bin/sh\nexec {command} "$@"\n')
    os.chmod(path, 0o700)
    return f"{folder}:{os.environ.get('PATH', os.defpath)}"


def main(argv: list[str]) -> int:
    """Run an srun; return its exit code, once mpirun may know of its end."""
    if not _DAEMONS & set(argv):
        os.execv(argv[0], argv)
    launcher = os.getppid()
    # A handler of Python's would not run if the signal came just before main() waits for srun.
    signal.pthread_sigmask(signal.SIG_BLOCK, _TO_END)
    with subprocess.Popen(
        [argv[0], *_OPTIONS, *argv[1:]], stderr=subprocess.PIPE, preexec_fn=_unblock
    ) as srun:
        threading.Thread(target=_pass_on_signals, args=(srun,), daemon=True).start()
        assert srun.stderr is not None
        lost = _pass_on(srun.stderr.fileno())
        code = srun.wait()
    if lost:
        _stay(launcher)
    return code if code >= 0 else 128 - code


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_END)


def _pass_on_signals(srun: subprocess.Popen[bytes]) -> None:
    while True:
        number = signal.sigwait(_TO_END)
        if srun.poll() is not None:
            os._exit(128 + number)
        srun.send_signal(number)


def _pass_on(stderr: int) -> bool:
    """Pass on what is written until the end; tell whether a node was lost."""
    lost, tail = False, b""
    while data := os.read(stderr, 65536):
        os.write(2, data)
        tail = tail[-len(_LOST) :] + data
        lost = lost or _LOST in tail
    return lost


def _stay(launcher: int) -> None:
    """Wait for the end of mpirun, or for a signal."""
    import ctypes  # it takes longer than all else here

    ctypes.CDLL(None).prctl(_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    while os.getppid() == launcher:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
