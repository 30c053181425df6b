"""Networks that are neither there nor gone: a cable that is out for a while."""

from __future__ import annotations

import time

import pytest

from tests.slurm.cluster import Slurm
from tests.slurm.endings import HEAD, says

# Work that crosses the network all the time, until a file is there; then all that it has counted.
WORK = """
pids = on_two_nodes(4, nodelist="n1,n2")
assert by_host(pids).keys() == {"n1", "n2"}
far, near = by_host(pids)["n2"][0], by_host(pids)["n1"][0]
there = hpcdist.RemoteChannel(4, far)
rounds = 0

def whole_round(k):
    '''Calls, a channel and arrays, from here and from worker to worker; nothing lost or twice.'''
    assert pmap(pow, range(20), [2] * 20) == [x * x for x in range(20)]
    assert remotecall_fetch(remotecall_fetch, near, pow, far, k, 2) == k * k
    there.put(k)
    assert remotecall_fetch(hpcdist.take, near, there) == k
    assert remotecall_fetch(len, far, bytes(1_000_000)) == 1_000_000

whole_round(0)
say(ready=True)
while not os.path.exists("enough"):
    rounds += 1
    whole_round(rounds)
whole_round(-1)
assert there.isempty()
assert workers() == pids, (workers(), pids)
rmprocs(pids)
say(rounds=rounds)
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_cable_that_is_in_again_after_five_seconds_costs_nothing(slurm: Slurm) -> None:
    # The limit stands at 10 s, which a loaded machine may let pass before the cable is in again.
    driver = slurm.start(
        slurm.python, slurm.program(HEAD + WORK), env={"HPCDIST_HEARTBEAT_LIMIT": "60"}
    )
    says(driver, "ready")
    slurm.cut_node(2)
    time.sleep(5)  # the accident itself
    slurm.heal_node(2)
    slurm.file("enough", "")
    done = driver.wait(120)
    assert done.rc == 0, f"{done.out}\n{done.err}"
