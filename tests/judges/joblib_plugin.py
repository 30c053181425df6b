"""A plugin of pytest: joblib's own tests of its backends, run on ours.

Started by `test_judges.py` as `pytest -p tests.judges.joblib_plugin --pyargs joblib.test...`. Of
joblib's tests it keeps those that take a backend as their parameter, and gives them ours in the
place of joblib's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import joblib.testing
import pytest

import hpcdist

_OURS = "hpcdist"
_results: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Start the workers, and make our backend known."""
    config.addinivalue_line("markers", "thread_unsafe: joblib's own")
    pids = hpcdist.addprocs(4)
    hpcdist.register_joblib()
    here = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = f"{here / 'startup'}{os.pathsep}{here.parents[1]}"
    os.environ["JUDGED_BACKEND"] = "1"  # of programs that the tests start
    # multiprocessing's managers talk to those that know this key: its own children do.
    key = bytes(multiprocessing.current_process().authkey)
    for pid in pids:
        hpcdist.remotecall_fetch(_know, pid, key)


def _patiently(cmd: Any, timeout: float = 0, **how: Any) -> Any:
    """Run a program as joblib's tests do, but for more than 10 s: it may have to start workers."""
    return _check_subprocess_call(cmd, timeout=120, **how)


_check_subprocess_call = joblib.testing.check_subprocess_call
joblib.testing.check_subprocess_call = _patiently


def _know(key: bytes) -> None:
    multiprocessing.current_process().authkey = key


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the workers, and write the results down."""
    hpcdist.shutdown()
    with open(os.environ["JUDGEMENT"], "w") as file:
        json.dump(_results, file)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin when what an earlier test has left running is over."""
    for pid in hpcdist.workers():
        hpcdist.remotecall_fetch(int, pid)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put our backend in the place of joblib's."""
    definition = metafunc.definition
    definition.own_markers = [
        _ours(mark) if mark.name == "parametrize" else mark for mark in definition.own_markers
    ]


def _ours(mark: pytest.Mark) -> pytest.Mark:
    names, values = mark.args[:2]
    names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    if "backend" not in names:
        return mark
    k = names.index("backend")
    rows: list[Any] = []
    for value in values:
        row = list(value) if len(names) > 1 else [value]
        row[k] = _OURS
        if row not in rows:
            rows.append(row)
    made = [tuple(row) if len(names) > 1 else row[0] for row in rows]
    return pytest.mark.parametrize(",".join(names), made).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of a backend."""
    ours = [i for i in items if getattr(i, "callspec", None) and _is_ours(i)]
    config.hook.pytest_deselected(items=[i for i in items if i not in ours])
    items[:] = ours


def _is_ours(item: Any) -> bool:
    return bool(item.callspec.params.get("backend") == _OURS)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how a test went."""
    name = report.nodeid.rpartition("::")[2]
    if report.failed:
        _results[name] = "failed"
    elif report.when == "call" or report.skipped:
        _results.setdefault(name, report.outcome)
