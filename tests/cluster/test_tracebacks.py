"""What a traceback shows: the user's frames, and little of ours."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    RemoteChannel,
    everywhere,
    fetch,
    imap,
    pmap,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    take,
)

pytestmark = pytest.mark.any_mpi

OURS = str(Path(hpcdist.__file__).parent)


def reciprocal(x: float) -> float:
    return 1 / x


def frames_of(error: BaseException) -> tuple[list[str], int]:
    """Return the names of the frames that are not ours, and how many are."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(OURS)]
    return [frame.name for frame in frames if frame not in ours], len(ours)


WAYS: dict[str, Callable[[int], Any]] = {
    "remotecall_fetch": lambda pid: remotecall_fetch(reciprocal, pid, 0),
    "pool": lambda pid: remotecall_fetch(reciprocal, hpcdist.default_worker_pool(), 0),
    "remote": lambda pid: hpcdist.remote(reciprocal)(0),
    "wait": lambda pid: remotecall_wait(reciprocal, pid, 0),
    "fetch": lambda pid: fetch(remotecall(reciprocal, pid, 0)),
    "method": lambda pid: remotecall(reciprocal, pid, 0).fetch(),
    "pmap": lambda pid: pmap(reciprocal, [0]),
    "everywhere": lambda pid: everywhere("1 / 0"),
    "call": lambda pid: everywhere.call(reciprocal, 0),
    "spmd": lambda pid: hpcdist.spmd(reciprocal, 0, pids=[pid]),
    "distributed": lambda pid: hpcdist.distributed([0, 1], max)(reciprocal),
    "reduce": lambda pid: hpcdist.reduce(max, reciprocal, 0),
    "timeout": lambda pid: take(RemoteChannel(pid=pid), timeout=0.01),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_frame_of_ours(way: str, pids: list[int]) -> None:
    with pytest.raises((ZeroDivisionError, hpcdist.HpcdistError, TimeoutError)) as caught:
        WAYS[way](pids[0])
    assert frames_of(caught.value) == (["test_one_frame_of_ours", "<lambda>"], 1)


CONTROL_C = """
import os, signal, threading
import hpcdist
from hpcdist import *

def press():
    os.kill(os.getpid(), signal.SIGINT)

hpcdist.addprocs(1)
busy = RemoteChannel()

def wait_for_ever():
    {wait}

threading.Timer(0.3, press).start()
wait_for_ever()
"""


@pytest.mark.parametrize(
    "wait",
    [
        "fetch(remotecall(take, 2, busy))",
        "remotecall(take, 2, busy).result()",
        "remotecall_fetch(take, 2, busy)",
        "take(busy)",
        "pmap(lambda k: take(busy), [1])",
        "list(imap(lambda k: take(busy), [1]))",
        "everywhere.call(take, busy)",
    ],
)
def test_control_c_shows_the_users_line(wait: str, script: Callable[..., Any]) -> None:
    done = script(CONTROL_C.replace("{wait}", wait))
    lines = done.err.splitlines()
    assert lines.count("KeyboardInterrupt") == 1, done
    files = [line.split('"')[1] for line in lines if line.startswith("  File ")]
    assert len(files) <= 3, done.err
    assert sum(file.startswith(OURS) for file in files) <= 1, done.err
    assert wait in done.err


def test_what_passed_through_code_of_the_users_stays_whole(pids: list[int]) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        list(imap(reciprocal, items()))
    assert "items" in frames_of(caught.value)[0]


def test_what_may_be_our_fault_stays_whole(pids: list[int]) -> None:
    with pytest.raises(ValueError, match="no process") as caught:
        remotecall_fetch(reciprocal, 999, 1)
    assert frames_of(caught.value)[1] > 1


@pytest.mark.parametrize("f", [divmod, len])
def test_the_text_of_an_error_raised_in_c_has_no_frames(f: Any, pids: list[int]) -> None:
    with pytest.raises((ZeroDivisionError, TypeError)) as caught:
        remotecall_fetch(f, pids[0], *([1, 0] if f is divmod else [3]))
    text = str(caught.value)
    assert OURS not in text
    assert text.count(f"{type(caught.value.cause).__name__}: ") == 1  # type: ignore[attr-defined]


def test_errors_printed_on_a_worker_show_the_users_frames(script: Callable[..., Any]) -> None:
    done = script("""
import hpcdist

def fail():
    return 1 / 0

hpcdist.addprocs(1)
hpcdist.remote_do(fail, 2)
hpcdist.remotecall_fetch(hpcdist.myid, 2)
""")
    assert "From worker 2:\tZeroDivisionError: division by zero" in done.err
    assert "in fail" in done.err
    assert OURS not in done.err
