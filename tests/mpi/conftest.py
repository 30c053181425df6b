"""Tests that run inside a world: every rank runs the same pytest session.

    mpiexec -n 4 python -m pytest --with-mpi tests/mpi

Write such a test as if it ran on pid 1 alone, and mark its module:

    pytestmark = pytest.mark.mpi(min_size=4)

    def test_every_rank_answers(world):
        assert hpcdist.procs() == [1, *world]

What happens: all ranks reach the fixture `world` and enter `hpcdist.cluster(MPIManager())`. Rank 0
gets the pids, runs the test's body, and leaves the cluster when the fixture is taken down. The
other ranks serve for that long inside the fixture; their bodies are skipped, and they go on with
rank 0.

A test without `world` runs on all ranks, as an SPMD program does; there
`with hpcdist.cluster(hpcdist.MPIManager()) as pids:` yields None on all ranks but 0.

After each test the ranks tell each other how it went. So they stay in step whatever has failed
where, and rank 0, the only one that prints, reports the failures of the others as its own. A rank
that does not come to this meeting hangs in its test: the time limit ends the run, with the stacks
of all ranks.
"""

import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

# What a rank may say after a test; the rest is cut off.
_MEETING_BYTES = 16 * 1024

_FAILURES = pytest.StashKey[list[str]]()
_MEETING = pytest.StashKey[Any]()  # an Intracomm; MPI is loaded on use


@pytest.fixture
def world() -> Iterator[list[int] | None]:
    """Make one cluster of all ranks: its workers' pids on rank 0, None on the others."""
    import hpcdist

    with hpcdist.cluster(hpcdist.MPIManager()) as pids:
        yield pids


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the body of a test that uses `world` on rank 0 alone."""
    if "world" in pyfuncitem.fixturenames and pyfuncitem.funcargs.get("world") is None:
        return True
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    failures = item.stash.setdefault(_FAILURES, [])
    if report.failed:
        failures.append(f"{report.when}:\n{report.longreprtext}")
    # Every rank comes to the last phase of every test, whatever went wrong in the ones before.
    if report.when == "teardown" and item.config.getoption("--with-mpi", False):
        told = _tell_all(item.config, "\n".join(failures))
        others = [f"rank {rank}, {text}" for rank, text in told if text]
        if others and not failures:
            report.outcome = "failed"
            report.longrepr = "\n".join(others)
        elif others:
            report.sections.append(("on other ranks", "\n".join(others)))
    return report


def _tell_all(config: pytest.Config, text: str) -> list[tuple[int, str]]:
    """Tell all ranks how the test went here; return what the other ranks say."""
    from mpi4py import MPI

    if MPI.COMM_WORLD.size == 1:
        return []
    if _MEETING not in config.stash:
        # Our own communicator: no message of a test, nor one of the package, is taken for ours.
        config.stash[_MEETING] = MPI.COMM_WORLD.Dup()
    comm = config.stash[_MEETING]
    mine = bytearray(_MEETING_BYTES)
    encoded = text.encode(errors="replace")[:_MEETING_BYTES]
    mine[: len(encoded)] = encoded
    everyones = bytearray(_MEETING_BYTES * comm.size)
    request = comm.Iallgather(mine, everyones)
    # Whoever waits in vain here ends by the time limit of this test, and so do those it waits for.
    while not request.Test():
        time.sleep(0.001)
    parts = (
        bytes(everyones[rank * _MEETING_BYTES : (rank + 1) * _MEETING_BYTES])
        for rank in range(comm.size)
    )
    texts = [part.rstrip(b"\0").decode(errors="replace") for part in parts]
    return [(rank, said) for rank, said in enumerate(texts) if rank != comm.rank]
