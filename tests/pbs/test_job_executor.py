"""`JobExecutor` with PBS: a map is a job array."""

import pytest

from tests.pbs.cluster import Pbs
from tests.pbs.drivers import PRELUDE

pytestmark = pytest.mark.timeout(180)


def test_functions_run_as_jobs(pbs: Pbs) -> None:
    pbs.expected.append(".hpcdist/jobs/*/*")
    done = pbs.driver(
        PRELUDE
        + """
def square(x):
    return x * x

def f(n):
    print("at work")
    return h.pmap(square, range(n)), h.workers()

executor = h.JobExecutor(PBSManager(2), walltime="1:00")
future = executor.submit(f, 4)
assert future.result(60) == ([0, 1, 4, 9], [2]), future.result()
assert future.stdout() == "at work\\n", future.stdout()
assert str(future.state) == "COMPLETED" and future.job_id.endswith(".head")

def half(x):
    return 10 // x

executor = h.JobExecutor(PBSManager(1), name="half", walltime="1:00")
one, none = executor.map(half, [2, 0], max_running=1)
assert (one.name, none.name) == ("half.0", "half.1")
assert one.job_id.replace("[0]", "[1]") == none.job_id, (one.job_id, none.job_id)
assert "#PBS -J 0-1%1" in next(RUNS.glob("half/script.sh")).read_text()
assert h.job("half.0").result(60) == 5
assert isinstance(none.exception(60), ZeroDivisionError), none.exception()
(alone,) = executor.map(half, [5])  # PBS has no array of one
assert (alone.name, alone.result(60)) == ("half-2", 2)
for job in (future, one, none, alone):
    job.forget()
assert not list(RUNS.iterdir())
""",
        timeout=150,
    )
    assert done.rc == 0, f"{done.out}\n{done.err}"
