"""Strangers at the door, before and while workers register: what they get, and what they cost.

python -m benchmarks.strangers [--seconds N] [--only NAME]

Process 1 has a worker that takes calls, and a port for others. A crowd of each kind knocks there;
meanwhile the calls go on, and a worker of ours registers by the same port. As root also: another
user at the sockets of this host.
"""

import argparse
import contextlib
import json
import os
import pickle
import resource
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clients import descriptors
from benchmarks.idle import rss_mb

NOBODY = "nobody"
_PATIENCE = 60.0
_REGISTERS = 10.0  # seconds by which a crowd may delay a worker that registers
_CALL = 20.0  # seconds that a call in flight may take, at the very worst
_MEMORY = 100.0  # MB that a crowd may cost process 1: 1,024 at a time, some 75 KB each with TLS
_NOBODY = 65534
_SLOW = 0.5  # seconds between the bytes of a slow one
_MANY = 10_000
_SOME = 500
_FEW = 50


@dataclass(frozen=True)
class Crowd:
    """Strangers of one kind.

    Attributes:
        at_once: How many are there at any time; one that is hung up on is followed by another.
        words: What each says, by its number.
        slowly: Whether they say it byte by byte.
        secure: With whose certificate they come: "ours", "theirs", or none.
    """

    at_once: int
    words: Callable[[int], bytes]
    slowly: bool = False
    secure: str = ""


