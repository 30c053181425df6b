"""Jobs that reach their time limit. Slurm has whole minutes: all of them wait for the same one."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Slurm
from tests.slurm.drivers import submit_sleeper
from tests.slurm.endings import HEAD, says

WORKERS = """
pid, = addprocs(SlurmManager(1), partition="debug", t=1)
waiting = remotecall(time.sleep, pid, 600)
say(ready=True)
waiting.exception(timeout=110)
say(why=why_in_time(waiting, "TIMEOUT"))
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_job_that_takes_too_long(slurm: Slurm) -> None:
    slurm.expected.append(".hpcdist/jobs/*/*")  # of the program, until `hpcdist jobs --clear`
    driver = slurm.start(slurm.python, slurm.program(HEAD + WORKERS))
    waiting, job = submit_sleeper(slurm)
    says(driver, "ready")
    assert "TIMEOUT" in says(driver, "why", 130)["why"]
    assert driver.wait(30).rc == 0, driver.err
    end = waiting.wait(110)
    assert end.rc != 0
    assert f"job {job}: TIMEOUT" in end.err
