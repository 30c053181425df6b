"""`addprocs` of a list of hosts: ways to name them, what workers there can do, what fails."""

import pytest

from tests.slurm.cluster import Finished
from tests.ssh.drivers import PRELUDE
from tests.ssh.hosts import Hosts


def run(hosts: Hosts, text: str, *args: str, timeout: float = 90) -> Finished:
    """Run a driver to its good end."""
    done = hosts.driver(PRELUDE + text, *args, timeout=timeout)
    assert done.rc == 0, f"{done.out}\n{done.err}"
    return done


def test_workers_of_two_hosts_are_one_cluster(hosts: Hosts) -> None:
    run(
        hosts,
        """
# `nickname` is n2 in ~/.ssh/config, with settings that would be in the way.
pids = addprocs([("n1", 2), "hpcuser@n2:2222", ("nickname", "auto")], max_parallel=1)
cores = len(os.sched_getaffinity(0))
assert pids == list(range(2, 5 + cores)), pids
names = [remotecall_fetch(socket.gethostname, p) for p in pids]
assert names == ["n1", "n1", "n2"] + ["n2"] * cores, names
assert h.procs(2) == [2, 3]
assert h.status()[1].manager == "SSHManager"

# Between ranks of a host by MPI, between hosts by links.
for a in pids:
    for b in pids:
        assert remotecall_fetch(lambda b: remotecall_fetch(h.myid, b), a, b) == b
assert h.spmd(lambda: h.comm().allreduce(1), pids=[2, 3]) == [2, 2]
try:
    h.spmd(lambda: None, pids=[2, 4])
except ValueError:
    pass
else:
    raise AssertionError("one spmd over two worlds")
assert h.reduce(lambda a, b: a + b, h.myid) == sum(pids)
assert h.bcast(b"x" * 5_000_000).fetch() == b"x" * 5_000_000
local = addprocs(1)
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, 2), local[0]) == 2
assert remotecall_fetch(lambda b: remotecall_fetch(h.myid, b), 4, local[0]) == local[0]

rmprocs(2, 3)
assert h.workers() == pids[2:] + local
rmprocs(h.workers())
""",
    )


def test_workers_run_where_and_as_they_are_told(hosts: Hosts) -> None:
    assert hosts.start("mkdir", "-m", "755", "/tmp/elsewhere", on="n1").wait().rc == 0
    hosts.file("here.py", "def word(): return 'found'\n")
    try:
        done = run(
            hosts,
            """
bind = sys.argv[1]
# The driver's folder is not on n2; ~/work is on both, without this one in it.
Path("only-here").mkdir()
os.chdir("only-here")
a, = addprocs([f"n1 {bind}"], dir="/tmp/elsewhere", env={"COLOUR": "red"}, isolation="process")
b, = addprocs(["n2"], ssh_flags=["-o", "SendEnv=NOTHING"], enable_threaded_blas=True)
assert remotecall_fetch(os.getcwd, a) == "/tmp/elsewhere"
assert remotecall_fetch(os.getcwd, b) == "/home/hpcuser"
assert remotecall_fetch(os.getenv, a, "COLOUR") == "red"
assert remotecall_fetch(os.getenv, a, "OMP_NUM_THREADS") == "1"
assert remotecall_fetch(os.getenv, b, "OMP_NUM_THREADS") is None
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, 2), b) == 2
remotecall_fetch(lambda: print("said there", flush=True), b)
print(h.spmd(lambda: 7, pids=[b]))

# min_workers: one host suffices, the other is missed, and told of.
assert len(addprocs(["n1", "no-entry"], min_workers=1)) == 1
""",
            hosts.root("hostname", "-I", on="n1").out.split()[0],
        )
    finally:
        hosts.start("rmdir", "/tmp/elsewhere", on="n1").wait()
    assert "[7]\n" in done.out, done
    assert "From worker 3:\tsaid there\n" in done.out, done
    assert "no-entry" in done.err, done


