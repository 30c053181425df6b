"""The hosts of the tests in this folder: up for the whole session, tidied after each test."""

import os
from collections.abc import Iterator

import pytest

from tests.conftest import RUN, go_without
from tests.ssh.hosts import Hosts, missing_programs


@pytest.fixture(scope="session")
def ssh_hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two hosts with sshd's. Tests take `hosts`."""
    if os.geteuid() != 0:
        go_without(request, "no hosts: it takes root to make them")
    if missing := missing_programs():
        go_without(request, f"no hosts: no {', '.join(missing)} (see tests/install.sh ssh)")
    hosts = Hosts(nodes=2, put_off=request.config.stash[RUN].limit.at_least)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()


@pytest.fixture
def hosts(ssh_hosts: Hosts) -> Iterator[Hosts]:
    """Hosts; a test that leaves a process or a file behind on one of them fails."""
    yield ssh_hosts
    ssh_hosts.tidy()
