"""`hpcdist demo`: the README's program on MPI ranks; without an MPI, on plain processes."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hpcdist._keeper.installed_mpi import OPENMPI_ENV, Mpi, MpiNotFound, find_mpi, scrubbed

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the examples lie inside the package, in a checkout with the documentation.
_PLACES = (_PACKAGE / "_data" / "examples", _PACKAGE.parent / "docs" / "examples")


def main(options: argparse.Namespace) -> int:
    """Run the program and return its exit code."""
    # A copy outside the package: tracebacks leave the package's own frames out.
    with tempfile.TemporaryDirectory(prefix="hpcdist-demo-") as folder:
        program = shutil.copy(_find("first.py"), folder)
        try:
            mpi = find_mpi()
        except MpiNotFound as exc:
            print(f"On plain processes, without MPI. {exc}\n")
            return _run_plainly(program, options.ranks - 1)
        return _run_ranks(program, options.ranks, mpi)


def _find(name: str) -> Path:
    for place in _PLACES:
        if (place / name).is_file():
            return place / name
    places = " nor at ".join(map(str, _PLACES))
    sys.exit(f"hpcdist demo: {name} is neither at {places}: install the package again")


def _run_ranks(program: str, ranks: int, mpi: Mpi) -> int:
    environ = {**scrubbed(os.environ), "PYTHONPATH": _python_path()}
    flags: list[str] = []
    if mpi.family == "openmpi":
        environ |= OPENMPI_ENV
        flags = ["--oversubscribe", "--bind-to", "none"]
    print(f"$ mpiexec -n {ranks} python {os.path.basename(program)}\n", flush=True)
    command = [mpi.mpiexec, *flags, "-n", str(ranks), sys.executable, program]
    try:
        return subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, check=False
        ).returncode
    except KeyboardInterrupt:  # it reached the ranks too
        return 130


def _run_plainly(program: str, workers: int) -> int:
    from hpcdist._cli.run import run_file
    from hpcdist._cli.starting import fresh_main
    from hpcdist._managers.driver import begin
    from hpcdist._managers.lifecycle import addprocs
    from hpcdist._runtime.node import here

    begin(here.node)
    addprocs(workers, isolation="process")
    run_file(program, fresh_main())
    return 0


def _python_path() -> str:
    """Let the program find the very hpcdist that runs the demo."""
    here = str(_PACKAGE.parent)
    known = os.environ.get("PYTHONPATH")
    return f"{here}{os.pathsep}{known}" if known else here
