"""Which cores and GPUs workers get, on machines that are not at hand."""

import os
from pathlib import Path

import pytest

from hpcdist import LocalManager, PBSManager, SlurmManager
from hpcdist._worker.affinity import Where, ordered, places, topology
from hpcdist._worker.gpus import ASKED, gpus, seat_of, share_of, shares, take_share


def machine(packages: int, caches: int, cores: int, threads: int) -> dict[int, Where]:
    """A machine numbered as Linux does it: first threads first, then the second ones."""
    where: dict[int, Where] = {}
    for _ in range(threads):
        for core in range(packages * caches * cores):
            cache = core // cores
            where[len(where)] = (cache // caches, cache * cores, core % (caches * cores))
    return where


def test_balanced_goes_round_the_packages() -> None:
    where = machine(2, 1, 4, 1)
    assert ordered(where, "balanced") == [0, 4, 1, 5, 2, 6, 3, 7]
    assert ordered(where, "compact") == list(range(8))


def test_balanced_goes_round_the_caches_of_a_package() -> None:
    assert ordered(machine(2, 2, 2, 1), "balanced") == [0, 4, 2, 6, 1, 5, 3, 7]


def test_second_threads_of_cores_come_last() -> None:
    where = machine(2, 1, 2, 2)  # CPUs 4 to 7 are the second threads of 0 to 3
    assert ordered(where, "balanced") == [0, 2, 1, 3, 4, 6, 5, 7]
    assert ordered(where, "compact") == [0, 4, 1, 5, 2, 6, 3, 7]


def test_packages_of_which_a_cgroup_leaves_unequal_parts() -> None:
    where = machine(2, 1, 4, 1)
    left = {cpu: where[cpu] for cpu in (1, 4, 5, 6)}
    assert ordered(left, "balanced") == [1, 4, 5, 6]
    assert ordered({cpu: where[cpu] for cpu in (0, 1, 2, 5)}, "balanced") == [0, 5, 1, 2]


@pytest.mark.parametrize("mode", ["balanced", "compact"])
def test_every_cpu_once(mode: str) -> None:
    where = machine(2, 3, 5, 2)
    assert sorted(ordered(where, mode)) == sorted(where)


def test_topology_is_read_from_sysfs(tmp_path: Path) -> None:
    for cpu, package, core, cache in [(0, 0, 0, "0-1"), (2, 1, 7, "2,10-11")]:
        for name, text in [
            ("topology/physical_package_id", package),
            ("topology/core_id", core),
            ("cache/index3/shared_cpu_list", cache),
        ]:
            file = tmp_path / f"cpu{cpu}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
    assert topology([2, 0], str(tmp_path)) == {0: (0, 0, 0), 2: (1, 2, 7)}


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    assert topology([3, 1], str(tmp_path)) == {1: (0, 0, 1), 3: (0, 0, 3)}
    (tmp_path / "cpu1" / "topology").mkdir(parents=True)
    (tmp_path / "cpu1" / "topology" / "physical_package_id").write_text("-1\n")
    assert topology([1], str(tmp_path)) == {1: (0, 0, 1)}


@pytest.mark.parametrize(
    ("environ", "devices", "expected"),
    [
        ({}, [], []),
        ({}, ["/dev/nvidia1", "/dev/nvidia0"], ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["/dev/nvidia0"], []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["/dev/nvidia0"], []),
        ({"CUDA_VISIBLE_DEVICES": "3, 1"}, ["/dev/nvidia0"], ["3", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,MIG-1c"}, [], ["GPU-8932f937", "MIG-1c"]),
        ({"CUDA_VISIBLE_DEVICES": "0,,2"}, [], ["0"]),
    ],
)
def test_gpus(environ: dict[str, str], devices: list[str], expected: list[str]) -> None:
    assert gpus(environ, devices) == expected


@pytest.mark.parametrize(
    ("found", "n", "expected"),
    [
        (["0", "1"], 2, ["0", "1"]),
        (["0", "1", "2", "3"], 2, ["0,2", "1,3"]),
        (["0", "1", "2"], 2, ["0,2", "1"]),
        (["0", "1"], 5, ["0", "1", "0", "1", "0"]),
        ([], 3, []),
    ],
)
def test_shares(found: list[str], n: int, expected: list[str]) -> None:
    assert shares(found, n) == expected


def test_places_are_on_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    allowed = sorted(os.sched_getaffinity(0))
    found = places(len(allowed) + 1, "compact")
    assert sorted(place["cpu"] for place in found[:-1]) == allowed
    assert found[-1]["cpu"] == found[0]["cpu"]
    assert found[0]["env"]["CUDA_VISIBLE_DEVICES"].startswith("4")


def test_no_gpus_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [place["env"] for place in places(2, "balanced")] == [{}, {}]


def test_what_a_manager_takes_and_shows() -> None:
    assert repr(LocalManager(2)) == "LocalManager(2)"
    assert repr(LocalManager(2, "compact")) == "LocalManager(2, affinity='compact')"
    with pytest.raises(ValueError, match="'balanced', 'compact' or None, not 'near'"):
        LocalManager(2, affinity="near")


# What launchers leave in the environment of the second of three tasks on the second of two hosts.
LAUNCHERS = {
    "srun": {
        "SLURM_NODEID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4,3",
        "SLURM_TASKS_PER_NODE": "8(x2)",  # the job's: the step may have fewer
    },
    "hydra, whose proxy is a task of Slurm": {
        "MPI_LOCALRANKID": "1",
        "MPI_LOCALNRANKS": "3",
        "SLURM_NODEID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    },
    "Open MPI": {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_task_knows_its_seat_on_its_host(launcher: str) -> None:
    assert seat_of(LAUNCHERS[launcher]) == (1, 3)
    assert seat_of({}) is None


@pytest.mark.parametrize(
    "variable", ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"]
)
def test_each_vendor_s_variable_is_shared(variable: str) -> None:
    granted = {variable: "4,5,6,7", "OTHER": "x"}
    of_two = [share_of(granted, k, 2) for k in range(2)]
    assert of_two == [{variable: "4,6"}, {variable: "5,7"}]
    of_eight = [share_of(granted, k, 8)[variable] for k in range(8)]
    assert of_eight == ["4", "5", "6", "7"] * 2  # two share one


def test_all_variables_that_a_job_has_are_shared() -> None:
    granted = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "0,1")
    assert share_of(granted, 1, 2) == dict.fromkeys(granted, "1")
    assert share_of({"ZE_AFFINITY_MASK": "0.0,0.1"}, 1, 2) == {"ZE_AFFINITY_MASK": "0.1"}
    assert share_of({"CUDA_VISIBLE_DEVICES": ""}, 0, 2) == {}


def test_what_a_task_was_granted_alone_is_not_shared() -> None:
    """Slurm's --gpus-per-task=2 on a host where the job has 4."""
    mine = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}
    assert share_of(mine, 1, 2) == {}
    assert share_of({**mine, "SLURM_GPUS_ON_NODE": "2"}, 1, 2) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_task_takes_its_share_once_and_only_if_it_is_to() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,2", **LAUNCHERS["Open MPI"]}
    take_share(environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    environ[ASKED] = "auto"
    take_share(environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert ASKED not in environ  # what the task starts shares nothing again
    take_share(environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_task_that_knows_no_seat_says_so(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1", ASKED: "auto"}
    take_share(environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert "gpus='auto'" in caplog.text


def test_scripts_say_that_gpus_are_to_be_shared() -> None:
    script = SlurmManager(2).job_script(gpus="auto", gres="gpu:4", mpi="pmi2")
    assert f"export {ASKED}=auto" in script
    assert "#SBATCH --gres=gpu:4" in script
    assert "--gpus" not in script
    theirs = SlurmManager(2).job_script(gpus=4, mpi="pmi2")
    assert "#SBATCH --gpus=4" in theirs
    assert ASKED not in theirs
    program = PBSManager(2).program_script(["a.py"], gpus="auto", select="1:ngpus=4")
    assert f"export {ASKED}=auto" in program
