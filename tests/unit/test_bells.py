"""Bells: waking ranks of this host and of others."""

import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcdist._transport import bells as module
from hpcdist._transport.bells import Bells


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Bells, Bells]]:
    """Two ranks of one host."""
    both = Bells(str(tmp_path), 0, 2), Bells(str(tmp_path), 1, 2)
    yield both
    for bells in both:
        bells.close()


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[tuple[Bells, Bells]]:
    """Two ranks of two hosts: they share no folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    both = Bells(str(here), 0, 2), Bells(str(there), 1, 2)
    places = [bells.hang_far() for bells in both]
    both[0].reach_far({1: places[1]})
    both[1].reach_far({0: places[0]})
    yield both
    for bells in both:
        bells.close()


def rung(sock: Any, seconds: float = 0) -> bool:
    return bool(select.select([sock], [], [], seconds)[0])


def test_who_is_awake_is_not_rung(pair: tuple[Bells, Bells]) -> None:
    assert not pair[0].ring(1)
    assert not rung(pair[1].socket)


def test_a_sleeper_is_rung_once(pair: tuple[Bells, Bells]) -> None:
    pair[1].arm()
    assert pair[0].ring(1)
    assert not pair[0].ring(1)
    assert rung(pair[1].socket)
    pair[1].hear(1)
    assert not rung(pair[1].socket)


@pytest.mark.parametrize("cords", [0, 64])
def test_a_sleeper_is_rung_by_name_where_cords_run_out(
    pair: tuple[Bells, Bells], monkeypatch: pytest.MonkeyPatch, cords: int
) -> None:
    monkeypatch.setattr(module, "_CORDS_MOST", cords)
    for _ in range(3):
        pair[1].arm()
        assert pair[0].ring(1)
        assert rung(pair[1].socket)
        pair[1].hear(1)
    assert len(pair[0]._cords) == min(cords, 1)


def test_who_is_gone_is_rung_in_vain(tmp_path: Path) -> None:
    both = Bells(str(tmp_path), 0, 2), Bells(str(tmp_path), 1, 2)
    both[1].arm()
    assert both[0].ring(1)
    both[1].arm()
    both[1].socket.close()
    assert both[0].ring(1)  # by the cord there was
    both[0].asleep[1] = 1
    both[0]._cords.pop(1).close()
    assert both[0].ring(1)  # there is no cord to be had
    for bells in both:
        bells.close()


def test_who_has_woken_by_itself_is_not_rung(pair: tuple[Bells, Bells]) -> None:
    pair[1].arm()
    pair[1].disarm()
    assert not pair[0].ring(1)


def test_a_rank_of_another_host_is_rung(apart: tuple[Bells, Bells]) -> None:
    assert apart[0].ring(1)
    assert rung(apart[1].far_socket, 10)
    while rung(apart[1].far_socket):  # there may be one for each of the host's addresses
        apart[1].hear_far(1)
    assert apart[1].ring(0)
    assert rung(apart[0].far_socket, 10)


def test_another_host_is_rung_after_a_pause_alone(
    apart: tuple[Bells, Bells], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(module, "_now", lambda: now)
    rings = []
    for step in (0.0, 0.00005, 0.00005, 0.0002):
        now += step
        rings.append(apart[0].ring(1))
    assert rings == [True, False, False, True]


def test_an_address_that_leads_nowhere_is_no_error(apart: tuple[Bells, Bells]) -> None:
    apart[0].reach_far({1: "255.255.255.255|9"})
    assert apart[0].ring(1)


@pytest.mark.parametrize("told", [False, True], ids=["usual", "cancelled"])
def test_the_folder_of_a_host_is_gone_however_its_maker_ends(tmp_path: Path, told: bool) -> None:
    folder = tmp_path / "bells"
    program = f"""
from hpcdist._worker.worker import _folder
with _folder({str(folder)!r}):
    print("there", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "there\n"
        assert folder.is_dir()
        if told:
            maker.terminate()
        else:
            maker.communicate("\n")
        assert maker.wait(20) == (-signal.SIGTERM if told else 0)
    assert not folder.exists()
