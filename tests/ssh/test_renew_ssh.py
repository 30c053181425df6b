"""`renew=True` on other hosts: others come in place of workers that die, on the same host."""

import pytest

from tests.ssh.drivers import PRELUDE
from tests.ssh.hosts import Hosts


@pytest.mark.any_mpi
def test_a_worker_of_one_host_is_replaced_there(hosts: Hosts) -> None:
    done = hosts.driver(
        PRELUDE
        + """
kept = h.launch([("n1", 1), ("n2", 1)], isolation="process", renew=True)
first, second = kept.wait(timeout=60)
os_pid = remotecall_fetch(os.getpid, second)
call = h.remotecall(os.kill, second, os_pid, signal.SIGKILL)
death_of(call)
until(lambda: len(kept.pids) == 2 and second not in kept.pids, 60)
names = {remotecall_fetch(socket.gethostname, pid) for pid in kept.pids}
assert names == {"n1", "n2"} and first in kept.pids, (names, kept.pids)
assert h.workers() == kept.pids
kept.cancel()
until(lambda: h.workers() == [1])
""",
        timeout=120,
    )
    assert done.rc == 0, f"{done.out}\n{done.err}"
    assert "1 new worker is on the way (renew=True)" in done.err, done.err
