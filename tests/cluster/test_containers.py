"""`wrapper=`, `container=` and `srun_args=`: what stands before the Python of workers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import _config
from hpcdist._keeper import installed_mpi
from hpcdist._keeper.installed_mpi import MpiNotFound, find_mpi
from hpcdist.managers import BatchManager
from tests import containers, helpers

_MAKES_NAMESPACES = (
    os.geteuid() == 0
    and subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0
)
needs_namespaces = pytest.mark.skipif(not _MAKES_NAMESPACES, reason="it takes root to mount")

NICE = ["nice", "-n", "5"]
JOBS = [hpcdist.SlurmManager, hpcdist.PBSManager, hpcdist.SGEManager, hpcdist.LSFManager]


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The stand-in on PATH, and an image of this environment."""
    made = containers.install(tmp_path)
    monkeypatch.setenv("PATH", containers.path(tmp_path))
    return str(made)


def where() -> tuple[str, str | None, str | None]:
    return sys.executable, os.environ.get("APPTAINER_CONTAINER"), os.environ.get("STANDIN_NV")


@needs_namespaces
@pytest.mark.parametrize(
    ("manager", "isolation"),
    [
        (hpcdist.LocalManager(2), "auto"),
        (hpcdist.LocalManager(2), "process"),
        (hpcdist.MPIManager(2), "auto"),
    ],
    ids=["world", "process", "mpiexec"],
)
def test_workers_run_in_a_container(image: str, manager: Any, isolation: str) -> None:
    placed: dict[str, Any] = {"container": image, "container_args": ["--nv"], "wrapper": NICE}
    with hpcdist.cluster(manager, isolation=isolation, **placed) as pids:
        inside = f"{containers.PREFIX}/bin/python3"
        for pid in pids:
            assert hpcdist.remotecall_fetch(where, pid) == (inside, image, "1")
            assert hpcdist.remotecall_fetch(os.nice, pid, 0) == os.nice(0) + 5
        if isolation == "auto":
            assert hpcdist.spmd(lambda: hpcdist.comm().allreduce(1)) == [2, 2]


@needs_namespaces
def test_the_mpi_inside_finds_its_launcher_outside(image: str) -> None:
    found = find_mpi(["apptainer", "exec", image, "python3"])
    assert found == find_mpi()
    assert found.is_wheel == find_mpi().is_wheel


@needs_namespaces
def test_doctor_looks_inside(image: str, tmp_path: Path) -> None:
    def doctor(*options: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "hpcdist", "doctor", *options],
            capture_output=True,
            text=True,
            timeout=100,
            env={
                **os.environ,
                **helpers.mpi_environment(),
                "HPCDIST_DIR": str(tmp_path / "runs"),
                # No scheduler is to be found.
                "PATH": f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}",
            },
        )
        return done.returncode, done.stdout

    code, said = doctor("--container", image, "--container-args", "--nv")
    assert f"({containers.PREFIX}/bin/python3), hpcdist {hpcdist.__version__}" in said
    assert "the folder of runs and the one to work in are visible" in said
    assert "two ranks of one world start here" in said
    assert code == 0, said
    code, said = doctor("--container", str(tmp_path / "none.sif"))
    assert code == 1
    assert "could not open image" in said
    code, said = doctor("--python", f"apptainer exec {image} python2")
    assert code == 1
    assert "python2" in said


def other_mpi(folder: Path, library: str) -> list[str]:
    """Return a command that says of itself that its mpi4py loads another library."""
    answer = json.dumps(["/opt/bin/python3", "/opt", "/opt/lib/mpi4py", library, False])
    program = folder / "image"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    return [str(program), "python3"]


