"""Seeing what workers do: `stacks()`, `on_worker()` and `log_to()`."""

import ctypes
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import (
    ProcessExitedException,
    addprocs,
    log_to,
    on_worker,
    remotecall,
    remotecall_fetch,
    rmprocs,
    stacks,
    status,
    workers,
)
from hpcdist._keeper.processes import stat_of
from tests.helpers import eventually


@pytest.fixture
def pair() -> Iterator[list[int]]:
    """Two workers of the test's own."""
    yield addprocs(2)
    rmprocs(workers())


def mark(flag: str) -> None:
    Path(flag).touch()


def wait_in_python(flag: str) -> None:
    mark(flag)
    while not Path(flag + ".end").exists():
        time.sleep(0.01)


def wait_in_c(flag: str) -> None:
    mark(flag)
    while True:
        ctypes.PyDLL(None).sleep(600)  # with the interpreter's lock held; until a signal comes


def test_stacks_of_busy_workers(pair: list[int], tmp_path: Path) -> None:
    flags = [str(tmp_path / f"began{pid}") for pid in pair]
    busy = [remotecall(wait_in_python, pid, f) for pid, f in zip(pair, flags, strict=True)]
    eventually(lambda: all(map(os.path.exists, flags)))
    found = stacks()
    assert list(found) == pair
    for text in found.values():
        assert "runs a call" in text
        assert "in wait_in_python" in text
        assert "hpcdist-progress" not in text
    assert list(stacks(pair[1])) == [pair[1]]
    for flag in flags:
        mark(flag + ".end")
    for call in busy:
        call.wait()
    assert "wait_in_python" not in stacks(pair[0])[pair[0]]


