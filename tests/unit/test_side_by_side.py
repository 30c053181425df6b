"""How the tests are dealt out to processes, and what becomes of those of one that ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from xdist.remote import Producer

from tests._side_by_side import _FIRST, _ONE_CLUSTER, ByCluster, begins_at, scope_of

TESTS = [f"tests/cluster/test_{module}.py::test_{k}" for module in "abcd" for k in range(4)]


class Process:
    """One of the processes, as the controller sees it."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name, spec=name)
        self.given: list[int] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def scheduler(*processes: Any) -> ByCluster:
    options = SimpleNamespace(loadscopereorder=False)
    specs = ["popen"] * len(processes)
    config: Any = SimpleNamespace(getvalue=lambda name: specs, option=options)
    made = ByCluster(config, Producer("tests", enabled=False))
    for process in processes:
        made.add_node(process)
    for process in processes:
        made.add_node_collection(process, TESTS)
    made.schedule()
    return made


def run(made: ByCluster, process: Process, ran: list[str]) -> bool:
    """Let a process run what it may: it keeps its last test until it knows the next, or the end."""
    before = len(ran)
    while len(process.given) > (0 if process.shutting_down else 1):
        index = process.given.pop(0)
        ran.append(TESTS[index])
        made.mark_test_complete(process, index)  # type: ignore[arg-type]
    return len(ran) > before


def run_all(made: ByCluster, processes: list[Process], ran: list[str]) -> None:
    while sum(run(made, process, ran) for process in processes):
        pass
    if made.tests_finished:
        for process in processes:
            process.shutdown()
            run(made, process, ran)


def test_each_test_runs_once() -> None:
    processes: Any = [Process("a"), Process("b")]
    ran: list[str] = []
    run_all(scheduler(*processes), processes, ran)
    assert sorted(ran) == TESTS


def test_when_a_process_ends_the_others_run_all_but_the_test_it_ended_in() -> None:
    first, second = Process("a"), Process("b")
    processes: Any = [first, second]
    made = scheduler(*processes)
    ran: list[str] = []
    while len(ran) < 5:  # a whole module and the beginning of the next
        index = first.given.pop(0)
        ran.append(TESTS[index])
        made.mark_test_complete(first, index)  # type: ignore[arg-type]
    ended_in = TESTS[first.given[0]]
    assert made.remove_node(first) == ended_in  # type: ignore[arg-type]
    run_all(made, [second], ran)
    assert sorted([*ran, ended_in]) == TESTS


def test_two_processes_that_take_the_places_of_two_begin_one_after_the_other() -> None:
    processes = [Process("a"), Process("b")]
    made: Any = scheduler(*processes)
    for process in processes:
        made.remove_node(process)
    first, second = Process("c"), Process("d")
    made.add_node(first)
    made.add_node(second)
    made.add_node_collection(first, TESTS)
    made.schedule()  # while the second is still looking for its tests
    assert first.given
    assert not second.given
    made.add_node_collection(second, TESTS)
    made.schedule()
    assert second.given


def test_a_folder_with_one_cluster_stays_together_and_slurm_goes_by_modules() -> None:
    assert scope_of("tests/pbs/test_x.py::test_y[1]") == "tests/pbs"
    assert scope_of("tests/slurm/test_x.py::test_y") == "tests/slurm/test_x.py"


def test_what_takes_longest_begins_first_and_the_rest_stays_in_order() -> None:
    last = f"{_FIRST[-1]}::test_z"
    rest = ["tests/unit/test_x.py::test_b", "tests/cluster/test_x.py::test_a"]
    found = sorted([*rest, last, f"{_FIRST[0]}::test_a"], key=begins_at)
    assert found == [f"{_FIRST[0]}::test_a", last, *rest]


@pytest.mark.parametrize("place", [*_FIRST, *_ONE_CLUSTER])
def test_what_the_tables_name_is_there(place: str) -> None:
    assert Path(__file__).parents[2].joinpath(place).exists()
