"""The cluster of the tests in this folder: one for a whole process, tidied after each test."""

import os
from collections.abc import Iterator

import pytest

from tests.conftest import RUN, go_without
from tests.slurm.cluster import PREEMPTING, ROOT, Slurm, missing_programs


@pytest.fixture(scope="session")
def slurm_cluster(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    """Three nodes of 64 processors, up for the whole session. Tests take `slurm`."""
    yield from a_cluster(request, sacct=False)


@pytest.fixture
def slurm(slurm_cluster: Slurm) -> Iterator[Slurm]:
    """A Slurm without accounting; a test that leaves a job, a process or a file behind fails."""
    yield slurm_cluster
    slurm_cluster.tidy()


@pytest.fixture(scope="module")
def accounted_cluster(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    """A cluster with slurmdbd, for one module: it takes some memory."""
    yield from a_cluster(request, sacct=True)


@pytest.fixture
def accounted_slurm(accounted_cluster: Slurm) -> Iterator[Slurm]:
    """The same as `slurm`, on a cluster where sacct works."""
    yield accounted_cluster
    accounted_cluster.tidy()


@pytest.fixture(scope="module")
def preempting_cluster(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    """A cluster with a partition whose jobs others take the place of, for one module."""
    yield from a_cluster(request, sacct=False, extra_conf=PREEMPTING)


@pytest.fixture
def preempting_slurm(preempting_cluster: Slurm) -> Iterator[Slurm]:
    """The same as `slurm`, on a cluster with the partition `scavenge`."""
    yield preempting_cluster
    preempting_cluster.tidy()


def a_cluster(
    request: pytest.FixtureRequest, *, sacct: bool, extra_conf: str = ""
) -> Iterator[Slurm]:
    """Yield a cluster that is up; for a fixture of a module that needs one of its own."""
    why = _why_not(sacct)
    if why:
        go_without(request, f"no Slurm: {why}")
    limit = request.config.stash[RUN].limit
    cluster = Slurm(sacct=sacct, extra_conf=extra_conf, put_off=limit.at_least)
    try:
        cluster.up()
        seen = cluster.login(cluster.python, "-c", "import hpcdist, mpi4py")
        assert seen.rc == 0, f"the cluster's user cannot use {cluster.python}, {ROOT}: {seen.err}"
        yield cluster
    finally:
        cluster.down()


def _why_not(sacct: bool) -> str:
    """Return why no cluster can be made here; empty if one can."""
    if os.geteuid() != 0:
        return "it takes root to make the machines"
    missing = missing_programs(sacct=sacct)
    if missing:
        return f"{', '.join(missing)} not installed (see tests/install.sh slurm)"
    return ""
