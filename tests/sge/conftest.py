"""The cluster of the tests in this folder: one for the whole session, tidied after each test."""

import os
from collections.abc import Iterator

import pytest

from tests.conftest import RUN, go_without
from tests.sge.cluster import GridEngine, missing_programs


@pytest.fixture(scope="session")
def sge_cluster(request: pytest.FixtureRequest) -> Iterator[GridEngine]:
    """Two hosts of 8 slots, up for the whole session. Tests take `sge`."""
    if os.geteuid() != 0:
        go_without(request, "no Grid Engine: it takes root to make the machines")
    missing = missing_programs()
    if missing:
        go_without(request, f"no Grid Engine: no {', '.join(missing)} (tests/install.sh sge)")
    cluster = GridEngine(2, 8, put_off=request.config.stash[RUN].limit.at_least)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def sge(sge_cluster: GridEngine) -> Iterator[GridEngine]:
    """A Grid Engine; a test that leaves a job, a process or a file behind fails."""
    yield sge_cluster
    sge_cluster.tidy()
