"""What a driver is told that works alone, or with fewer workers than it asks for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished

pytestmark = pytest.mark.any_mpi

DRIVER = """
import operator
import hpcdist

print(hpcdist.workers())  # a question is no work
{work}
hpcdist.pmap(abs, [1, 2])
"""
WORK = {
    "pmap": "hpcdist.pmap(abs, [1, 2])",
    "distributed": "hpcdist.distributed(range(3), operator.add)(abs)",
    "any": "hpcdist.fetchany(abs, 1)",
    "executor": "list(hpcdist.Executor().map(abs, [1]))",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}


def run(script: Callable[..., Finished], work: str, env: dict[str, Any]) -> Finished:
    done = script(DRIVER.format(work=work), env=env)
    assert (done.rc, done.out) == (0, "[1]\n"), done
    return done


@pytest.mark.parametrize("work", WORK)
def test_a_job_of_several_tasks_without_workers(script: Callable[..., Any], work: str) -> None:
    (line,) = run(script, WORK[work], SLURM).err.splitlines()
    assert "this Slurm job has 8 tasks" in line
    assert "hpcdist.init()" in line


def test_a_pbs_job_counts_its_lines(script: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("n1\nn1\nn2\n")
    env = {"PBS_JOBID": "7.server", "PBS_NODEFILE": str(tmp_path / "nodes")}
    assert "this PBS job has 3 tasks" in run(script, WORK["pmap"], env).err


@pytest.mark.parametrize(
    ("work", "env"),
    [
        (WORK["pmap"], {}),
        (WORK["pmap"], {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}),
        ("hpcdist.init(2)", SLURM),
        ("hpcdist.pmap(abs, [1], pool=hpcdist.WorkerPool([1])); hpcdist.init(2)", SLURM),
    ],
)
def test_nothing_is_said(script: Callable[..., Any], work: str, env: dict[str, str]) -> None:
    assert run(script, work, env).err == ""


def test_init_says_when_fewer_are_there(script: Callable[..., Any]) -> None:
    text = "import hpcdist\nhpcdist.init(2)\nhpcdist.init(2)\nhpcdist.init(1)\nhpcdist.init(5)\n"
    done = script(text)
    assert done.err.splitlines() == [
        "hpcdist: init(5) adds no workers, as 2 are there already; addprocs(3) adds more"
    ]