class _Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def crowds(marker: str, recorded: bytes) -> dict[str, Crowd]:
    """List the kinds.

    Args:
        marker: A folder that is made where anything of theirs is unpickled.
        recorded: What one of ours has said in its greeting, without its certificate's part.
    """
    bomb = pickle.dumps(_Bomb(marker), 5)
    opening = b"hpcdist1" + bytes(48)
    tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    huge = opening + (1 << 31).to_bytes(4, "little") + bomb * 4000
    return {
        NOBODY: Crowd(0, lambda k: b""),
        "garbage": Crowd(_FEW, lambda k: os.urandom(k % 400)),
        "pickles": Crowd(_FEW, lambda k: bomb * (1 + k % 50), secure="ours"),
        "truncated greetings": Crowd(_FEW, lambda k: opening[: k % 56], secure="ours"),
        "huge greetings": Crowd(_FEW, lambda k: huge, secure="ours"),
        "a recorded greeting": Crowd(_FEW, lambda k: recorded, secure="ours"),
        "another certificate": Crowd(_FEW, lambda k: opening, secure="theirs"),
        "plain HTTP": Crowd(_FEW, lambda k: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        "500 slow ones": Crowd(_SOME, lambda k: tls + bytes(200), slowly=True),
        "10,000 connections": Crowd(_MANY, lambda k: tls[: k % 12]),
    }


# The crowd: a process of its own


class _Knocker:
    """One of a crowd."""

    def __init__(self, target: Any, words: bytes, crowd: Crowd, context: Any) -> None:
        self.sock: Any = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.sock.connect_ex(target)
        if context is not None:
            self.sock = context.wrap_socket(self.sock, do_handshake_on_connect=False)
        self.shaking = context is not None
        self.left = words
        self.slowly = crowd.slowly
        self.heard = 0

    def advance(self) -> bool:
        """Go on; False: it was hung up on."""
        try:
            if self.shaking:
                self.sock.do_handshake()
                self.shaking = False
            if self.left:
                sent = self.sock.send(self.left[:1] if self.slowly else self.left)
                self.left = self.left[sent:]
            data = self.sock.recv(4096)
            self.heard = max(self.heard, len(data))
            return bool(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return True
        except OSError as exc:
            return exc.errno in (107, 115)  # not connected yet


def knock(target: Any, crowd: Crowd, pems: dict[str, str]) -> None:
    """Be a crowd until standard input ends; then say how many were there and what they heard."""
    from hpcdist._transport import tls

    context = None
    if crowd.secure:
        context = tls._context(pems[crowd.secure], ssl.PROTOCOL_TLS_CLIENT)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    here: dict[int, _Knocker] = {}
    came = heard = 0
    epoll = select.epoll()
    epoll.register(0, select.EPOLLIN)
    aloud, looked = False, time.monotonic()
    while True:
        for _ in range(min(200, crowd.at_once - len(here))):
            with contextlib.suppress(OSError):  # too many of us
                one = _Knocker(target, crowd.words(came), crowd, context)
                here[one.sock.fileno()] = one
                epoll.register(one.sock.fileno(), select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
                came += 1
        if not aloud and came >= crowd.at_once:
            aloud = True
            print("here", flush=True)
        ready = [fd for fd, _ in epoll.poll(_SLOW if len(here) >= crowd.at_once else 0.01)]
        if 0 in ready:
            break
        if time.monotonic() - looked > _SLOW:
            ready, looked = list(here), time.monotonic()
        for fd in ready:
            one = here[fd]
            if not one.advance():
                heard = max(heard, one.heard)
                del here[fd]
                one.sock.close()
    heard = max([heard, *(one.heard for one in here.values())])
    print(json.dumps({"came": came, "heard": heard}), flush=True)


# Process 1


@dataclass
class Finding:
    """What one crowd has done to us."""

    name: str
    came: int
    heard: int
    longest: float  # of the calls in flight, seconds
    calls: int
    registered: float  # seconds
    memory: float  # MB more
    files: int  # descriptors more
    threads: int

    def holds(self, alone: float) -> bool:
        """Tell whether all is within bounds.

        Args:
            alone: How long a worker takes to register with nobody else about. Most of that is its
                own start, which a busy machine draws out.
        """
        late = self.registered - alone
        return self.longest <= _CALL and late <= _REGISTERS and self.memory <= _MEMORY


class Caller:
    """Calls a worker without a pause, and notes how long the longest call took."""

    def __init__(self, hpcdist: Any, pid: int) -> None:
        self._hpcdist, self._pid = hpcdist, pid
        self.longest, self.calls = 0.0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Caller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            begin = time.perf_counter()
            self._hpcdist.remotecall_fetch(os.getpid, self._pid)
            self.longest = max(self.longest, time.perf_counter() - begin)
            self.calls += 1


def record(join: dict[str, Any]) -> bytes:
    """Come in as one of ours does, and record what was said."""
    from hpcdist._wire import greeting
    from hpcdist._worker import dialling

    class Recorder:
        said = b""

        def __getattr__(self, name: str) -> Any:
            return getattr(sock, name)

        def sendall(self, data: bytes) -> None:
            self.said += data
            sock.sendall(data)

    sock = dialling.dial(join)
    recorder: Any = Recorder()
    with contextlib.suppress(ConnectionError):
        greeting.dial(recorder, bytes.fromhex(join["cookie"]), {"kind": "nobody"}, _PATIENCE)
    sock.close()
    said: bytes = recorder.said
    return said


@contextlib.contextmanager
def knocking(name: str, told: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Have a crowd knock."""
    argv = [sys.executable, "-m", "benchmarks.strangers", "--crowd", name]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
        assert crowd.stdin is not None
        assert crowd.stdout is not None
        crowd.stdin.write(json.dumps(told) + "\n")
        crowd.stdin.flush()
        assert crowd.stdout.readline() == "here\n"
        yield crowd


def measure(hpcdist: Any, name: str, told: dict[str, Any], pid: int, seconds: float) -> Finding:
    """Let a crowd knock for so long, and a worker register meanwhile."""
    manager = told["manager"]
    told = {key: told[key] for key in ("target", "marker", "recorded", "pems")}
    rss, files = rss_mb(os.getpid()), descriptors()
    most, threads, peak = files, 0, rss
    with Caller(hpcdist, pid) as caller, knocking(name, told) as crowd:
        end = time.monotonic() + seconds
        known = set(hpcdist.workers())
        begin = time.perf_counter()
        worker = subprocess.Popen(["/bin/sh", "-c", "exec " + manager.command])
        registered = _PATIENCE
        while time.monotonic() < end or (
            registered == _PATIENCE and time.perf_counter() - begin < _PATIENCE
        ):
            time.sleep(0.05)
            new = set(hpcdist.workers()) - known
            if new and registered == _PATIENCE:
                registered = time.perf_counter() - begin
            most, peak = max(most, descriptors()), max(peak, rss_mb(os.getpid()))
            threads = max(threads, threading.active_count())
        assert crowd.stdin is not None
        assert crowd.stdout is not None
        crowd.stdin.close()
        told_us = json.loads(crowd.stdout.readline())
    for new_pid in set(hpcdist.workers()) - known:
        hpcdist.rmprocs(new_pid)
    worker.wait(_PATIENCE)
    return Finding(
        name,
        told_us["came"],
        told_us["heard"],
        caller.longest,
        caller.calls,
        registered,
        peak - rss,
        most - files,
        threads,
    )


def other_user() -> str:
    """Dial each socket of ours on this host as somebody else."""
    if os.geteuid() != 0:
        return "not tried: only root can become another user"
    paths = []
    for line in Path("/proc/net/unix").read_text().splitlines():
        path = line.split()[-1]
        if path.startswith("/") and "hpcdist" in path and os.path.exists(path):
            paths.append(path)
    got = 0
    for path in paths:
        child = os.fork()
        if child == 0:
            try:
                os.setgid(_NOBODY)
                os.setuid(_NOBODY)
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with socket.socket(socket.AF_UNIX, kind) as sock:
                        with contextlib.suppress(OSError):
                            sock.connect(path)
                            os._exit(1)
                os._exit(0)
            finally:
                os._exit(2)
        got += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    return f"{len(paths)} sockets of this host, {got} of which let another user in"


def run(seconds: float, only: str | None) -> int:
    """Measure, and print a table; 1 if a bound does not hold."""
    import hpcdist
    from hpcdist._transport import tls

    (local,) = hpcdist.addprocs(1)
    print(other_user())
    manager = hpcdist.ElasticManager(addr="127.0.0.1")
    hpcdist.launch(manager)
    join = json.loads(Path(manager.join_file).read_text())
    with tempfile.TemporaryDirectory() as folder:
        marker = os.path.join(folder, "unpickled")
        told = {
            "target": join["addresses"][0],
            "marker": marker,
            "recorded": record(join).hex(),
            "pems": {"ours": join["tls"], "theirs": tls._make()},
            "manager": manager,
        }
        print(
            f"\n{'':22}{'came':>9}{'heard':>7}{'calls':>9}{'longest':>10}{'registers':>11}", end=""
        )
        print(f"{'memory':>9}{'files':>7}{'threads':>9}  holds")
        bad, alone = 0, _PATIENCE
        for name in crowds("", b""):
            if only in (None, name) or name == NOBODY:
                found = measure(hpcdist, name, told, local, seconds)
                alone = found.registered if name == NOBODY else alone
                bad += not found.holds(alone)
                print(
                    f"{name:22}{found.came:>9,}{found.heard:>5} B{found.calls:>9,}"
                    f"{found.longest * 1e3:>7.0f} ms{found.registered:>9.1f} s"
                    f"{found.memory:>6.1f} MB{found.files:>7}{found.threads:>9}"
                    f"  {'yes' if found.holds(alone) else 'NO'}",
                    flush=True,
                )
        unpickled = os.path.exists(marker)
        print(f"\nunpickled: {'SOMETHING' if unpickled else 'nothing'}")
    hpcdist.shutdown()
    return int(bad > 0 or unpickled)


def main() -> int:
    """Run it in a process whose words are counted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strangers", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="that each crowd stays")
    parser.add_argument("--only", metavar="NAME", help="one crowd alone")
    parser.add_argument("--crowd", help=argparse.SUPPRESS)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.crowd:
        told = json.loads(sys.stdin.readline())
        kinds = crowds(told["marker"], bytes.fromhex(told["recorded"]))
        knock(tuple(told["target"]), kinds[options.crowd], told["pems"])
        return 0
    if options.inner:
        return run(options.seconds, options.only)
    begin = time.monotonic()
    argv = [sys.executable, "-m", "benchmarks.strangers", "--inner", *sys.argv[1:]]
    done = subprocess.run(argv, stderr=subprocess.PIPE, text=True, check=False)
    minutes = (time.monotonic() - begin) / 60
    lines = [line for line in done.stderr.splitlines() if "strangers" in line]
    print(f"lines about strangers: {len(lines)} in {minutes:.1f} minutes")
    print(*lines, sep="\n")
    others = [line for line in done.stderr.splitlines() if line not in lines]
    print(*others, sep="\n", file=sys.stderr)
    return int(done.returncode != 0 or len(lines) > minutes + 1)


if __name__ == "__main__":
    sys.exit(main())
