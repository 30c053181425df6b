"""`tunnel=True`: links of hosts that cannot dial process 1 come back over ssh."""

from collections.abc import Iterator

import pytest

from tests.ssh.hosts import Hosts
from tests.ssh.test_addprocs_ssh import run

pytestmark = pytest.mark.any_mpi


@pytest.fixture
def walled(hosts: Hosts) -> Iterator[Hosts]:
    """Hosts, the first of which can be dialled at its sshd and can dial nobody on `login`."""
    hosts.wall("n1")
    yield hosts
    hosts.unwall("n1")


@pytest.mark.slow
def test_links_come_back_over_ssh(walled: Hosts) -> None:
    run(
        walled,
        """
try:
    addprocs([("n1", 2)], isolation="process")
except LaunchError as exc:
    assert "none of its addresses answers" in str(exc) and "tunnel=True" in exc.fix, exc
else:
    raise AssertionError("there is no wall")

pids = addprocs([("n1", 2), ("n2:2222", 1)], tunnel=True)
assert [remotecall_fetch(socket.gethostname, p) for p in pids] == ["n1", "n1", "n2"]
data = os.urandom(20_000_000)
assert remotecall_fetch(lambda x: x, pids[0], data) == data
for a in pids:
    for b in pids:
        assert remotecall_fetch(lambda b: remotecall_fetch(h.myid, b), a, b) == b
assert h.spmd(lambda: h.comm().size, pids=pids[:2]) == [2, 2]

# A worker here that neither can dial, nor be dialled by: by way of process 1, in order.
near, far = addprocs(1)[0], pids[0]
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, near), far) == near
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, far), near) == far
assert remotecall_fetch(lambda: remotecall_fetch(len, far, data), near) == len(data)
assert len(remotecall_fetch(lambda: remotecall_fetch(os.urandom, far, 999_999), near)) == 999_999
channel = h.RemoteChannel(500, near)
remotecall_fetch(lambda: [h.put(channel, i) for i in range(300)] and None, far)
assert remotecall_fetch(lambda: [h.take(channel) for _ in range(300)], pids[1]) == list(range(300))
assert h.bcast(data).fetch() == data
assert h.reduce(lambda a, b: a + b, h.myid) == sum(h.workers())
later = remotecall_fetch(lambda: h.remotecall(time.sleep, near, 600), far)
rmprocs(near)
try:
    later.fetch(timeout=60)
except h.ProcessExitedException:
    pass
else:
    raise AssertionError("it lives")
rmprocs(h.workers())
""",
    )


def test_an_sshd_that_forwards_no_port_is_told_of(hosts: Hosts) -> None:
    keys = hosts.start("cat", "/home/hpcuser/.ssh/authorized_keys", on="n2").wait().out
    put = lambda text: hosts.start(
        "sh", "-c", 'printf %s "$0" > ~/.ssh/authorized_keys', text, on="n2"
    ).wait()
    put(f"no-port-forwarding {keys}")
    try:
        run(
            hosts,
            """
try:
    addprocs(["n2"], tunnel=True)
except LaunchError as exc:
    assert "n2: its sshd forwards no port" in str(exc), exc
else:
    raise AssertionError("it did")
""",
        )
    finally:
        put(keys)
