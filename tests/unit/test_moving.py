"""States that only move forward: workers, worlds, launches' phases, sections and their members."""

import enum
from collections.abc import Collection, Mapping
from typing import Any

import pytest

from hpcdist._cluster import roster, sections
from hpcdist._cluster.moving import Moving, in_order
from hpcdist._cluster.world_states import Life, WorldStates
from hpcdist._contract.phases import Phase

pytestmark = pytest.mark.any_mpi

TABLES = {
    "a worker's life": roster._NEXT,
    "a member's share": sections._SHARES,
    "a section's stage": sections._STAGES,
    "a world's life": in_order(Life),
    "a world's phase": in_order(Phase),
}
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))


@each_table
def test_every_state_is_in_its_table(table: Mapping[enum.Enum, Collection[enum.Enum]]) -> None:
    kind = type(next(iter(table)))
    assert list(table) == list(kind)


@each_table
def test_no_way_leads_back(table: Mapping[enum.Enum, Collection[enum.Enum]]) -> None:
    for state in table:
        ahead = set(table[state])
        while more := {after for before in ahead for after in table[before]} - ahead:
            ahead |= more
        assert state not in ahead


@each_table
def test_it_moves_as_its_table_says(table: Mapping[Any, Collection[Any]]) -> None:
    for first in table:
        for state in table:
            moving = Moving(table, first)
            assert moving.to(state) == (state in table[first])
            assert moving.now is (state if state in table[first] else first)


def test_a_world_that_is_over_does_not_close_again() -> None:
    world = WorldStates()
    assert not world.closed
    assert world._life.to(Life.CLOSED)
    assert not world._life.to(Life.ABANDONED)
    assert world._life.to(Life.OVER)
    assert not world._life.to(Life.CLOSED)
    assert world.closed


def test_a_start_that_has_come_far_does_not_fall_back() -> None:
    world = WorldStates()
    for phase in (Phase.FINDING_MPI, Phase.INITIALISING_MPI, Phase.STARTING_WORKERS):
        world.reach(phase)
    assert str(world.phase) == "MPI's initialisation"
