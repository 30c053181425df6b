"""A few cells of the crash matrix, others every day; `python -m benchmarks.crashes` plays all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.crashes.matrix import CAUSES, MOMENTS, Cell, cells, drawn
from tests.conftest import ROOT


def test_every_cell_has_its_place() -> None:
    everything = cells(["mpi", "process", "slurm"])
    without = len(CAUSES) + 2  # no sections, and no MPI_Abort at the start, where there is no MPI
    assert len(set(everything)) == len(MOMENTS) * (2 * len(CAUSES) + 6) - without
    assert len(set(everything)) == len(everything)
    assert [Cell.named(str(cell)) for cell in everything] == everything


def test_a_draw_is_the_same_all_day_and_another_tomorrow() -> None:
    everything = cells(["mpi", "process"])
    today = drawn(everything, 5, "2026-11-30")
    assert today == drawn(everything, 5, "2026-11-30")
    assert today != drawn(everything, 5, "2026-12-01")
    assert len(set(today)) == 5
    assert len(drawn(everything, 10_000, "2026-11-30")) == len(everything)


@pytest.mark.timeout(400)
def test_a_sample_of_the_matrix() -> None:
    """What is drawn today: a cell that is wrong shows a fault of hpcdist's, of any day."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.crashes", "--sample", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
