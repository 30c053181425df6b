"""A process's end: it comes, whatever goes wrong on the way."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.any_mpi

ENDING = """
import atexit, faulthandler, sys
from hpcdist._transport.machine import Machine

def fail(*args, **kw):
    raise {error}

faulthandler.dump_traceback_later = {guard}
atexit.register(print, "exit functions")
try:
    Machine().exit(3, {clear_away})
finally:
    print("back")
"""


@pytest.mark.parametrize(
    ("guard", "clear_away", "error", "printed"),
    [
        ("lambda *a, **k: None", "lambda: print('cleared')", "ValueError", "cleared"),
        # What faulthandler says where there is no memory for its thread.
        ("fail", "lambda: print('cleared')", "RuntimeError('no thread')", "cleared"),
        ("lambda *a, **k: None", "fail", "MemoryError", ""),
    ],
)
def test_a_process_that_is_to_end_does(
    guard: str, clear_away: str, error: str, printed: str
) -> None:
    text = ENDING.format(guard=guard, clear_away=clear_away, error=error)
    done = subprocess.run(
        [sys.executable, "-u", "-c", text], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.split("\n") == ["exit functions", *filter(None, [printed]), ""]
