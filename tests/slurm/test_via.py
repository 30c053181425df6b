"""`SlurmManager(n, via="login")`: jobs of a cluster that the driver's machine is no part of.

The driver runs on `n3`, with a home of its own, and listens on its loopback address alone. An sshd
runs on `login`; what is submitted there runs on `n1` and `n2`.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import go_without
from tests.helpers import eventually
from tests.slurm.cluster import Finished, Running, Slurm
from tests.slurm.drivers import PRELUDE

pytestmark = pytest.mark.timeout(300)

_HOME = "/tmp/own"  # of the user on that machine
_PROGRAMS = ("sshd", "ssh", "ssh-keygen")
_ADMIN_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

_PRELUDE = (
    PRELUDE
    + """
import functools, shutil

until = functools.partial(until, timeout=60)
SSH = ["ssh", "-F", os.environ["SSH_CONFIG"]]
THERE = Path("/home/hpcuser/.hpcdist/jobs")  # seen here, too, by this test alone
NODES = {"nodelist": "n1,n2", "nodes": 2}

def manager(n, via="login"):
    return SlurmManager(n, via=via, ssh=SSH)

def at_login(*command):
    return shown(*SSH, "login", *command)

def queue():
    return at_login("squeue", "-h", "-r", "-t", "PD,R,CF", "-o", "%i-%T").splitlines()

def refused_via(via, *words, **params):
    try:
        pids = addprocs(manager(1, via), **params)
    except LaunchError as exc:
        text = f"{exc} {exc.fix}"
        missing = [word for word in words if word not in text]
        assert not missing, (missing, params, text)
        return exc
    raise AssertionError(f"{params} gave {pids}")
"""
)


class Outside:
    """A machine from which the cluster is reached by ssh alone."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self._slurm = slurm
        self._folder = folder

    def start(self, text: str) -> Running:
        """Start a driver there."""
        slurm = self._slurm
        settings = {"HOME": _HOME, "SSH_CONFIG": str(self._folder / "config")}
        program = slurm.program(_PRELUDE + text)
        script = f'mkdir -p "$HOME" && cd "$HOME" && exec {slurm.python} {program}'
        return slurm.start("sh", "-c", script, on="n3", env=settings)

    def run(self, text: str, timeout: float = 150) -> Finished:
        """Run a driver there to its good end."""
        done = self.start(text).wait(timeout)
        assert done.rc == 0, f"{done.out}\n{done.err}"
        return done

    def serve(self, port: int, *lines: str) -> Running:
        """Start an sshd on `login`, with more settings."""
        config = self._folder / f"sshd_config.{port}"
        settings = (
            f"Port {port}",
            f"HostKey {self._folder}/host_key",
            f"AuthorizedKeysFile {self._folder}/id.pub",
            *("PidFile none", "StrictModes no", "UsePAM no", "PasswordAuthentication no"),
            *("KbdInteractiveAuthentication no", "MaxStartups 100"),
        )
        config.write_text("\n".join([*settings, *lines]) + "\n")
        assert self._slurm.root("mkdir", "-p", "/run/sshd").rc == 0
        program = shutil.which("sshd", path=_ADMIN_PATH)
        assert program is not None
        sshd = self._slurm.start(program, "-D", "-e", "-f", str(config), root=True)
        eventually(lambda: "listening on" in sshd.err, message="no sshd")
        return sshd


@pytest.fixture
def outside(slurm: Slurm, request: pytest.FixtureRequest) -> Iterator[Outside]:
    """A machine outside of the cluster."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_ADMIN_PATH) is None]
    if missing:
        go_without(request, f"no sshd: no {', '.join(missing)} (see tests/install.sh ssh)")
    folder = slurm.own_folder("ssh")
    for name in ("host_key", "id"):
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(argv, check=True)
    os.chown(folder / "id", 20001, 20001)
    key = (folder / "host_key.pub").read_text().rsplit(" ", 1)[0]
    (folder / "known_hosts").write_text(f"login,[login]:2222 {key}\n")
    (folder / "config").write_text(
        f"Host *\n IdentityFile {folder}/id\n UserKnownHostsFile {folder}/known_hosts\n"
        " StrictHostKeyChecking yes\nHost wrong-key\n HostName login\n HostKeyAlias login\n"
        " PubkeyAuthentication no\n"
    )
    slurm.expected += [f"{_HOME}*"]
    made = Outside(slurm, folder)
    made.serve(22)
    yield made
    slurm.root("rm", "-rf", _HOME, on="n3")


def test_workers_come_by_way_of_the_login_host(outside: Outside) -> None:
    outside.run(
        """
def listening():
    return {line.split()[3] for line in shown("ss", "-Hltn").splitlines()}

others = listening()
launch = h.launch(manager(4), **NODES)
assert repr(manager(4)) == "SlurmManager(4, via='login')"
pids = launch.wait()
assert {remotecall_fetch(os.uname, p).nodename for p in pids} == {"n1", "n2"}
assert launch.jobs == [line.partition("-")[0] for line in queue()], (launch.jobs, queue())
assert remotecall_fetch(os.getcwd, pids[0]) == "/home/hpcuser"  # /tmp/own is not there

# Jobs have been given addresses of the login host alone; nobody can dial this one.
ports = listening() - others
assert all(port.startswith(("127.0.0.1:", "[::1]:")) for port in ports), ports

data = os.urandom(20_000_000)
assert remotecall_fetch(lambda x: x, pids[3], data) == data
for a in pids:
    assert remotecall_fetch(lambda b: remotecall_fetch(h.myid, b), a, pids[0]) == pids[0]
