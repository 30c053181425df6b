"""The examples of loops and trees run by themselves."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.mark.parametrize("ranks", [None, 3], ids=["alone", "under mpiexec"])
def test_leibniz(ranks: int | None, script: Callable[..., Any]) -> None:
    finished = script((EXAMPLES / "leibniz.py").read_text(), ranks=ranks)
    assert (finished.rc, finished.err) == (0, "")
    assert finished.out == f"{4 if ranks is None else 2} workers: pi is about 3.141592\n"


@pytest.mark.any_mpi
@pytest.mark.timeout(120)
def test_mandelbrot(script: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    finished = script((EXAMPLES / "mandelbrot.py").read_text(), args=[str(picture)], timeout=100)
    assert finished.rc == 0, finished.err
    assert re.fullmatch(r"320 rows by [1-4] processes\n", finished.out)
    written = picture.read_bytes()
    assert written.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", written[16:24]) == (480, 320)


def test_word_count(script: Callable[..., Any]) -> None:
    finished = script((EXAMPLES / "wordcount.py").read_text())
    assert (finished.rc, finished.err) == (0, "")
    lines = [line.split() for line in finished.out.splitlines()]
    assert len(lines) == 3
    assert all(18_000 < int(n) < 19_500 for _, n in lines)
