"""What was probably meant: keywords, commands, and names that other libraries have."""

import doctest
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import hpcdist
from hpcdist import _hints
from tests.helpers import patient

pytestmark = pytest.mark.any_mpi

ABS = [-1, 2]


def test_doctests() -> None:
    assert doctest.testmod(_hints).failed == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda: hpcdist.pmap(abs, ABS, batchsize=3),
            "pmap has no keyword 'batchsize'; did you mean 'batch_size'?",
        ),
        (lambda: hpcdist.pmap(abs, ABS, chunksize=3), "did you mean 'batch_size'?"),
        (lambda: hpcdist.imap(abs, ABS, pids=[1]), "imap has no keyword 'pids'"),
        (lambda: hpcdist.imap_unordered(abs, ABS, onerror=print), "did you mean 'on_error'?"),
        (lambda: hpcdist.pmap(pow, ABS, zzz=3), "goes by functools.partial(f, zzz=…)"),
        (lambda: hpcdist.distributed(ABS, chunk=True), "did you mean 'chunked'?"),
        (
            lambda: hpcdist.reduce(max, abs, pid=1),
            "reduce has no keyword 'pid'; did",
        ),
        (lambda: hpcdist.bcast(1, pid=1), "bcast has no keyword 'pid'; did you mean 'pids'?"),
        (lambda: hpcdist.everywhere("1", pid=1), "everywhere has no keyword 'pid'; did you mean"),
        (lambda: hpcdist.rmprocs(waitfro=1), "did you mean 'waitfor'?"),
        (
            lambda: hpcdist.Executor(n_jobs=3),
            "Executor has no keyword 'n_jobs'; did you",
        ),
        (
            lambda: hpcdist.Executor().map(abs, ABS, batch_size=3),
            "Executor.map has no keyword 'batch_size'; did you mean",
        ),
    ],
)
def test_a_keyword_that_is_none_names_the_nearest(wrong: Callable[[], Any], said: str) -> None:
    with pytest.raises(TypeError) as caught:
        wrong()
    assert said in str(caught.value)


def test_keywords_of_the_user_s_function_are_the_user_s() -> None:
    assert hpcdist.remotecall_fetch(dict, 1, batchsize=3) == {"batchsize": 3}
    assert hpcdist.everywhere.call(dict, pids=[1], pid=3) == {1: {"pid": 3}}
    with hpcdist.Executor() as executor:
        assert executor.submit(dict, chunksize=3).result() == {"chunksize": 3}


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (lambda: hpcdist.WorkerPool([1]), "map", "pmap(f, xs, pool=pool)"),
        (lambda: hpcdist.CachingPool([1]), "submit", "remotecall(f, pool, x)"),
        (hpcdist.Future, "get", "future.fetch()"),
        (hpcdist.RemoteChannel, "get", "channel.take()"),
        (hpcdist.Channel, "qsize", "len()"),
        (hpcdist.Executor, "apply_async", "executor.submit(f, x)"),
    ],
)
def test_a_name_of_another_library_names_ours(make: Any, name: str, said: str) -> None:
    owner = make()
    with pytest.raises(AttributeError, match=f"has no attribute '{name}': ") as caught:
        getattr(owner, name)
    assert said in str(caught.value)
    assert not hasattr(owner, "zzz")


def test_a_property_that_fails_says_why() -> None:
    class Mine(hpcdist.Channel):
        @property
        def level(self) -> Any:
            return self.gauge  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="no attribute 'gauge'"):
        _ = Mine(1).level


def test_a_public_name_that_is_none_names_the_nearest() -> None:
    for name, said in (("pmpa", "pmap"), ("map", "pmap"), ("remote_call", "remotecall")):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; did you mean '{said}'"):
            getattr(hpcdist, name)
    assert not hasattr(hpcdist, "__zzz__")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["submt", "driver.py"], "there is no command 'submt'; did you mean 'submit'?"),
        (["zzz"], "there is no command 'zzz'; there are run, "),
        (["jobs", "--claer"], "unrecognized arguments: --claer; did you mean --clear?"),
        (["repl", "--machinefile", "x"], "did you mean --machine-file?"),
    ],
)
def test_a_command_that_is_none_names_the_nearest(args: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpcdist", *args],
        capture_output=True,
        text=True,
        timeout=patient(50),
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
