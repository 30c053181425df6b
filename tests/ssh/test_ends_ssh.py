"""Ends: of a worker, of an ssh connection, of a host's network, of the driver in every way."""

import signal
from pathlib import Path

import pytest

from tests.helpers import eventually
from tests.ssh.drivers import PRELUDE
from tests.ssh.hosts import Hosts
from tests.ssh.test_addprocs_ssh import run


def test_one_death_is_one_death(hosts: Hosts) -> None:
    run(
        hosts,
        """
a, b, c = addprocs([("n1", 2), "n2"])
os_pid = remotecall_fetch(os.getpid, a)
later = h.remotecall(time.sleep, a, 600)
remotecall_fetch(os.kill, b, os_pid, signal.SIGKILL)
exc = death_of(later)
assert exc.pid == a and exc.host == "n1" and "SIGKILL" in exc.why, (exc, exc.why)
assert h.spmd(lambda: h.comm().size, pids=[b]) == [1]
assert remotecall_fetch(h.myid, c) == c

# Its ssh: the host's workers end with it, and only they.
later = h.remotecall(time.sleep, b, 600)
subprocess.run(["pkill", "-KILL", "-P", str(os.getpid()), "-f", " n1 "], check=True)
exc = death_of(later)
assert "the ssh connection to n1 ended" in exc.why, exc.why
assert h.workers() == [c]
# A stuck worker is made to leave.
def stick():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(600)
h.remote_do(stick, c)
rmprocs(c)
""",
    )


BUSY = """
addprocs([("n1", 2), ("n2", 2)])
for pid in h.workers():
    h.remote_do(time.sleep, pid, 600)
print("busy", flush=True)
"""


def test_the_end_of_the_driver_is_the_end_of_all(hosts: Hosts) -> None:
    # Left in the middle of a call, by an exception; `tidy` sees that nothing is left.
    done = hosts.driver(PRELUDE + BUSY + "raise SystemExit(3)")
    assert done.rc == 3, done
    hosts.drain()


@pytest.mark.timeout(240)
def test_kill_9_of_the_driver_leaves_nothing(hosts: Hosts) -> None:
    driver = hosts.start(hosts.python, hosts.program(PRELUDE + BUSY + "time.sleep(600)"))
    eventually(lambda: "busy" in driver.out or driver.process.poll(), timeout=90)
    assert driver.out == "busy\n", driver.err
    assert len([p for p in hosts.processes("n1", "n2").values() if "hpcdist" in p]) >= 6
    driver.kill()
    driver.wait()
    hosts.drain()


@pytest.mark.timeout(240)
def test_a_host_out_of_reach_is_lost_and_the_rest_go_on(hosts: Hosts) -> None:
    text = """
a, b, c = addprocs(["n1", ("n2", 2)])
later = h.remotecall(time.sleep, b, 600)
print("up", flush=True)
try:
    later.fetch(timeout=120)
except h.ProcessExitedException as exc:
    assert exc.pid == b and exc.host == "n2", exc
else:
    raise AssertionError("it lives")
until(lambda: h.workers() == [a])
assert remotecall_fetch(h.myid, a) == a
"""
    driver = hosts.start(hosts.python, hosts.program(PRELUDE + text))
    eventually(lambda: driver.out or driver.process.poll(), timeout=90)
    assert driver.out == "up\n", driver.err
    hosts.cut("n2")
    try:
        done = driver.wait(150)
    finally:
        hosts.plug_in("n2")
    assert done.rc == 0, done
    hosts.drain(60)


@pytest.mark.timeout(240)
def test_ctrl_c_while_hosts_come_up_leaves_nothing(hosts: Hosts) -> None:
    text = (
        PRELUDE
        + """
print("on my way", flush=True)
addprocs(["n1", ("n2", 2)], ssh="sh -c 'sleep 600; exit 1'")
"""
    )
    driver = hosts.start(hosts.python, hosts.program(text))
    eventually(lambda: any("sleep" in p for p in hosts.processes("login").values()), timeout=60)
    driver.send(signal.SIGINT)
    done = driver.wait()
    assert "KeyboardInterrupt" in done.err, done
    hosts.drain()


@pytest.mark.parametrize("params", ["", ", isolation='world'"])
def test_ctrl_c_waits_for_the_ssh_that_is_being_started(hosts: Hosts, params: str) -> None:
    """On a busy machine the driver could end before the thread that had started it was told."""
    text = """
import threading
from hpcdist._cluster.begin import Launches
launches = Launches.here().launches
held = threading.Event()

class Held(subprocess.Popen):
    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        if threading.current_thread() is not threading.main_thread():
            held.set()
            until(lambda: all(world.closed for world in launches[0].worlds))
            time.sleep(0.5)  # it is a slow machine

subprocess.Popen = Held
threading.Thread(target=lambda: (held.wait(), os.kill(os.getpid(), signal.SIGINT))).start()
addprocs(["n1", ("n2", 2)], ssh="sh -c 'sleep 600; exit 1'"PARAMS)
""".replace("PARAMS", params)
    done = hosts.driver(PRELUDE + text)
    assert "KeyboardInterrupt" in done.err, done
    hosts.drain()


@pytest.mark.timeout(240)
def test_no_secret_can_be_seen(hosts: Hosts) -> None:
    text = """
from hpcdist._contract.secret import Secret
secret = Secret.here()
from hpcdist._transport import tls
addprocs([("n1", 2), "n2"], tunnel=True)
print(secret.cookie(), secret.cookie().encode().hex(), *tls.certificate().splitlines()[1:4])
sys.stdout.flush()
time.sleep(600)
"""
    driver = hosts.start(hosts.python, hosts.program(PRELUDE + text))
    eventually(lambda: driver.out.endswith("\n") or driver.process.poll(), timeout=60)
    secrets = [word.encode() for word in driver.out.split()]
    assert len(secrets) == 5, driver.err
    seen = hosts.processes()
    for os_pid, title in seen.items():
        for name in ("cmdline", "environ"):
            shown = Path(f"/proc/{os_pid}/{name}").read_bytes()
            assert not any(secret in shown for secret in secrets), (title, name)
    assert len([title for title in seen.values() if "hpcdist" in title]) >= 5, seen
    driver.kill()
    driver.wait()
