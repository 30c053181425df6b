"""The pages "From …": each program runs, and both of a pair print the same."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PROGRAM = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BY_A_SCHEDULER = "from-submitit.md"  # tests/slurm/test_job_executor.py runs it


def pairs(page: Path) -> Iterator[Any]:
    for number, table in enumerate(page.read_text().split("</table>"), 1):
        programs = PROGRAM.findall(table)
        if programs:
            old, new = programs
            marks = [] if "mpi4py" in old else [pytest.mark.any_mpi]
            yield pytest.param(old, new, id=f"{page.stem}-{number}", marks=marks)


PAGES = sorted(set(DOCS.glob("from-*.md")) - {DOCS / BY_A_SCHEDULER})


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("old", "new"), [pair for page in PAGES for pair in pairs(page)])
def test_both_programs_print_the_same(old: str, new: str, script: Callable[..., Any]) -> None:
    ours = script(new, timeout=80)
    assert ours.rc == 0, ours.err
    assert ours.out.strip()
    if not installed(old):
        return
    theirs = script(old, ranks=ranks_of(old), timeout=80)
    assert theirs.rc == 0, theirs.err
    assert ours.out == theirs.out


def ranks_of(program: str) -> int | None:
    """How many processes an MPI program is written for."""
    if "COMM_WORLD" not in program:
        return None
    return 2 if "dest=" in program else 4


def installed(program: str) -> bool:
    """Tell whether the packages of a program are here; dask has its cluster in one of its own."""
    named = re.findall(r"^(?:from|import) ([\w.]+)", program, re.MULTILINE)
    packages = {"distributed" if n == "dask.distributed" else n.partition(".")[0] for n in named}
    return all(map(importlib.util.find_spec, packages))
