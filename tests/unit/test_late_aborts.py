"""The keeper of a job: ends of ranks and the word of MPI_Abort, which come in either order."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from hpcdist._keeper.job_keeper import JobKeeper
from hpcdist._keeper.processes import Op, Output
from hpcdist._schedulers.launchers import PRTE_LABEL
from hpcdist._transport import tls

# Of Open MPI 5.0.11: what the daemon of another host says, and what comes by way of mpirun.
EXIT = "[n2:95] [prterun-n1-96@0,1] odls:waitpid_fired child [prterun-n1-96@1,3] exit code 7\n"
BY_MPIRUN = (
    "MPI_ABORT was invoked on rank 3 in communicator MPI_COMM_WORLD\n"
    "  Proc: [[3878,1],3]\n"
    "  Errorcode: 7\n"
)
BY_RANK = "".join(f"[1,3]<stderr>: {line}\n" for line in BY_MPIRUN.splitlines())


class Link:
    """The link to process 1, as far as a keeper asks for it before it runs."""

    def fileno(self) -> int:
        return -1


class Listened(JobKeeper):
    """A keeper whose words are kept."""

    def __init__(self) -> None:
        super().__init__(cast(tls.Secure, Link()), {}, "", {})
        self.launch = {"how": "mpirun", "mpi": True, "size": 4, "label": PRTE_LABEL, "ends": ""}
        self.launcher = os.getpid()
        self._registered = set(range(4))
        self.exits: list[Op] = []

    def send(self, **event: object) -> None:
        if event["ev"] == "exit":
            self.exits.append(event)


@pytest.fixture
def keeper() -> Iterator[Listened]:
    keeper = Listened()
    yield keeper
    keeper._epoll.close()
    os.close(keeper._woken)
    os.close(keeper._waker)


@pytest.mark.parametrize("word", [BY_MPIRUN, BY_RANK])
@pytest.mark.parametrize("first", ["exit", "word", "split"])
def test_an_abort_is_named_in_any_order(keeper: Listened, word: str, first: str) -> None:
    lines = word.splitlines(keepends=True)
    order = {"exit": [EXIT, word], "word": [word, EXIT], "split": [lines[0], EXIT, *lines[1:]]}
    stderr = Output(os.open(os.devnull, os.O_RDONLY), None, 2)
    for text in order[first]:
        keeper._say(stderr, text)
    os.close(stderr.fd)
    assert keeper.exits[0]["status"] == 7
    assert keeper.exits[-1]["abort"] == [3, 7]


def test_an_exit_with_the_code_of_an_abort_stays_one(keeper: Listened) -> None:
    stderr = Output(os.open(os.devnull, os.O_RDONLY), None, 2)
    keeper._say(stderr, EXIT.replace("@1,3", "@1,2"))
    keeper._say(stderr, EXIT)
    keeper._say(stderr, BY_MPIRUN)
    os.close(stderr.fd)
    assert [exit["abort"] for exit in keeper.exits if exit["rank"] == 2] == [[]]


@pytest.mark.parametrize(
    ("end", "step", "runs"),
    [
        (("touch", "{step}"), "", False),  # not known yet: no rank has registered
        (("touch", "{step}"), "done", True),
        (("touch", "done"), "", True),
    ],
)
def test_what_kills_all_at_once_waits_for_no_name_that_it_does_not_need(
    keeper: Listened,
    end: tuple[str, ...],
    step: str,
    runs: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    keeper.launch = {"end": end}
    keeper._step = step
    keeper.living = {0}
    keeper._signal_all(signal.SIGKILL)
    assert bool(keeper._helpers) == runs
    for pid in keeper._helpers:
        assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "done").exists() == runs
