"""Much at once: values over 2 GiB, and a hundred thousand calls in flight."""

from __future__ import annotations

import numpy as np
import pytest

import hpcdist

BEYOND = 2**31 + 5  # more than fits a C int, and not a round number


def last_of(data: np.ndarray) -> tuple[int, int]:
    return len(data), int(data[-1])


def made(size: int) -> np.ndarray:
    data = np.zeros(size, np.uint8)  # pages nobody wrote to cost nothing until they are sent
    data[-1] = 7
    return data


def made_elsewhere(pid: int, size: int) -> tuple[int, int]:
    return last_of(hpcdist.remotecall_fetch(made, pid, size))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_argument_over_2_gib(pids: list[int]) -> None:
    assert hpcdist.remotecall_fetch(last_of, pids[0], made(BEYOND)) == (BEYOND, 7)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_result_over_2_gib_between_workers(pids: list[int]) -> None:
    found = hpcdist.remotecall_fetch(made_elsewhere, pids[0], pids[1], BEYOND)
    assert found == (BEYOND, 7)


@pytest.mark.timeout(120)
def test_a_hundred_thousand_calls_outstanding(pids: list[int]) -> None:
    calls = 100_000
    futures = [hpcdist.remotecall(abs, pids[k % 3], -k) for k in range(calls)]
    assert sum(f.fetch() for f in futures) == sum(range(calls))
