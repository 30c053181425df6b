"""The job scripts that come with the package, submitted as a user would."""

import re
import subprocess

import pytest

from tests.slurm.cluster import ROOT, Ended, Slurm
from tests.slurm.mpi import ENVIRONMENT

FOLDER = ROOT / "jobscripts"
PI = str(ROOT / "docs" / "examples" / "leibniz.py")
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh"))

FAILING = """
import hpcdist, sys
hpcdist.init()
hpcdist.remotecall_fetch(print, hpcdist.workers()[-1], "here")
sys.exit(7)
"""


def submit(slurm: Slurm, script: str, *driver: str, options: tuple[str, ...] = ()) -> str:
    done = slurm.login(
        "sbatch", "--parsable", *options, str(FOLDER / script), *driver, env=ENVIRONMENT
    )
    assert done.rc == 0, done.err
    return done.out.strip()


def run(slurm: Slurm, script: str, *driver: str, options: tuple[str, ...] = ()) -> Ended:
    return slurm.ended(submit(slurm, script, *driver, options=options))


@pytest.mark.parametrize("script", SCRIPTS)
def test_form(script: str) -> None:
    """Each says what it is, is correct bash, and is told of in README.md."""
    path = FOLDER / script
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n# ")
    assert "    sbatch " in text.partition("#SBATCH")[0]
    assert "# To adapt: " in text
    assert re.search(r"^#SBATCH --time=", text, re.MULTILINE)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert f"| `{script}` |" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("script", ["srun.sh", "mpiexec.sh"])
def test_a_driver_among_the_ranks(script: str, slurm: Slurm) -> None:
    end = run(slurm, script, PI)
    assert (end.state, end.rc) == ("COMPLETED", 0), end
    assert "7 workers: pi is about 3.14159" in end.out
    assert "Traceback" not in end.out
    failing = slurm.program(FAILING)
    end = run(slurm, script, failing, options=("--nodes=3", "--ntasks-per-node=1"))
    assert (end.state, end.rc) == ("FAILED", 7), end
    assert "From worker 3:\there\n" in end.out


def test_a_driver_that_adds_workers(slurm: Slurm) -> None:
    end = run(slurm, "driver_and_workers.sh", str(FOLDER / "driver_and_workers.py"))
    assert (end.state, end.rc) == ("COMPLETED", 0), end
    assert "8 workers on 2 nodes: pi is about 3.14159" in end.out
    assert "Traceback" not in end.out


def test_an_array_of_clusters(slurm: Slurm) -> None:
    text = """
import hpcdist, os
hpcdist.init()
index = int(os.environ["SLURM_ARRAY_TASK_ID"])
print(index, hpcdist.nworkers(), sum(hpcdist.pmap(lambda x: x * index, range(10))))
"""
    job = submit(slurm, "array.sh", slurm.program(text), options=("--array=0-2",))
    for index in range(3):
        end = slurm.ended(f"{job}_{index}")
        assert (end.state, end.rc) == ("COMPLETED", 0), end
        assert end.out == f"{index} 4 {45 * index}\n"


@pytest.mark.parametrize("script", ["srun.sh", "driver_and_workers.sh", "array.sh"])
def test_an_argument_with_spaces_arrives(script: str, slurm: Slurm) -> None:
    driver = slurm.file("my driver.py", "import sys\nprint(sys.argv[1:])\n")
    options: tuple[str, ...] = ("--ntasks-per-node=1", "--nodes=1")
    options += ("--array=0",) if script == "array.sh" else ()
    job = submit(slurm, script, driver, "a b", "$HOME '*'", options=options)
    end = slurm.ended(f"{job}_0" if script == "array.sh" else job)
    assert end.rc == 0, end
    assert repr(["a b", "$HOME '*'"]) in end.out