def test_an_mpi_outside_that_does_not_match_is_named(tmp_path: Path) -> None:
    outside = find_mpi()
    inside = other_mpi(tmp_path, "Open MPI v4.1.4, package: Debian OpenMPI")
    with pytest.raises(hpcdist.LaunchError, match="do not match") as caught:
        hpcdist.addprocs(hpcdist.MPIManager(2), python=inside)
    for part in ("inside (Open MPI 4.1.4)", outside.mpiexec, ".".join(map(str, outside.version))):
        assert part in str(caught.value)
    with pytest.raises(
        MpiNotFound, match=r"inside \(Open MPI 4\.1\.4\) and outside .* do not match"
    ):
        hpcdist.PBSManager(2).job_script(python=inside)
    assert hpcdist.nprocs() == 1


def test_a_container_needs_no_launcher_outside_where_srun_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed_mpi, "_launchers", lambda asked, looked: ())
    inside = other_mpi(tmp_path, "MPICH Version:      4.1.2")
    script = hpcdist.SlurmManager(2).job_script(python=inside)
    assert "srun --mpi=pmi2" in script
    with pytest.raises(
        MpiNotFound, match=r"inside is MPICH 4\.1\.2, and outside there is no launcher"
    ):
        hpcdist.SlurmManager(2).job_script(python=inside, launcher="mpiexec")


