"""Drivers on the login node of the tests' Slurm, whose workers are jobs."""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.slurm.cluster import ROOT, Running, Slurm

_HOOK = Path(__file__).with_name("hook")


class Jobs:
    """A Slurm of three nodes, up while this block lasts."""

    def __enter__(self) -> "Jobs":
        self._slurm = Slurm()
        self._slurm.up()
        self._running: dict[int, Running] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._slurm.down()

    def start(self, args: Sequence[str], log: Path) -> "subprocess.Popen[str]":
        """Start a driver; what it says comes by way of `tail`, as it writes into a file."""
        path = os.pathsep.join((str(_HOOK), str(ROOT)))
        running = self._slurm.start(
            self._slurm.python,
            "-m",
            "benchmarks.crashes.driver",
            *args,
            env={"PYTHONPATH": path, "CRASH_KEEP_TMPDIR": "1"},
        )
        process = subprocess.Popen(
            [
                "tail",
                f"--pid={running.process.pid}",
                "-s0.1",
                "-n+1",
                "-f",
                str(running.files.with_suffix(".out")),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running[process.pid] = running
        self._log = log
        return process

    def end(self, process: "subprocess.Popen[str]") -> None:
        """End a driver, and keep what it wrote."""
        running = self._running.pop(process.pid, None)
        if running is not None:
            if process.poll() is None:
                time.sleep(1.0)
            running.end()
            self._log.write_text(running.err)
        process.kill()
        process.wait()
