"""`JobExecutor` on a real Slurm: functions as jobs, and their results tomorrow."""

import re
from pathlib import Path

import pytest

from tests.slurm.cluster import Finished, Slurm
from tests.slurm.drivers import PRELUDE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "jobs.md"

pytestmark = pytest.mark.timeout(240)

MORE = """
from concurrent.futures import CancelledError
from hpcdist import JobExecutor, JobFuture, job, pmap

OPTIONS = dict(partition="debug", t="1")
"""


def run(slurm: Slurm, text: str, timeout: float = 120) -> Finished:
    """Run a driver to its good end."""
    slurm.expected += [".hpcdist/jobs/*/*"]
    done = slurm.driver(PRELUDE + MORE + text, timeout=timeout)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    return done


def test_a_function_uses_the_ranks_of_its_job(slurm: Slurm) -> None:
    run(
        slurm,
        """
import re

def square(x):
    return x * x, h.myid(), os.environ["SLURM_JOB_ID"]

def f(n, *, label):
    print("on stdout")
    print("on stderr", file=sys.stderr)
    os.system("echo from a child")
    return label, pmap(square, range(n)), h.workers(), shown("hostname")

future = JobExecutor(SlurmManager(3), **OPTIONS).submit(f, 4, label="x")
assert isinstance(future, JobFuture)
label, squares, workers, host = future.result(100)
assert (label, workers) == ("x", [2, 3]), (label, workers)
assert [one[0] for one in squares] == [0, 1, 4, 9]
assert {one[1] for one in squares} <= {2, 3}
assert {one[2] for one in squares} == {future.job_id}
assert host in ("n1", "n2", "n3")
assert future.done() and str(future.state) == "COMPLETED" and future.reason == ""
assert future.exception() is None
assert future.stdout() == "on stdout\\nfrom a child\\n", future.stdout()
assert "on stderr" in future.stderr()
assert re.fullmatch(r"f-[0-9a-f]{8}", future.name), future.name
listed = shown(sys.executable, "-m", "hpcdist", "jobs")
assert future.job_id in listed and f"{future.name}: f()" in listed, listed
shown(sys.executable, "-m", "hpcdist", "jobs", "--clear")
assert future.result() == (label, squares, workers, host)
future.forget()
assert not list(RUNS.iterdir())
""",
    )


def test_another_process_gets_the_result_and_nobody_has_to_stay(slurm: Slurm) -> None:
    run(
        slurm,
        """
class Point:
    def __init__(self, x):
        self.x = x

def f(x):
    time.sleep(1)
    return Point(x + 1)

future = JobExecutor(SlurmManager(1), name="run1", **OPTIONS).submit(f, 1)
assert future.name == "run1"
os._exit(0)
""",
    )
    run(
        slurm,
        """
import pickle
future = job("run1")
assert future.result(100).x == 2
assert pickle.loads(pickle.dumps(future)) == future
assert "run1" in shown(sys.executable, "-m", "hpcdist", "jobs")
executor = JobExecutor(SlurmManager(1), name="run1", **OPTIONS)
try:
    executor.submit(int)
    raise AssertionError
except FileExistsError as exc:
    assert "hpcdist.job('run1').forget()" in str(exc), exc
assert queue() == []
job("run1").forget()
try:
    job("run1")
    raise AssertionError
except LookupError as exc:
    assert "no job is called 'run1'" in str(exc)
""",
    )


def test_errors_come_with_the_traceback_of_the_job(slurm: Slurm) -> None:
    run(
        slurm,
        """
def divide(x):
    return 1 / x

future = JobExecutor(SlurmManager(1), **OPTIONS).submit(divide, 0)
try:
    future.result(100)
    raise AssertionError
except ZeroDivisionError as exc:
    assert "return 1 / x" in str(exc), str(exc)
    assert f"It is of job {future.job_id} ({future.name})" in exc.__notes__
    assert isinstance(exc, h.RemoteException)
assert str(future.state) == "FAILED"
assert future.reason == "ZeroDivisionError: division by zero"
assert "ZeroDivisionError" in future.stderr()
""",
    )


