"""MPI in a worker that is in no MPI world, whose user imports mpi4py all the same.

Such a worker is a world of its own to the library, which then makes shared memory and a folder
that it removes in MPI_Finalize alone. A worker that is killed never comes there, nor does one that
leaves as workers do. So the names go as soon as the library has opened what they stand for.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from hpcdist._keeper.processes import segments_of, unlink

if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    Loader = object  # importlib.abc takes importlib.resources along, as long as all of typing

_MODULE = "mpi4py.MPI"  # its import initialises MPI, unless mpi4py.rc says otherwise


def leave_nothing(folder: str) -> None:
    """Make MPI leave nothing behind, however this process ends from now on.

    Args:
        folder: The world's own, which goes with it; "" where there is none.
    """
    sys.meta_path.insert(0, _Finder(folder))
    atexit.register(_forget_segments)


def _forget_segments() -> None:
    """Remove the names of shared memory that no other process can be about to open."""
    for path in segments_of(os.getpid()):
        unlink(path)


class _Finder:
    """Finds one module, as all others do, and has it loaded by `_Loader`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._folder)
        return spec


class _Loader(Loader):
    """Loads the module as its own loader does, with the library's folder in ours."""

    def __init__(self, loader: Loader, folder: str) -> None:
        self._loader = loader
        self._folder = folder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Make the module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Fill it, which initialises MPI."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        with _temporary_files_in(self._folder):
            self._loader.exec_module(module)
        _forget_segments()


@contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Have Open MPI make its session's folder (`ompi.HOST.UID`) where it goes with this process."""
    if not folder:
        folder = tempfile.mkdtemp(prefix="hpcdist-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    usual = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        if usual is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = usual
