"""What is odd in the words of others comes to nothing; files and greetings, likewise.

That any text is read or refused by each parser: see `tests/fuzz` and `test_fuzz.py`.
"""

import contextlib
import socket
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hpcdist._schedulers import job_watch, lsf_words, slurm_words
from hpcdist._wire import greeting
from hpcdist._worker.join_file import CannotJoin, read_join

NOW = datetime(2026, 2, 28, 23, 59).astimezone()
LONG = "9" * 5000
DEEP = "[" * 100_000


@pytest.mark.parametrize("code", ["²", LONG, "x", ""])
def test_an_odd_exit_code_is_none(code: str) -> None:
    (verdict,) = slurm_words.parse_sacct(f"1|FAILED|{code}:0|N/A|N/A|n1\n").values()
    assert (verdict.exit_code, verdict.signal) == (None, None)
    records = [{"jobid": "7", "stat": "EXIT", "exit_code": code}]
    assert lsf_words.verdicts(records, NOW)["7"].exit_code is None


def test_a_year_that_no_clock_has_is_no_time() -> None:
    (verdict,) = slurm_words.parse_sacct(
        "1|FAILED|0:0|0001-01-01T00:00:00|9999-12-31T23:59:59|n1\n"
    ).values()
    assert verdict.start is None or verdict.start.year == 1  # as the zone has it
    assert verdict.end is None or verdict.end.year == 9999


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
@example(data=DEEP.encode())
@example(data=f"1 {LONG} host".encode())
@example(data=b"1 99999999999999999 host")
def test_any_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    for name in ("exit", "join"):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)
    job_watch.exit_verdict(str(tmp_path))
    with pytest.raises(CannotJoin):
        read_join(str(tmp_path / "join"))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
@example(data=DEEP.encode())
@example(data=LONG.encode())
@example(data=b"\xff")
@example(data=b"[]")
def test_any_hello_is_read_or_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(len(data).to_bytes(4, "little") + data)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(greeting.Refused):
            assert isinstance(greeting.receive_hello(ours), dict)
