"""Modules of the user's own that change while workers live: their path, and their text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.any_mpi

PATH = """
import sys
import hpcdist
from hpcdist import *

addprocs(2)
sys.path.insert(0, sys.argv[1])
import late_module

def kept():
    return late_module.thing()

for run in (
    lambda: remotecall_fetch(late_module.thing, 2),
    lambda: remotecall_fetch(repr, 2, late_module.Point()),
    lambda: remotecall_fetch(kept, 2),
    lambda: pmap(late_module.thing_of, range(3)),
    lambda: everywhere.call(late_module.thing, pids=[2]),
):
    try:
        run()
    except ModuleNotFoundError as e:
        print(e.pid, str(e.cause))
everywhere(f"import sys; sys.path.insert(0, {sys.argv[1]!r})", later=True)
addprocs(1)
print(everywhere.call(late_module.thing), pmap(late_module.thing_of, range(3)))
"""

LATE = """
class Point: ...
def thing(): return 7
def thing_of(x): return x
"""


def test_a_module_that_workers_cannot_import(script: Callable[..., Any], tmp_path: Path) -> None:
    """The error says why that may be, and what to do; which then works."""
    folder = tmp_path / "late"
    folder.mkdir()
    (folder / "late_module.py").write_text(LATE)
    done = script(PATH, args=[str(folder)])
    assert done.rc == 0, done.err
    *errors, last = done.out.splitlines()
    assert len(errors) == 5
    for line in errors:
        assert "No module named 'late_module': this process cannot import what it was sent" in line
        assert "Workers take over sys.path when they start" in line
    assert last == "{1: 7, 2: 7, 3: 7, 4: 7} [0, 1, 2]"


RELOADED = """
import importlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
file = pathlib.Path(sys.argv[1], "changing.py")

def write(number):
    file.write_text(f"def what(_=None): return {number}\\n")

write(0)
import changing
from changing import what as first
from hpcdist import *

def by_name(_=None):
    return changing.what()

def helped(_=None):
    return by_name()

addprocs(2)
ways = [
    lambda f: {remotecall_fetch(f, 2)},
    lambda f: set(pmap(f, range(2))),
    lambda f: set(imap(f, range(2))),
    lambda f: set(everywhere.call(f, pids=[2, 3]).values()),
    lambda f: set(spmd(f)),
    lambda f: {distributed(range(2), max)(f)},
    lambda f: set(Executor().map(f, range(2))),
]
for way in ways:
    assert way(F) == {0}
for number, way in enumerate(ways, 10):
    write(number)
    importlib.reload(changing)
    assert way(F) == {number}, (number, way(F))
    assert remotecall_fetch(F, 3) == number
assert first() == remotecall_fetch(first, 2) == remotecall_fetch(first, 2) == 0
"""


@pytest.mark.parametrize("f", ["changing.what", "by_name", "helped", "lambda _=None: by_name()"])
def test_a_module_that_was_reloaded(script: Callable[..., Any], tmp_path: Path, f: str) -> None:
    """Workers follow, whatever the next call is, and whether it names the module or comes of it."""
    done = script(
        RELOADED.replace("F)", f"({f}))").replace("F,", f"({f}),"),
        args=[str(tmp_path)],
        env={"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.rc == 0, done.err
    assert not done.err
