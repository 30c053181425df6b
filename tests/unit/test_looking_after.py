"""What a launch does again and again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdist._cluster.launch import Launch


class Started:
    """What `Launch.every` needs of a launch; timers are called by hand."""

    def __init__(self, *, pending: bool) -> None:
        self.pending = pending
        self.goes_on = True
        self.timers: list[tuple[float, Callable[[], None]]] = []
        later = lambda pause, fn: self.timers.append((pause, fn))
        self.node: Any = SimpleNamespace(progress=SimpleNamespace(call_later=later))

    def background(self, fn: Callable[[], object]) -> None:
        fn()


def broken() -> float:
    raise OSError("squeue is gone")


def test_an_error_does_not_end_the_looking_after(caplog: pytest.LogCaptureFixture) -> None:
    started: Any = Started(pending=False)
    answers = iter([lambda: 5.0, broken, lambda: 7.0])
    Launch.every(started, lambda: next(answers)())
    for _ in range(2):
        started.timers[-1][1]()
    assert [pause for pause, _ in started.timers] == [5.0, 60.0, 7.0]
    assert "squeue is gone; trying again" in caplog.text
    started.goes_on = False
    started.timers[-1][1]()
    assert len(started.timers) == 3


def test_an_error_fails_a_launch_that_is_pending() -> None:
    started: Any = Started(pending=True)
    with pytest.raises(OSError, match="squeue is gone"):
        Launch.every(started, broken)
    assert started.timers == []
