"""What process 1 sends and receives grows with the worlds, not with their workers."""

import pytest

from hpcdist.testing.__main__ import main
from hpcdist.testing.scale import Cost, costs

pytestmark = pytest.mark.any_mpi


@pytest.fixture(scope="module")
def small() -> dict[str, Cost]:
    return {cost.what: cost for cost in costs(8, 4, 2000)}


@pytest.fixture(scope="module")
def large() -> dict[str, Cost]:
    return {cost.what: cost for cost in costs(64, 4, 2000)}


@pytest.mark.parametrize("what", ["everywhere", "reduce", "distributed"])
def test_a_tree_takes_a_message_for_each_world_at_the_most(
    what: str, large: dict[str, Cost]
) -> None:
    assert large[what].sent <= 4
    assert large[what].received <= 4
    assert large[what].all == 2 * 64


def test_a_large_value_leaves_process_1_once_for_each_world(
    small: dict[str, Cost], large: dict[str, Cost]
) -> None:
    for found in (small, large):
        assert 4 << 20 <= found["bcast"].sent_bytes < 5 << 20


def test_a_map_takes_some_messages_for_each_worker(large: dict[str, Cost]) -> None:
    assert large["pmap"].sent <= 10 * 64
    assert large["pmap"].received <= 10 * 64


def test_each_worker_is_told_of_joins_and_deaths_a_few_times(large: dict[str, Cost]) -> None:
    assert 64 <= large["joining"].sent <= 8 * 64
    assert 48 <= large["a loss"].sent <= 4 * 48


def test_a_table_of_several_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--items", "100", "--table", "2/1", "4/2"]) == 0
    heading, _, joining, *rest = capsys.readouterr().out.splitlines()
    assert heading == "| process 1 sends for | 2 in 1 | 4 in 2 |"
    assert joining.startswith("| joining | ")
    assert len(rest) == 6


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--workers", "4", "--worlds", "2", "--items", "100"]) == 0
    assert "everywhere" in capsys.readouterr().out
