"""The files of a function that runs as a job: whole or not there, and they say who wrote them."""

import json
import pickle
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hpcdist import HpcdistError, JobFuture
from hpcdist._jobs import envelopes
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.verdict import JobState, Verdict
from hpcdist._version import VERSION


def altered(path: Path, **facts: Any) -> None:
    """Write other facts into the first line of a file."""
    line, body = path.read_bytes().split(b"\n", 1)
    path.write_bytes(json.dumps({**json.loads(line), **facts}).encode() + b"\n" + body)


def test_a_value_comes_back(tmp_path: Path) -> None:
    for value in (3, [1, "x"], {"a": None}, b"\n\n"):
        envelopes.write(str(tmp_path), "call", value)
        assert envelopes.read(str(tmp_path / "call")) == value
    envelopes.write(str(tmp_path), "function", lambda x: x + 1)
    assert envelopes.read(str(tmp_path / "function"))(2) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["call", "function"]


def test_several_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    """As threads and processes do that see a job's end."""
    with ThreadPoolExecutor(8) as threads:
        done = [threads.submit(envelopes.write, str(tmp_path), "ended", k) for k in range(200)]
        for one in done:
            one.result()
    assert envelopes.read(str(tmp_path / "ended")) in range(200)
    assert [path.name for path in tmp_path.iterdir()] == ["ended"]


def test_a_file_that_was_cut_says_so(tmp_path: Path) -> None:
    envelopes.write(str(tmp_path), "call", [1, 2, 3])
    whole = (tmp_path / "call").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "call").write_bytes(whole[:size])
        with pytest.raises(HpcdistError, match="it was cut or changed"):
            envelopes.read(str(tmp_path / "call"))


def test_another_python_is_named_where_code_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "outcome"
    envelopes.write_bytes(str(tmp_path), "outcome", pickle.dumps(3), False, failed=False)
    altered(path, python="3.99", hpcdist="9.9")
    with pytest.raises(HpcdistError, match=r"written by Python 3\.99 with hpcdist 9\.9, and this"):
        envelopes.result_of(str(tmp_path))
    altered(path, plain=True)
    assert envelopes.result_of(str(tmp_path)) == 3


def test_another_version_is_named_where_it_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "outcome"
    body = b"cnowhere\nnothing\n."
    envelopes.write_bytes(str(tmp_path), "outcome", body, True, failed=False)
    with pytest.raises(ModuleNotFoundError) as caught:
        envelopes.result_of(str(tmp_path))
    assert "Has a module changed" in caught.value.__notes__[0]
    altered(path, hpcdist="9.9")
    with pytest.raises(HpcdistError, match=f"hpcdist 9.9, and this is .* hpcdist {VERSION}"):
        envelopes.result_of(str(tmp_path))


def test_an_outcome_is_there_or_not(tmp_path: Path) -> None:
    assert envelopes.read_outcome(str(tmp_path)) is None
    assert envelopes.read_outcome(str(tmp_path / "gone")) is None
    envelopes.write_bytes(str(tmp_path), "outcome", b"x", True, failed=True)
    outcome = envelopes.read_outcome(str(tmp_path))
    assert outcome is not None
    assert (outcome.body, outcome.failed) == (b"x", True)


def test_a_future_is_the_same_everywhere(tmp_path: Path) -> None:
    one: JobFuture[int] = JobFuture("a.1", str(tmp_path), 1)
    assert pickle.loads(pickle.dumps(one)) == one
    assert hash(pickle.loads(pickle.dumps(one))) == hash(one)
    assert one != JobFuture("a.2", str(tmp_path), 2)


class Cancels:
    """A scheduler whose job ends by itself as it is cancelled: its script's launcher fails."""

    name = "cancels"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def poll(self, jobs: list[JobId]) -> dict[JobId, Verdict]:
        return {job: Verdict(state=JobState.RUNNING, word="RUNNING") for job in jobs}

    def cancel(self, jobs: list[JobId]) -> None:
        (self._folder / "exit").write_text("1 0 n1\n")


def test_who_cancels_a_job_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its script says that its launcher has failed, before it is asked to end itself."""
    (tmp_path / "manifest.json").write_text('{"jobs": [["7"]]}')
    (tmp_path / "started").write_text("n1")
    monkeypatch.setattr(JobFuture, "_scheduler", lambda self: Cancels(tmp_path))
    future: JobFuture[int] = JobFuture("a", str(tmp_path))
    assert str(future.state) == "RUNNING"
    assert future.cancel()
    assert isinstance(future.exception(30), CancelledError)
    assert str(future.state) == "CANCELLED"
    assert not future.cancel()