def test_stacks_of_one_that_is_in_c(
    pair: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flag = str(tmp_path / "began")
    busy = remotecall(wait_in_c, pair[0], flag)
    eventually(lambda: os.path.exists(flag))
    found = stacks(*pair)
    assert "in wait_in_c" in found[pair[0]]
    assert "wait_in_c" not in found[pair[1]]
    assert "wait_in_c" not in capfd.readouterr().err  # it was not printed as well
    os.kill(next(s.os_pid for s in hpcdist.status() if s.pid == pair[0]), signal.SIGKILL)
    assert isinstance(busy.exception(timeout=60), ProcessExitedException)


def test_stacks_of_workers_seen_from_a_worker(pair: list[int]) -> None:
    assert "stacks" in remotecall_fetch(stacks, pair[0], pair[0])[pair[0]]
    assert list(remotecall_fetch(stacks, pair[0], 1, pair[1])) == [1, pair[1]]
    with pytest.raises(ValueError, match="no process with id 999999"):
        stacks(999_999)  # which no worker has had


def test_who_comes_and_goes_is_told() -> None:
    told: list[tuple[str, int, bool]] = []
    main = threading.get_ident()

    def note(what: str) -> Callable[[int], None]:
        return lambda pid: told.append((what, pid, threading.get_ident() == main))

    stop = on_worker(added=note("added"), removed=note("removed"), lost=note("lost"))
    first, second = addprocs(2)
    os.kill(remotecall_fetch(os.getpid, first), signal.SIGKILL)
    eventually(lambda: ("lost", first, False) in told)
    rmprocs(second)
    eventually(lambda: ("removed", second, False) in told)
    assert sorted(told[:2]) == [("added", first, False), ("added", second, False)]
    assert told[2:] == [("lost", first, False), ("removed", second, False)]
    stop()
    stop()
    rmprocs(addprocs(1))
    assert len(told) == 4


def test_only_process_1_hears_of_workers(pair: list[int]) -> None:
    with pytest.raises(RuntimeError, match="Only process 1"):
        remotecall_fetch(on_worker, pair[0], print)
    with pytest.raises(TypeError, match="lost is a function"):
        on_worker(lost=3)  # type: ignore[arg-type]


# --- status() -------------------------------------------------------------------------------------


def test_a_stopped_worker_is_shown_as_such(pair: list[int]) -> None:
    stopped = next(row for row in status() if row.pid == pair[0])
    os.kill(stopped.os_pid, signal.SIGSTOP)
    try:
        eventually(lambda: state_of(stopped.os_pid) == "T")
        assert {row.pid: row.state for row in status()}[pair[0]] == "STOPPED"
    finally:
        os.kill(stopped.os_pid, signal.SIGCONT)
    assert eventually(lambda: {row.pid: row.state for row in status()}[pair[0]] == "idle")


def test_the_table_in_a_notebook(pair: list[int]) -> None:
    shown = status()._repr_html_()
    assert shown.startswith("<table><tr><th>pid</th><th>host</th>")
    assert shown.count("<tr>") == 4
    assert f"<td>{pair[0]}</td><td>{socket.gethostname()}</td>" in shown
    assert "&lt;Launch RUNNING: 1 of 1 workers&gt;" in launched_one()._repr_html_()


def state_of(os_pid: int) -> str:
    stat = stat_of(os_pid)
    return "" if stat is None else stat.state


def launched_one() -> hpcdist.Launch:
    launched = hpcdist.launch(1)
    launched.wait()
    return launched


# --- log_to() -------------------------------------------------------------------------------------


class Kept(logging.Handler):
    """Keeps the records it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, name: str) -> list[str]:
        return [record.getMessage() for record in self.records if record.name == name]


@pytest.fixture
def kept() -> Iterator[Kept]:
    """A handler of the logger "kept"."""
    handler = Kept()
    logging.getLogger("kept").addHandler(handler)
    yield handler
    logging.getLogger("kept").removeHandler(handler)


def say(name: str, level: int, *texts: str) -> None:
    for text in texts:
        logging.getLogger(name).log(level, "said: %s", text, extra={"step": 7, "lock": say})


def fail_and_say() -> None:
    try:
        1 / 0
    except ZeroDivisionError:
        logging.getLogger("kept.low").exception("it failed: %r", threading.Lock())
    warnings.warn("mind the step", stacklevel=1)


def test_records_of_workers_arrive_before_results(pair: list[int], kept: Kept) -> None:
    stop = log_to(level="info")
    remotecall_fetch(say, pair[1], "kept.low", logging.INFO, "a", "b")
    remotecall_fetch(say, pair[1], "kept.low", logging.DEBUG, "too low")
    assert kept.of("kept.low") == ["said: a", "said: b"]
    record = kept.records[0]
    assert (record.pid, record.host) == (pair[1], socket.gethostname())  # type: ignore[attr-defined]
    assert (record.levelname, record.funcName, record.filename) == ("INFO", "say", "test_seeing.py")
    assert record.__dict__["step"] == 7
    assert "lock" not in record.__dict__
    stop()
    remotecall_fetch(say, pair[1], "kept.low", logging.INFO, "c")
    remotecall_fetch(say, pair[1], "kept.low", logging.INFO, "d")  # the word to stop comes first
    assert kept.of("kept.low") == ["said: a", "said: b"]
    stop()  # twice does no harm


def test_errors_and_warnings_with_their_places(pair: list[int], kept: Kept) -> None:
    stop = log_to("kept", level="WARNING")
    (new,) = addprocs(1)  # those that come later are included
    remotecall_fetch(fail_and_say, new)
    stop()
    failed, warned = kept.records
    assert failed.getMessage().startswith("it failed: <unlocked _thread.lock")
    assert "ZeroDivisionError: division by zero" in str(failed.exc_text)
    assert "fail_and_say" in str(failed.exc_text)
    assert warned.name == "py.warnings"
    assert "test_seeing.py" in warned.getMessage()
    assert "UserWarning: mind the step" in warned.getMessage()


def say_from_threads(threads: int, each: int) -> None:
    def run(k: int) -> None:
        for n in range(each):
            logging.getLogger("kept").info("thread %d says %d", k, n)

    started = [threading.Thread(target=run, args=(k,)) for k in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def test_a_flood_is_cut_and_counted(pair: list[int], kept: Kept) -> None:
    stop, began = log_to("kept"), time.monotonic()
    remotecall_fetch(say_from_threads, pair[0], 50, 400)
    told = lambda: [text for text in kept.of("hpcdist") if "were left out" in text]
    counted = lambda: sum(int(text.split()[0].replace(",", "")) for text in told())
    eventually(lambda: len(kept.of("kept")) + counted() == 20_000)
    stop()
    assert len(kept.of("kept")) <= 1000 * (time.monotonic() - began + 1)
    per_thread: dict[str, list[int]] = {}
    for text in kept.of("kept"):
        _, k, _, n = text.split()
        per_thread.setdefault(k, []).append(int(n))
    assert all(found == sorted(found) for found in per_thread.values())


def test_equal_records_are_folded(pair: list[int], kept: Kept) -> None:
    stop = log_to("kept")
    remotecall_fetch(say, pair[0], "kept", logging.INFO, *["same"] * 500, "other")
    stop()
    texts = kept.of("kept")
    assert len(texts) < 500
    assert (texts[0], texts[-1]) == ("said: same", "said: other")
    folded = sum(int(text.split("(")[1].split()[0]) for text in texts if "more like it" in text)
    assert folded + sum("more like it" not in text for text in texts) == 501


def test_what_log_to_refuses() -> None:
    with pytest.raises(ValueError, match=r"level is one of CRITICAL.*not 'LOUD'"):
        log_to(level="LOUD")
    with pytest.raises(TypeError, match="level is a name or a number, not True"):
        log_to(level=True)
    with pytest.raises(TypeError, match="logger is a logger or its name, not 3"):
        log_to(3)  # type: ignore[arg-type]


def test_records_where_no_logging_is_set_up(script: Callable[..., Any]) -> None:
    done = script(
        "import hpcdist, logging\n"
        "(pid,) = hpcdist.addprocs(1)\n"
        "hpcdist.log_to()\n"
        "hpcdist.remotecall_fetch(lambda: logging.getLogger('of.it').info('so it is'), pid)\n"
    )
    assert done.rc == 0, done.err
    assert "INFO worker 2 (" in done.err
    assert ") of.it: so it is" in done.err


def test_own_words_are_records_where_logging_is_set_up(script: Callable[..., Any]) -> None:
    done = script(
        "import logging\n"
        "from hpcdist import _log\n"
        "_log.log('warning', 'one')\n"
        "logging.basicConfig(format='%(name)s|%(levelname)s|%(message)s')\n"
        "_log.log('warning', 'two')\n"
        "_log.log('info', 'three')\n"
    )
    assert done.rc == 0, done.err
    first, second = done.err.splitlines()
    assert first.endswith("warning: one")
    assert second == "hpcdist|WARNING|two"
