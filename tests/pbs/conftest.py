"""The PBS of the tests in this folder: one for the whole session, tidied after each test."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import RUN, go_without
from tests.pbs.cluster import PROGRAMS, Pbs


@pytest.fixture(scope="session")
def pbs_cluster(request: pytest.FixtureRequest) -> Iterator[Pbs]:
    """Two nodes and a PBS, up for the whole session. Tests take `pbs`."""
    why = _why_not()
    if why:
        go_without(request, f"no hosts can be made: {why}")
    cluster = Pbs(put_off=request.config.stash[RUN].limit.at_least)
    try:
        cluster.up()
        seen = cluster.login(cluster.python, "-c", "import hpcdist, mpi4py")
        assert seen.rc == 0, f"the cluster's user cannot use {cluster.python}: {seen.err}"
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def pbs(pbs_cluster: Pbs) -> Iterator[Pbs]:
    """A PBS; a test that leaves a job, a process or a file behind fails."""
    yield pbs_cluster
    pbs_cluster.tidy()


def _why_not() -> str:
    """Return why no hosts can be made here; empty if they can."""
    if os.geteuid() != 0:
        return "it takes root"
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork"]
    done = subprocess.run(["unshare", *spaces, "true"], capture_output=True, text=True)
    return done.stderr.strip()
