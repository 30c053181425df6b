"""Who holds what is owned here, and when it goes."""

import hpcdist
from hpcdist._runtime.node import Node
from hpcdist._runtime.references import References
from hpcdist.testing import Simulation


def test_a_value_goes_with_its_last_copy() -> None:
    table = Node().service(References)
    table.count((1, 5), 1, 1)
    table.count((1, 5), 2, -1)  # gone before the word that it was sent
    table.count((1, 5), 2, 1)
    assert (1, 5) in table.owned
    table.count((1, 5), 1, -1)
    assert not table.owned


def test_copies_may_outlive_what_was_freed() -> None:
    table = Node().service(References)
    table.count((1, 5), 1, 1)
    table.count((1, 5), 2, 2)
    table.count((1, 5), 3, 1)
    table.free((1, 5), 1)
    assert not table.owned
    table.count((1, 5), 2, -1)
    table._on_death(3)
    assert table._outlived == {(1, 5): {2: 1}}
    table.count((1, 5), 2, -1)
    assert not table.owned
    assert not table._outlived


def test_a_value_that_was_freed_leaves_nothing() -> None:
    """A worker lets go of its copy after process 1 has freed the value."""
    with Simulation(nodes=3) as sim:

        def use() -> int:
            with hpcdist.bcast([1, 2]) as value:
                return hpcdist.remotecall_fetch(sum, 2, value)

        assert sim.node(1).run(use) == 3
        sim.advance(10)
        table = sim.node(1).node.service(References)
        assert not table.owned
        assert not table._outlived
