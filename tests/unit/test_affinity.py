"""Which cores and GPUs workers get, on machines that are not at hand."""

import os
from pathlib import Path

import pytest

from hpcdist import LocalManager
from hpcdist._managers.affinity import Where, gpus, ordered, places, shares, topology


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
