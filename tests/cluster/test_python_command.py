"""`python=`: an interpreter, or a command that ends with one."""

import os
import subprocess
import sys
from typing import Any

import pytest

import hpcdist
from hpcdist._contract.managers import Settings
from hpcdist._keeper.installed_mpi import find_mpi
from hpcdist._managers.ssh_link import keeper_command
from hpcdist._schedulers import plan as batch
from tests.helpers import patient

NICE = ["nice", "-n", "5", sys.executable]


class Popens(hpcdist.ClusterManager):
    """A manager of a user's own."""

    def launch(self, params: dict[str, Any]) -> Any:
        process = subprocess.Popen(self.worker_command(params))
        yield hpcdist.WorkerConfig(process=process)


@pytest.mark.parametrize(
    ("manager", "isolation"),
    [
        (hpcdist.LocalManager(2), "auto"),
        (hpcdist.LocalManager(2), "process"),
        (hpcdist.MPIManager(2), "auto"),
        (Popens(), "auto"),
    ],
    ids=["world", "process", "mpiexec", "own"],  # one named "mpi" would be skipped
)
def test_workers_run_under_a_command(manager: Any, isolation: str) -> None:
    with hpcdist.cluster(manager, python=NICE, isolation=isolation) as pids:
        assert pids
        nicest = os.nice(0) + 5
        assert {hpcdist.remotecall_fetch(os.nice, pid, 0) for pid in pids} == {nicest}


def test_the_same_mpi_is_found_through_a_command() -> None:
    assert find_mpi(NICE) == find_mpi(sys.executable)


def test_jobs_and_ssh_run_the_command() -> None:
    script = hpcdist.SlurmManager(2).job_script(python=NICE, mpi="pmi2")
    assert f"\n{sys.executable} -P -m hpcdist keeper" in script
    assert f"nice -n 5 {sys.executable} -m hpcdist worker" in script
    assert f"nice -n 5 {sys.executable} -c" in keeper_command(NICE, [], None, {})
    defaults = hpcdist.default_addprocs_params()
    relative = Settings.of(defaults, {"python": ["apptainer", "exec", "a.sif", "./py"]})
    assert batch.interpreter(relative)[-1] == "./py"  # a path in the image, not of this host


def test_submit_takes_a_quoted_command() -> None:
    argv = ["script", "-n", "2", "--scheduler", "slurm", "--mpi", "pmi2"]
    done = subprocess.run(
        [sys.executable, "-m", "hpcdist", *argv, "--python", f"nice -n 5 {sys.executable}"],
        capture_output=True,
        text=True,
        timeout=patient(50),
    )
    assert done.returncode == 0, done.stderr
    assert f"nice -n 5 {sys.executable} -m hpcdist worker" in done.stdout


@pytest.mark.parametrize("wrong", [[], 5, [sys.executable, 5], b"python", True])
def test_anything_else_is_refused_before_anything_starts(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"python= is an interpreter, or a command .*nice"):
        hpcdist.addprocs(2, python=wrong)
    assert hpcdist.nprocs() == 1
