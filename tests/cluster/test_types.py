"""Types: what a program says of them runs, and costs nothing. `make lint` checks what they say."""

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import Future, RemoteChannel, RemoteValue
from hpcdist._maps.map_options import MapOptions

pytestmark = pytest.mark.any_mpi

PROGRAM = Path(__file__).with_name("typed_program.py")


def test_a_typed_program_runs(script: Callable[..., Any]) -> None:
    done = script(PROGRAM.read_text())
    assert (done.rc, done.out) == (0, "5 6 6\n"), done.err


def test_types_stay_out_of_the_way_at_run_time() -> None:
    for kind in (Future, RemoteChannel, RemoteValue):
        assert typing.get_origin(kind[int]) is kind
    assert typing.Generic not in Future.__mro__
    channel = RemoteChannel[int](3)
    assert type(channel) is RemoteChannel
    channel.put(1)
    assert channel.take() == 1


@pytest.mark.parametrize("name", ["pmap", "imap", "imap_unordered"])
def test_the_keywords_of_maps_are_those_that_type_checkers_know(name: str) -> None:
    parameters = inspect.signature(getattr(hpcdist, name)).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert known == set(MapOptions.__annotations__)