assert h.spmd(lambda: h.comm().allreduce(1), pids=pids) == [4] * 4
near = addprocs(1)[0]
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, near), pids[1]) == near
assert remotecall_fetch(lambda: remotecall_fetch(len, pids[1], data), near) == len(data)

# The folder that jobs see is for their user alone, and so is what is secret in it.
(folder,) = THERE.iterdir()
assert folder.stat().st_mode & 0o777 == 0o700
assert json.loads((folder / "manifest.json").read_text())["jobs"][0][0] == launch.jobs[0]
rmprocs(pids)
until(lambda: not queue())
until(lambda: not list(THERE.iterdir()))
until(lambda: not list(RUNS.iterdir()))
until(lambda: not list(Path("/tmp").glob("hpcdist-*/ssh")))  # the connection has ended, too
"""
    )


def test_two_jobs_and_one_that_cannot_dial_the_login_host(outside: Outside) -> None:
    outside.run(
        """
pids = addprocs(manager(2), split=1, nodelist="n1")
ids = {s.job_id for s in h.status() if s.pid in pids}
assert len(ids) == 2 and all("_" in job for job in ids), ids

# On its loopback address no job can dial the login host: that one dials the jobs.
more = addprocs(manager(1), interface="lo", nodelist="n2")
assert remotecall_fetch(os.uname, more[0]).nodename == "n2"
assert remotecall_fetch(lambda: remotecall_fetch(h.myid, pids[0]), more[0]) == pids[0]

# A job that others cancel: Slurm says so.
victim = next(s.job_id for s in h.status() if s.pid == more[0])
gone = h.remotecall(time.sleep, more[0], 600)
at_login("scancel", victim)
try:
    gone.fetch(timeout=60)
except h.ProcessExitedException as exc:
    until(lambda: "CANCELLED" in exc.why)
else:
    raise AssertionError("it sleeps")
assert sorted(h.workers()) == pids

script = manager(3).job_script(partition="debug")
assert "#SBATCH --chdir=/home/hpcuser" in script, script
assert "#SBATCH --output=/home/hpcuser/.hpcdist/jobs/hpcdist-run/log" in script, script
"""
    )


def test_what_is_wrong_is_told_before_anything_is_submitted(outside: Outside) -> None:
    outside.serve(2222, "AllowTcpForwarding no")
    outside.run(
        """
before = at_login("squeue", "-h", "-t", "all", "-o", "%i")
refused_via("nosuchhost.invalid", "nosuchhost.invalid", "check the name")
refused_via("login:4711", "onnection refused", "port")
refused_via("wrong-key", "Permission denied", "BatchMode=yes")
refused_via("login", "choose one by python=", python="/nonexistent/python3")
refused_via("login", "there is no directory '/nowhere'", dir="/nowhere")
refused_via("login:2222", "its sshd forwards no port", "AllowTcpForwarding")
try:
    addprocs(SlurmManager(1, via="login", ssh="/nonexistent/ssh"))
except LaunchError as exc:
    assert "/nonexistent/ssh cannot be run" in str(exc), exc
else:
    raise AssertionError

# Another hpcdist there, and another Python.
other = Path(__file__).parent / "other" / "hpcdist"
ours = Path(h.__file__).parent
shutil.copytree(ours, other, ignore=shutil.ignore_patterns("__pycache__"))
version = other / "_version.py"
text = version.read_text()
version.write_text(text + "\\nVERSION = '0.0.1'\\n")
wrapper = other.parent / "python"
wrapper.write_text(f"#!/bin/sh\\nPYTHONPATH={other.parent} exec {sys.executable} \\"$@\\"\\n")
wrapper.chmod(0o755)
refused_via("login", "has hpcdist 0.0.1, this process has", python=str(wrapper))
assert at_login("squeue", "-h", "-t", "all", "-o", "%i") == before
assert not THERE.exists() or not list(THERE.iterdir())

# What is refused without a look at it.
for error, word, params in (
    (ValueError, "linger=", {"linger": 60.0}),
    (ValueError, "'a b c'", {"via": "a b c"}),
):
    try:
        addprocs(manager(1, params.pop("via", "login")), **params)
    except error as exc:
        assert word in str(exc), exc
    else:
        raise AssertionError(params)

# And then Slurm's own words, and those of a script that fails.
refused_via("login", "Invalid partition name", partition="nope")
setup = ["echo setup fails: no such thing", "false"]
refused_via("login", "setup fails: no such thing", setup=setup, nodelist="n1")
until(lambda: not list(THERE.iterdir()))
"""
    )


def test_a_driver_or_its_connection_that_ends_takes_the_job_along(
    outside: Outside, slurm: Slurm
) -> None:
    driver = outside.start(
        """
pids = addprocs(manager(2), nodelist="n1")
Path("up").write_text("up")
masters = [pid for pid in os.listdir("/proc") if pid.isdigit() and b"ControlMaster=yes"
           in Path(f"/proc/{pid}/cmdline").read_bytes()]
calls = [h.remotecall(time.sleep, p, 600) for p in pids]
os.kill(int(masters[0]), signal.SIGKILL)
for call in calls:
    try:
        call.fetch(timeout=60)
    except h.ProcessExitedException:
        pass
    else:
        raise AssertionError
until(lambda: not queue())
until(lambda: not list(THERE.iterdir()))
addprocs(manager(1), nodelist="n1")
print("again", flush=True)
time.sleep(600)
"""
    )
    eventually(lambda: "again" in driver.out or driver.process.poll() is not None, timeout=120)
    assert "again" in driver.out, driver.err
    driver.kill()
    slurm.expected += [
        "/tmp/hpcdist-*",
        ".hpcdist/jobs/*/*",
        ".hpcdist/jobs/*/bin/*",
    ]  # as any run of a killed driver
    slurm.drain(patience=30)