@pytest.mark.any_mpi
@pytest.mark.parametrize("kind", JOBS)
def test_every_script_has_the_line(
    kind: type[BatchManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = installed_mpi.Mpi("mpich", (4, 0), "/opt/bin/mpiexec")
    monkeypatch.setattr(installed_mpi, "find_mpi", lambda python: found)
    script = kind(4).job_script(
        container="app.sif", container_args=["--nv"], wrapper=["numactl", "--localalloc"]
    )
    assert (
        "numactl --localalloc apptainer exec --nv app.sif python3 -m hpcdist worker --join"
        in script
    )
    assert f"\n{sys.executable} -P -m hpcdist keeper" in script
    program = kind(4).program_script(["driver.py"], container="app.sif")
    assert "apptainer exec app.sif python3 driver.py" in program


@pytest.mark.any_mpi
def test_the_keeper_of_a_wrapped_interpreter_is_that_interpreter() -> None:
    script = hpcdist.SlurmManager(2).job_script(wrapper=NICE, python="./bin/python", mpi="pmi2")
    python = os.path.abspath("bin/python")
    assert f"\n{python} -P -m hpcdist keeper" in script
    assert f"nice -n 5 {python} -m hpcdist worker" in script


@pytest.mark.any_mpi
def test_srun_gets_its_arguments_as_they_are() -> None:
    script = hpcdist.SlurmManager(2).job_script(
        mpi="pmi2", srun_args=["--cpu-bind=none", "--comment=a b"]
    )
    assert f"--label --cpu-bind=none '--comment=a b' {sys.executable} -m hpcdist" in script


def test_arguments_for_srun_have_srun_start_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed_mpi.Mpi("openmpi", (5, 0), "/opt/bin/mpiexec")
    monkeypatch.setattr(installed_mpi, "find_mpi", lambda python: found)
    monkeypatch.setattr(hpcdist.SlurmManager, "flavours", lambda self: frozenset({"pmix"}))
    assert "srun" not in hpcdist.SlurmManager(2).job_script().split("keeper")[1]
    script = hpcdist.SlurmManager(2).job_script(srun_args=["--exact"])
    assert "srun --mpi=pmix" in script


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    ("kind", "words", "params"),
    [
        (
            ValueError,
            ("python='python3'", "container='a.sif'"),
            {"python": "python3", "container": "a.sif"},
        ),
        (ValueError, ("python=", "container="), {"exename": "python3", "container": "a.sif"}),
        (TypeError, ("python=", "[]"), {"python": []}),
        (TypeError, ("python=", "''"), {"python": ["", "python3"]}),
        (TypeError, ("wrapper=", "[]"), {"wrapper": []}),
        (TypeError, ("wrapper=", "'numactl'"), {"wrapper": "numactl"}),
        (TypeError, ("wrapper=", "5"), {"wrapper": ["nice", 5]}),
        (TypeError, ("container=", "5"), {"container": 5}),
        (ValueError, ("container=''",), {"container": ""}),
        (
            TypeError,
            ("container_args=", "'--nv'"),
            {"container": "a.sif", "container_args": "--nv"},
        ),
        (ValueError, ("container_args=", "container="), {"container_args": ["--nv"]}),
        (TypeError, ("'containr'", "'container'"), {"containr": "a.sif"}),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(
    kind: type[Exception], words: tuple[str, ...], params: dict[str, Any]
) -> None:
    for manager in (hpcdist.LocalManager(2), hpcdist.SlurmManager(2), hpcdist.SSHManager(["h"])):
        with pytest.raises(kind) as caught:
            hpcdist.addprocs(manager, **params)
        assert [word for word in words if word not in str(caught.value)] == []
    assert hpcdist.nprocs() == 1


@pytest.mark.any_mpi
def test_srun_args_elsewhere_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"srun_args= is for jobs of Slurm: LocalManager\(2\)"):
        hpcdist.addprocs(2, srun_args=["--exact"])
    for manager in (hpcdist.PBSManager(2), hpcdist.SGEManager(2), hpcdist.LSFManager(2)):
        with pytest.raises(ValueError, match=r"srun_args=\['--exact'\] contradicts \w+\(2\)"):
            manager.job_script(srun_args=["--exact"])
    with pytest.raises(ValueError, match=r"srun_args=.* contradicts launcher='mpiexec'"):
        hpcdist.SlurmManager(2).job_script(srun_args=["--exact"], launcher="mpiexec")
    with pytest.raises(TypeError, match="srun_args= is a list of words"):
        hpcdist.SlurmManager(2).job_script(srun_args="--exact")


@pytest.mark.any_mpi
def test_files_of_settings_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hpcdist.toml").write_text(
        '[slurm]\nmpi = "pmi2"\ncontainer = "site.sif"\ncontainer_args = ["--nv"]\n'
        'wrapper = ["numactl", "-l"]\nsrun_args = ["--exact"]\n'
        '[pbs]\ncontainer = "a.sif"\npython = "python3"\n'
    )
    _config.forget()
    try:
        manager = hpcdist.SlurmManager(2)
        assert "--exact numactl -l apptainer exec --nv site.sif python3 -m" in manager.job_script()
        # What is nearer chooses: another image, an interpreter, none of them.
        assert "exec --nv my.sif python3" in manager.job_script(container="my.sif")
        assert "numactl -l nice py -m" in manager.job_script(python=["nice", "py"])
        assert f"--exact {sys.executable} -m" in manager.job_script(container=None, wrapper=None)
        with pytest.raises(ValueError, match=r"\[pbs\]: python='python3' and container='a.sif'"):
            hpcdist.PBSManager(2).job_script()
    finally:
        monkeypatch.undo()
        _config.forget()


@pytest.mark.any_mpi
def test_the_command_line_takes_them(tmp_path: Path) -> None:
    (tmp_path / "app.sif").touch()
    (tmp_path / "driver.py").touch()

    def script(*options: str) -> str:
        words = [
            "script",
            "driver.py",
            "-n",
            "2",
            "--scheduler",
            "slurm",
            "--mpi",
            "pmi2",
            *options,
        ]
        done = subprocess.run(
            [sys.executable, "-m", "hpcdist", *words],
            capture_output=True,
            text=True,
            timeout=helpers.patient(50),
            cwd=tmp_path,
        )
        assert done.returncode == (0 if done.stdout else 1), done.stderr
        return done.stdout or done.stderr

    made = script(
        *("--container", "app.sif", "--container-args", "--nv", "--wrapper", "numactl -l"),
        *(
            "--srun-args",
            "--exact",
            "--srun-args=--cpu-bind=none --mem=0",
            "--container-args=-H /h",
        ),
    )
    image = tmp_path / "app.sif"
    assert (
        f"--exact --cpu-bind=none --mem=0 numactl -l apptainer exec --nv -H /h {image} python3 "
        "driver.py" in made
    )
    assert "are one choice" in script("--container", "app.sif", "--python", sys.executable)
