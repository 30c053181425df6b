"""What `run` and `repl` share: the workers, and a `__main__` that is the user's alone."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType
from typing import NoReturn

from hpcdist._cli.machines import MachineFileError, read_file
from hpcdist._errors import LaunchError
from hpcdist._managers.driver import begin
from hpcdist._managers.lifecycle import addprocs
from hpcdist._managers.mpi_launch import launched_size
from hpcdist._runtime.node import here


def add_workers(options: argparse.Namespace) -> list[int]:
    """Add the workers that the options ask for; ends the process where that fails."""
    name = f"hpcdist {options.command}"
    if launched_size() > 1:
        _leave(
            2,
            f"{name} starts its workers itself and is not for an MPI launch; there, run "
            "`python driver.py`, with hpcdist.init() in it",
        )
    begin(here.node)
    count = options.workers or 0
    try:
        if options.machine_file is None:
            return addprocs(count)
        near, elsewhere = read_file(options.machine_file)
        return addprocs(count + near) + addprocs(elsewhere)
    except MachineFileError as exc:
        _leave(2, f"{name}: {exc}")
    except LaunchError as exc:
        _leave(1, f"{name}: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)


def fresh_main() -> ModuleType:
    """Make an empty module `__main__`: what is sent to workers must not find our names there."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    return main


def lead_path(entry: str) -> None:
    """Put `entry` where `python` puts the program's folder: at the front, instead of ours."""
    if sys.flags.safe_path:  # python -P: nothing was put there
        return
    sys.path[0] = entry


def _leave(code: int, text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(code)