def test_a_host_that_fails_is_named_and_the_rest_stay(hosts: Hosts) -> None:
    run(
        hosts,
        """
def failed(machines, *words, pids=(), **params):
    try:
        new = addprocs(machines, **params)
    except LaunchError as exc:
        text = str(exc)
        print(text, "\\n", flush=True)
        missing = [word for word in words if word not in text]
        assert not missing, (missing, text)
        assert len(exc.pids) == len(pids) == len(h.workers() if h.nprocs() > 1 else []), exc.pids
        assert [remotecall_fetch(socket.gethostname, p) for p in exc.pids] == list(pids)
        rmprocs(exc.pids)
        return
    raise AssertionError(f"{machines} gave {new}")

# ssh's own words, and what to do about them.
failed(["n1", ("unknown-key", 2), ("n2", 2)], "unknown-key: ", "Host key verification failed",
       "connect once by hand, `ssh unknown-key`", pids=["n1", "n2", "n2"])
failed(["no-entry"], "no-entry: ", "Permission denied (publickey)", "ssh -o BatchMode=yes no-entry")
failed(["nowhere.invalid", "n1:4711", "n2"], "2 of 3 hosts failed", "nowhere.invalid: ",
       "Could not resolve hostname", "n1 port 4711: ", "Connection refused", pids=["n2"])
# What is missing over there.
failed(["n1"], "n1: ", "/nonexistent/python", "choose one by python=", python="/nonexistent/python")
failed(["n1"], "n1: ", "/nonexistent", dir="/nonexistent")
failed(["n1"], "unknown option --bogus", exeflags=["--bogus"])
failed(["n1"], "n1: ", "mpi4py is not installed for", "isolation='process'", exeflags=["-S"])
failed(["n1"], "n1: No module named hpcdist for x", "install it for that interpreter",
       ssh="sh -c 'echo No module named hpcdist for x >&2; exit 1'")
failed(["n1"], "n1: ssh ended (exit code 3) and said nothing", ssh="sh -c 'exit 3'")
failed(["n1"], "cannot be run", "ssh=", ssh="/nonexistent/ssh")
failed(["n1"], "n1: 1 worker did not register within 1 s", "connecting by ssh", timeout=1,
       ssh="sh -c 'exec sleep 600'")
# A worker that cannot come to us.
failed(["n1 10.255.255.255"], "interface='10.255.255.255'", "eth0")
failed(["n1"], "interface='ib7'", "br0", interface="ib7")
""",
        timeout=150,
    )


@pytest.mark.any_mpi
def test_what_is_wrong_with_options_is_told_before_anything_is_made(hosts: Hosts) -> None:
    run(
        hosts,
        """
for kind, what, params, word in (
    (TypeError, ["n1"], {"tunel": True}, "'tunnel'"),
    (ValueError, ["n1"], {"tunnel": 1}, "tunnel"),
    (ValueError, ["n1"], {"max_parallel": 0}, "max_parallel"),
    (ValueError, ["n1"], {"ssh_flags": "-v", "sshflags": "-v"}, "one option"),
    (ValueError, [("n1", 0)], {}, "('n1', 0)"),
    (ValueError, ["-oProxyCommand=false"], {}, "-oProxyCommand"),
    (TypeError, [3], {}, "3"),
    (TypeError, ("n1", 3), {}, "list of hosts"),
):
    try:
        addprocs(what, **params)
    except kind as exc:
        assert word in str(exc), exc
    else:
        raise AssertionError(what)
assert addprocs([]) == [] and h.procs() == [1]
""",
    )


def test_workers_run_under_a_command(hosts: Hosts) -> None:
    done = run(
        hosts,
        """
import sys
(a,) = addprocs(["n1"], python=["nice", "-n", "5", sys.executable])
(b,) = addprocs(["n2"], wrapper=["nice", "-n", "5"])
print([remotecall_fetch(os.nice, pid, 0) for pid in (a, b)])
""",
    )
    assert "[5, 5]" in done.out, done
