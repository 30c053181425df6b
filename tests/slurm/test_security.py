"""Who gets in, who does not, and where the secret is to be found: in the join file alone."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import eventually
from tests.slurm.cluster import Running, Slurm

pytestmark = pytest.mark.any_mpi

DRIVER = """
import json, os, sys, threading, time
import hpcdist
from hpcdist import SlurmManager, addprocs, launch, remotecall_fetch

os.umask(0)
def say(**facts):
    print(json.dumps(facts), flush=True)

def cost():
    return {"threads": threading.active_count(), "fds": len(os.listdir("/proc/self/fd"))}

def until(path):
    while not os.path.exists(path):
        time.sleep(0.02)

addprocs(SlurmManager(2), nodes=2)
before = cost()
started = launch(SlurmManager(2), nodes=2, hold=True, keep=True)
until_submitted = time.monotonic() + 30
while not started.jobs:
    assert time.monotonic() < until_submitted
    time.sleep(0.02)
say(os_pid=os.getpid(), jobs=started.jobs, before=before)
pids = started.wait(timeout=60)
say(pids=pids, during=cost())
until("greeted")
assert all(remotecall_fetch(hpcdist.myid, pid) == pid for pid in hpcdist.workers())
from hpcdist._runtime.node import here
from hpcdist._transport import network
addresses = [a for m in here.node.members.living.values() for a in network.targets(m.address)]
say(workers=hpcdist.workers(), addresses=addresses, costs=hpcdist.everywhere.call(cost))
until("waited")
say(after=cost(), costs_after=hpcdist.everywhere.call(cost))
"""

# Dials as many sorts of strangers do. What it learns to know: ports, and perhaps the join file.
STRANGER = r"""
import json, os, pickle, socket, ssl, struct, sys, time

HOSTS = [tuple(target) for target in json.loads(sys.argv[1])]
JOIN = json.loads(sys.argv[2])  # {} or what only one of us may know, but for the cookie
IDLE = int(sys.argv[3])

class Bomb:
    def __reduce__(self):
        return os.system, ("touch /home/hpcuser/work/unpickled",)

BOMB = pickle.dumps(Bomb())
HELLO = b"hpcdist1" + bytes(48)  # a greeting, but for the proof
WORDS = [b"", b"GET / HTTP/1.0\r\n\r\n", HELLO, BOMB, bytes(1 << 16), os.urandom(999)]

def context(pem):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    if pem:
        fd = os.memfd_create("pem")
        os.write(fd, pem.encode())
        made.load_cert_chain(f"/proc/self/fd/{fd}")
        os.close(fd)
    return made

def heard(sock):
    # All that the other side says until it hangs up. TLS 1.3 refuses after the handshake.
    data = b""
    try:
        while part := sock.recv(4096):
            data += part
    except OSError:
        pass
    return data

def dial(target):
    sock = socket.create_connection(target, 10)
    sock.settimeout(15)
    return sock

def attempt(target, words, tls=None):
    sock = dial(target)
    try:
        if tls is not None:
            sock = tls.wrap_socket(sock)
        sock.sendall(words)
        if tls is None:
            sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    data = heard(sock)
    sock.close()
    return data

idle = [dial(HOSTS[k % len(HOSTS)]) for k in range(IDLE)]
print("idle", flush=True)
own = None
if len(sys.argv) > 4:
    own = open(sys.argv[4]).read()
for target in HOSTS:
    for words in WORDS:
        plain = attempt(target, words)
        assert b"hpcdist" not in plain, plain
        for tls in (context(None), context(own)):
            assert attempt(target, words, tls) == b"", "a stranger was spoken to"
    if JOIN:
        right = context(JOIN["tls"])
        said = HELLO + struct.pack("<I", len(BOMB)) + BOMB
        for words in (bytes(56), HELLO, said, BOMB * 3):
            data = attempt(target, words, right)
            assert len(data) == 24, data  # a challenge and no more
            assert data.startswith(b"hpcdist1")
print("refused", flush=True)
# Those who say nothing are hung up on, one and all.
for sock in idle:
    assert heard(sock) == b""
print("hung up", flush=True)
"""


def facts(running: Running, word: str, timeout: float = 60) -> dict[str, Any]:
    """Wait until a driver says something of this name; return that."""

    def look() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in running.out.splitlines() if line.startswith("{")]
        found = [each for each in lines if word in each]
        assert found or running.process.poll() is None, f"{running.out}\n{running.err}"
        return found

    return eventually(look, timeout, f"no {word!r} was said")[0]


def reads(running: Running, word: str, timeout: float = 60) -> None:
    """Wait until a program prints a word."""

    def look() -> bool:
        assert word in running.out or running.process.poll() is None, running.err
        return word in running.out

    eventually(look, timeout, f"no {word!r}: {running.err}")


def secrets_of(join: dict[str, Any]) -> list[bytes]:
    """Return what nobody else may see: the cookie as it is and as it is written, and the key."""
    cookie = bytes.fromhex(join["cookie"])
    key = join["tls"].split("-----")[2].split()
    assert "PRIVATE KEY" in join["tls"]
    return [cookie, cookie.hex().encode(), key[0].encode(), key[1].encode(), b"PRIVATE KEY"]


def exposures(slurm: Slurm, secrets: list[bytes]) -> list[str]:
    """Return which process shows a secret, on any machine, in its arguments or environment."""
    spaces = {os.readlink(f"/proc/{slurm._pid1(m)}/ns/pid") for m in ("login", *slurm.nodes)}
    found, seen = [], 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.readlink(entry / "ns/pid") not in spaces:
                continue
            shown = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        seen += 1
        found += [f"{entry}: {shown[:200]!r}" for secret in secrets if secret in shown]
    assert seen > 10
    return found


def files_with(folder: Path, secrets: list[bytes]) -> list[str]:
    """Return which files below a folder show a secret."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
        if any(secret in path.read_bytes() for secret in secrets)
    ]


