"""The bar of `progress=True`: on a terminal, beside what workers print; in notebooks; in a log."""

import gc
import io
import os
import pty
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist._integrations import mapping
from hpcdist._items import progress_bars
from hpcdist._transport.machine import Machine
from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi

ROOT = str(Path(__file__).resolve().parents[2])


def on_a_terminal(driver: Path) -> str:
    """Run a program whose output goes to a terminal; return all that was written there."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(driver)],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "PYTHONPATH": ROOT, "COLUMNS": "120"},
        start_new_session=True,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            data = os.read(main, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not data:
            break
        shown += data
    os.close(main)
    assert process.wait(60) == 0, shown
    return shown.decode(errors="replace")


def lines_of(text: str) -> list[str]:
    """Show what a terminal shows: a carriage return goes back, and text is written over."""
    lines = []
    for raw in text.split("\n"):
        line: list[str] = []
        for piece in raw.split("\r"):
            line[: len(piece)] = piece
        lines.append("".join(line).rstrip())
    return lines


PRINTS = """
import time, hpcdist
from hpcdist import *
def noisy(k):
    print("item", k)
    return k
def also(k):
    return noisy(k)
if __name__ == "__main__":
    hpcdist.addprocs(2)
    RUN
"""
RUNS = {
    "pmap": "assert pmap(noisy, range(60), batch_size=1, progress=True) == [*range(60)]",
    "imap": "assert [*imap(noisy, range(60), progress=True)] == [*range(60)]",
    "Executor.map": "assert [*Executor().map(noisy, range(60), progress=True)] == [*range(60)]",
    "chunks": "assert [*Executor().map(noisy, range(60), chunksize=7, progress=True)] "
    "== [*range(60)]",
    "distributed": "assert distributed(range(60), int.__add__, progress=True)(noisy) == 1770",
    "a handle": "distributed([*range(60)], progress=True)(noisy).wait()",
    "chunked": "distributed(range(60), progress=True, chunked=True)"
    "(lambda part: [noisy(k) for k in part]).wait()",
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_what_workers_print_stands_beside_the_bar(run: str, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(PRINTS.replace("RUN", run))
    lines = lines_of(on_a_terminal(driver))
    printed = [line for line in lines if "From worker" in line]
    assert all(re.fullmatch(r"From worker \d:\titem \d+", line) for line in printed), printed
    assert {line.split()[-1] for line in printed} == {str(k) for k in range(60)}
    (bar,) = [line for line in lines if "60/60" in line]
    assert bar.startswith("100%")
    assert "failures=0, workers=2" in bar


def test_a_failed_item_of_an_executor_is_counted(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    run = "try: [*Executor().map(lambda k: 1 // k, [1, 0, 2], progress=True)]\n"
    driver.write_text(PRINTS.replace("RUN", run + "    except ZeroDivisionError: print('failed')"))
    text = on_a_terminal(driver)
    assert "failed" in text
    assert "failures=1" in text


# --- elsewhere -----------------------------------------------------------------------------------


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress_bars._Lines(Machine(), 100, every=0)
    shown.add(10)
    shown.failed()
    shown.add(20)
    shown.close()
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("hpcdist: 10 of 100 items, ")
    assert second.startswith("hpcdist: 30 of 100 items, ")
    assert last.endswith("items/s, failures=1, workers=1")


def test_a_log_gets_nothing_of_what_is_over_soon(
    pids: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert hpcdist.pmap(abs, range(10), progress=True) == list(range(10))
    assert capfd.readouterr().err == ""


def test_the_bar_of_an_executor_that_is_gone_knows_its_workers(
    monkeypatch: pytest.MonkeyPatch, pids: list[int]
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(
        progress_bars, "bar", lambda *_: types.SimpleNamespace(watch=shown.append, add=abs)
    )
    monkeypatch.setattr(mapping, "results", lambda *_: iter(()))  # nobody takes one
    executor = hpcdist.Executor()
    executor.map(abs, [1], progress=True)
    executor.shutdown()
    gone = weakref.ref(executor)
    del executor
    eventually(lambda: gc.collect() is not None and gone() is None)
    assert shown[0].workers == len(pids)


def in_notebook(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Look like a Jupyter kernel."""
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    fake: Any = types.ModuleType("IPython")
    fake.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", fake)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def test_a_notebook_without_widgets_shows_text(
    pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_bars, "find_spec", lambda name: None)
    shown = in_notebook(monkeypatch)
    assert hpcdist.pmap(abs, range(10), progress=True) == list(range(10))
    assert "10/10" in shown.getvalue()


def test_a_notebook_with_widgets_shows_one(
    pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    class Widget:
        """Stands in for `tqdm_notebook`."""

        def __init__(self, **how: Any) -> None:
            made.append({**how, "n": 0})

        def set_postfix(self, **facts: Any) -> None:
            made[-1].update(facts)

        def update(self, count: int) -> None:
            made[-1]["n"] += count

        def close(self) -> None:
            made[-1]["closed"] = True

    fake: Any = types.ModuleType("tqdm.notebook")
    fake.tqdm_notebook = Widget
    monkeypatch.setitem(sys.modules, "tqdm.notebook", fake)
    monkeypatch.setattr(progress_bars, "find_spec", lambda name: True)
    shown = in_notebook(monkeypatch)
    assert hpcdist.pmap(abs, range(10), progress=True) == list(range(10))
    (widget,) = made
    assert (widget["total"], widget["n"], widget["closed"]) == (10, 10, True)
    assert shown.getvalue() == ""
