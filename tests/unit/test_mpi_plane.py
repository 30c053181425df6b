"""The plane of a world, over a communicator that fails as MPI does towards a dead rank."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import mpi4py
import pytest

from hpcdist._transport.mpi import MpiPlane


class Failed(Exception):
    """What MPI raises."""


class Request:
    """A send under way, and what becomes of it."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = deque(outcomes)

    def Test(self) -> object:
        outcome = self.outcomes.popleft()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture
def sends() -> deque[Any]:
    """What each send gives: a request, or an error."""
    return deque()


@pytest.fixture
def plane(sends: deque[Any], monkeypatch: pytest.MonkeyPatch) -> MpiPlane:
    monkeypatch.setattr(mpi4py.rc, "initialize", False)  # its names alone are needed

    def isend(*_: object) -> Request:
        made = sends.popleft()
        if isinstance(made, Exception):
            raise made
        assert isinstance(made, Request)
        return made

    comm: Any = SimpleNamespace(
        Get_rank=lambda: 0, Get_size=lambda: 2, Isend=isend, Improbe=lambda *_: None
    )
    plane = MpiPlane(comm, lambda *_: None, None)
    monkeypatch.setattr(plane, "_failed", Failed)
    return plane


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_buffers_that_cannot_be_sent_are_given_back(
    plane: MpiPlane, sends: deque[Any], begun: int
) -> None:
    """The rank has died, and nobody has told us of that yet."""
    ended: list[str] = []
    sends.extend([*(Request() for _ in range(begun)), Failed()])
    first = (b"frame", [b"one"], lambda: ended.append("one"))
    second = (b"frame", [b"two"], lambda: ended.append("two"))
    plane.send(1, [first, second])
    assert ended == (["one", "two"] if begun < 2 else ["two"])
    plane.lose(1)
    assert sorted(ended) == ["one", "two"]


def test_a_send_that_fails_gives_its_buffer_back(plane: MpiPlane, sends: deque[Any]) -> None:
    ended: list[str] = []
    sends.extend([Request(True), Request(False, Failed())])
    plane.send(1, [(b"frame", [b"one"], lambda: ended.append("one"))])
    plane.poll()
    assert ended == []
    plane.poll()
    assert ended == ["one"]
    plane.lose(1)
    assert ended == ["one"]