def test_a_map_is_one_job_array(slurm: Slurm) -> None:
    run(
        slurm,
        """
import asyncio

def f(x, y):
    if x == 2:
        raise ValueError("two")
    return x + y, os.environ["SLURM_ARRAY_TASK_ID"]

executor = JobExecutor(SlurmManager(1), name="sweep", **OPTIONS)
futures = executor.map(f, range(4), [10, 20, 30, 40], max_running=2)
assert [future.name for future in futures] == ["sweep.0", "sweep.1", "sweep.2", "sweep.3"]
(array,) = {future.job_id.partition("_")[0] for future in futures}
script = (RUNS / "sweep" / "script.sh").read_text()
assert "--array=0-3%2" in script, script
async def one():
    return await futures[0]
assert asyncio.run(one()) == (10, "0")
assert futures[1].result(100) == (21, "1")
assert isinstance(futures[2].exception(100), ValueError)
assert job("sweep.3").result(100) == (43, "3")
try:
    job("sweep")
    raise AssertionError
except LookupError as exc:
    assert "its jobs are sweep.0 to sweep.3" in str(exc)
second = executor.submit(pow, 2, 3)
assert (second.name, second.result(100)) == ("sweep-2", 8)
for future in [*futures, second]:
    future.forget()
assert not list(RUNS.iterdir())
""",
    )


def test_jobs_that_end_before_their_function_does(slurm: Slurm) -> None:
    run(
        slurm,
        """
def hang():
    print("at work", file=sys.stderr, flush=True)
    time.sleep(600)

def crash():
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9)

executor = JobExecutor(SlurmManager(1), **OPTIONS)
broken = JobExecutor(SlurmManager(1), setup="echo what went wrong; false", **OPTIONS)
never, dead, long = broken.submit(pow, 2, 3), executor.submit(crash), executor.submit(hang)
error = never.exception(100)
assert isinstance(error, LaunchError), error
assert "ended before its function began: FAILED, exit code 1" in str(error), error
assert any("what went wrong" in line for line in error.output), error
assert "what went wrong" in never.stderr()
error = dead.exception(100)
assert isinstance(error, h.ProcessExitedException), error
assert dead.job_id in error.why and "last words" in error.stderr, error
try:
    long.result(0.5)
    raise AssertionError
except TimeoutError as exc:
    assert long.job_id in str(exc)
until(lambda: "at work" in long.stderr(), 60)
try:
    long.forget()
    raise AssertionError
except RuntimeError as exc:
    assert "cancel() it first" in str(exc)
assert long.cancel()
assert isinstance(long.exception(100), CancelledError), long.exception()
assert str(long.state) == "CANCELLED"
assert not long.cancel()
never = JobExecutor(SlurmManager(1), partition="debug", t="9-0").submit(pow, 2, 3)
try:
    never.result(100)
    raise AssertionError
except LaunchError as exc:
    assert "can never start: PartitionTimeLimit; it has been cancelled" in str(exc), exc
waiting = JobExecutor(SlurmManager(1), hold=True, **OPTIONS).submit(pow, 2, 3)
until(lambda: waiting.reason == "JobHeldUser", 30)
assert str(waiting.state) == "PENDING" and not waiting.done()
assert waiting.cancel() and isinstance(waiting.exception(100), CancelledError)
""",
        timeout=200,
    )


