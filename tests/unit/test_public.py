"""Public names: what they call themselves, and what the first use of one costs."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hpcdist

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(set(hpcdist._HOME) - {"ANY"}))
def test_a_public_name_calls_itself_by_it(name: str) -> None:
    thing = getattr(hpcdist, name)
    assert thing.__module__ == "hpcdist"
    assert getattr(thing, "__qualname__", name) == name
    assert pickle.loads(pickle.dumps(thing)) is thing or not hasattr(thing, "__qualname__")


def test_errors_go_by_their_public_names() -> None:
    error = hpcdist.RemoteException.make(2, ZeroDivisionError("no"), "")
    assert repr(type(error)) == "<class 'hpcdist.RemoteException[ZeroDivisionError]'>"
    assert repr(hpcdist.ProcessExitedException) == "<class 'hpcdist.ProcessExitedException'>"


def modules_after(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return set(done.stdout.split())


def test_the_facade_loads_what_is_used_and_no_more() -> None:
    own = {name for name in modules_after("import hpcdist") if name.startswith("hpcdist.")}
    assert own <= {"hpcdist._version"}
    used = """
import hpcdist
from hpcdist._runtime.node import here
from hpcdist._worker.services import EVERY_PROCESS
here.node.serve(EVERY_PROCESS)
hpcdist.ChannelClosed, hpcdist.myid
"""
    loaded = modules_after(used)  # what a worker does whose function names them
    assert "hpcdist._cluster.queries" in loaded
    assert "hpcdist._managers.lifecycle" not in loaded
