"""Faults that this repository once had: random programs find them when they are put back."""

import pytest

from tests.old_faults import FAULTS, Fault, find, put_back

pytestmark = pytest.mark.any_mpi

_NAMED = [pytest.param(fault, id=f"{fault.commit}-{n}") for n, fault in enumerate(FAULTS)]


@pytest.mark.parametrize("fault", _NAMED)
def test_a_fault_can_be_put_back(fault: Fault) -> None:
    healthy = [vars(change.owner)[change.method] for change in fault.changes]
    with put_back(fault):
        sick = [vars(change.owner)[change.method] for change in fault.changes]
        assert all(a is not b for a, b in zip(healthy, sick, strict=True))
    assert healthy == [vars(change.owner)[change.method] for change in fault.changes]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.what.startswith("a copy")])
def test_a_fault_is_found(fault: Fault) -> None:
    assert find(fault, 30) is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", [param for param in _NAMED if param.values[0].seed is not None])
def test_each_fault_is_found(fault: Fault) -> None:
    assert find(fault, 300, fault.seed or 0) is not None