def test_a_job_that_lost_its_node_runs_again(slurm: Slurm) -> None:
    """By the process that waits for it; and once only, if several do."""
    done = run(
        slurm,
        """
import threading

def f():
    first = not Path("ran").exists()
    Path("ran").touch()
    if first:
        time.sleep(600)
    return os.environ["SLURM_JOB_ID"]

future = JobExecutor(SlurmManager(1), retries=1, name="again", **OPTIONS).submit(f)
first = future.job_id
until(Path("ran").exists, 60)
# As Slurm ends a job for a time limit, which would take a minute and a half.
Path("verdict").write_text(first)
from hpcdist._schedulers.slurm import Slurm
post_mortem = Slurm.post_mortem
def timed_out(self, jobs, log=None):
    from dataclasses import replace
    from hpcdist.managers import JobState
    found = post_mortem(self, jobs, log)
    return {j: replace(v, state=JobState.TIMEOUT, word="TIMEOUT") if j == first and
            v.state.terminal else v for j, v in found.items()}
poll = Slurm.poll
def polled(self, jobs, log=None):
    from dataclasses import replace
    from hpcdist.managers import JobState
    found = poll(self, jobs, log)
    return {j: replace(v, state=JobState.TIMEOUT, word="TIMEOUT") if j == first and
            v.state.terminal else v for j, v in found.items()}
Slurm.poll, Slurm.post_mortem = polled, timed_out
shown("scancel", first)
got = []
threads = [threading.Thread(target=lambda: got.append(future.result(100))) for _ in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(got) == 3 and set(got) == {future.job_id}, got
assert future.job_id != first
print(first, future.job_id)
""",
    )
    first, second = done.out.split()
    assert int(second) == int(first) + 1


def test_the_examples_of_the_page_run(slurm: Slurm) -> None:
    """Each as a program of its own, one after the other."""
    slurm.expected += [".hpcdist/jobs/*/*"]
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    done = [slurm.driver(block, timeout=100) for block in blocks]
    assert [one.rc for one in done] == [0, 0, 0], [one.err for one in done]
    assert re.fullmatch(r"\d+ pi (PENDING|RUNNING|CONFIGURING)\n", done[0].out)
    assert done[1].out.startswith("3.14159265")
    assert "[280, 580, 900]\n580\n" in done[2].out
    slurm.driver(PRELUDE + "[h.job(f'sweep.{k}').forget() for k in range(3)]")


def test_the_program_beside_that_of_submitit_runs(slurm: Slurm) -> None:
    slurm.expected += [".hpcdist/jobs/*/*"]
    page = PAGE.with_name("from-submitit.md").read_text()
    (_, ours) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    done = slurm.driver(ours + "for one in [job, *jobs]:\n    one.forget()\n", timeout=100)
    assert (done.rc, done.out) == (0, "12\n[11, 22]\n"), done.err


def test_what_is_wrong_is_told_before_anything_is_submitted(slurm: Slurm) -> None:
    run(
        slurm,
        """
def no(kind, word, make):
    try:
        make()
    except kind as exc:
        assert word in str(exc), exc
        return
    raise AssertionError(word)

no(TypeError, "SlurmManager or the like", lambda: JobExecutor(3))
no(ValueError, "letters, digits", lambda: JobExecutor(SlurmManager(1), name="a/b"))
no(ValueError, "retries is", lambda: JobExecutor(SlurmManager(1), retries=-1))
no(ValueError, "split=", lambda: JobExecutor(SlurmManager(2), split=1))
no(TypeError, "timeout", lambda: JobExecutor(SlurmManager(2), timout=1))
executor = JobExecutor(SlurmManager(1), **OPTIONS)
no(TypeError, "at least one collection", lambda: executor.map(abs))
no(ValueError, "max_running is 1 or more", lambda: executor.map(abs, [1], max_running=0))
no(ValueError, "1001 jobs at most", lambda: executor.map(abs, range(1002), max_running=3))
no(h.managers.SubmitError if hasattr(h, "managers") else Exception, "nosuch",
   lambda: JobExecutor(SlurmManager(1), partition="nosuch").submit(abs, 1))
no(Exception, "lock", lambda: executor.submit(print, __import__("threading").Lock()))
assert not RUNS.exists() or not list(RUNS.iterdir()), list(RUNS.iterdir())
assert executor.map(abs, []) == []
""",
    )
