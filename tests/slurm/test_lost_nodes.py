"""Nodes that are lost, with their power or their network, and the workers of others that go on."""

from __future__ import annotations

import time

import pytest

from tests.helpers import eventually
from tests.slurm.cluster import Slurm
from tests.slurm.endings import HEAD, says

NODES = """
# Two worlds: the accident befalls the last node of the one and the first of the other.
one = on_two_nodes(4, nodelist="n1,n2")
two = on_two_nodes(4, nodelist="n2,n3")
assert by_host(one + two).keys() == {"n1", "n2", "n3"}
lost = by_host(one)["n2"] + two
left = by_host(one)["n1"]
waiting = [remotecall(time.sleep, pid, 600) for pid in lost]
say(ready=True)
losses = [loss_of(future, 40) for future in waiting]
say(when=time.time(), lost=losses, pids=lost)
# Slurm knows by now, or comes to know: srun ends where it started nothing but on that node.
sinfo = ["sinfo", "--noheader", "--nodes=n2", "--format=%t"]
until(lambda: "down" in subprocess.check_output(sinfo, text=True), 60)
assert workers() == left, (workers(), left)
assert spmd(total, pids=left) == [sum(left)] * 2
begin = time.monotonic()
rmprocs(left)
say(removal=time.monotonic() - begin)
pid, = addprocs(SlurmManager(1), nodelist="n1")
assert remotecall_fetch(hpcdist.myid, pid) == pid
say(whys=[future.exception().why for future in waiting])
"""


@pytest.mark.slow
@pytest.mark.parametrize("accident", ["power", "cable"])
@pytest.mark.timeout(200)
def test_a_lost_node(slurm: Slurm, accident: str) -> None:
    driver = slurm.start(slurm.python, slurm.program(HEAD + NODES))
    says(driver, "ready")
    begin = time.time()
    (slurm.kill_node if accident == "power" else slurm.cut_node)(2)
    said = says(driver, "lost", 40)
    assert said["when"] - begin < 18  # 15 s, on a machine with time for it
    assert [loss["pid"] for loss in said["lost"]] == said["pids"]
    assert [loss["host"] for loss in said["lost"]] == ["n2"] * 4 + ["n3"] * 2
    assert says(driver, "removal", 40)["removal"] < 16
    assert driver.wait(60).rc == 0, driver.err
    assert all(says(driver, "whys")["whys"])
    slurm.heal_node(2)
    eventually(lambda: not slurm.jobs(), 60)
    # Slurm's daemons of steps there could reach nobody, and try again after ever longer times.
    eventually(lambda: not slurm.processes(), 60)