def listening(os_pid: int) -> list[tuple[str, int]]:
    """Return where a process accepts connections by TCP."""
    sockets = set()
    for fd in Path(f"/proc/{os_pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(fd))
        except OSError:
            continue
    found = []
    for line in Path(f"/proc/{os_pid}/net/tcp").read_text().splitlines()[1:]:
        row = line.split()
        if row[3] == "0A" and f"socket:[{row[9]}]" in sockets:
            host, port = row[1].split(":")
            number = bytes.fromhex(host)[::-1]
            found.append((".".join(map(str, number)), int(port, 16)))
    return found


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_stranger_gets_nothing_and_stops_nobody(slurm: Slurm) -> None:
    """One launch waits at the door while strangers come; another is up already."""
    # A folder that others can read, and write: what is made in it is the user's alone.
    open_folder = slurm.file("open/x", "").removesuffix("/x")
    slurm.path("open").chmod(0o777)
    driver = slurm.start(slurm.python, slurm.program(DRIVER), env={"HPCDIST_DIR": open_folder})
    told = facts(driver, "before")
    (run,) = [p.parent for p in slurm.path("open/jobs").glob("*/join")]
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert stat.S_IMODE((run / "join").stat().st_mode) == 0o600
    join = json.loads((run / "join").read_text())
    secrets = secrets_of(join)
    ours = [os_pid for os_pid, what in slurm.processes("login").items() if "driver" in what]
    doors = {target for os_pid in ours for target in listening(os_pid)}
    assert doors == {tuple(target) for target in join["addresses"]}

    # Strangers: "nobody", who has the ports, and one who has even found the certificate.
    slurm.file("stranger.py", STRANGER)
    own = slurm.file("own.pem", _another_certificate())
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", slurm.python)
    where = json.dumps(sorted(doors))
    program = f"{slurm.work}/stranger.py"
    crowd = slurm.start(*nobody, program, where, "{}", "300", own, on="n3", root=True)
    thief = slurm.start(
        slurm.python, program, where, json.dumps({"tls": join["tls"]}), "0", own, on="n3", root=True
    )
    reads(crowd, "idle")
    during = slurm.root("scontrol", "release", told["jobs"][0])
    assert during.rc == 0
    assert len(facts(driver, "pids")["pids"]) == 2
    # Workers listen, and are no kinder to strangers; both crowds wait out the same half minute.
    slurm.file("greeted", "")
    busy = facts(driver, "workers")
    assert len(busy["addresses"]) == 4
    others = slurm.start(
        *nobody, program, json.dumps(busy["addresses"]), "{}", "120", own, on="n3", root=True
    )
    reads(others, "idle")
    reads(thief, "hung up")
    assert thief.wait().rc == 0

    # All are in: nobody listens any more, the secret is in no file, and in no process's clothes.
    eventually(lambda: not [target for os_pid in ours for target in listening(os_pid)])
    assert not (run / "join").exists()
    assert exposures(slurm, secrets) == []
    assert files_with(run, secrets) == []
    assert {p.name for p in run.iterdir()} >= {"script.sh", "manifest.json", "commands.jsonl"}
    batch = slurm.root("scontrol", "write", "batch_script", told["jobs"][0], "-").out
    assert "keeper --join" in batch
    assert not any(secret.decode(errors="replace") in batch for secret in secrets)
    for strangers in (crowd, others):
        reads(strangers, "hung up")
        assert strangers.wait().rc == 0
    slurm.file("waited", "")
    after = facts(driver, "after")
    done = driver.wait(30)
    assert done.rc == 0, done.err

    # What it has cost: some threads that stay for later, no descriptor, and few lines.
    assert after["after"]["threads"] <= told["before"]["threads"] + 40
    assert after["after"]["fds"] <= told["before"]["fds"] + 12
    for pid, cost in after["costs_after"].items():
        if pid != "1":
            assert cost["threads"] <= 45, after
            assert cost["fds"] <= busy["costs"][pid]["fds"], (busy, after)
    lines = [line for line in done.err.splitlines() if "refused" in line]
    assert 1 <= len(lines) <= 12, done.err
    assert "Traceback" not in done.err
    assert not slurm.path("unpickled").exists()


def _another_certificate() -> str:
    from hpcdist._transport import tls

    return tls._make()


def test_a_worker_of_another_version_is_refused(slurm: Slurm) -> None:
    slurm.file(
        "stub/sitecustomize.py", "from hpcdist import _version\n_version.VERSION = '0.0.1'\n"
    )
    done = slurm.driver(
        """
import os, hpcdist
try:
    hpcdist.addprocs(hpcdist.SlurmManager(2), env={"PYTHONPATH": os.getcwd() + "/stub"})
except hpcdist.LaunchError as exc:
    print(exc)
assert hpcdist.workers() == [1]
"""
    )
    assert done.rc == 0, done.err
    assert "has hpcdist 0.0.1, this process has" in done.out, done.out + done.err
    eventually(lambda: not slurm.jobs(), 15)
