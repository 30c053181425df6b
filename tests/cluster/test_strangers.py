"""Those who dial and are not ours: they hold no thread, few descriptors, and nobody up."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcdist._runtime.node import Node
from hpcdist._transport import network, tls
from hpcdist._wire import greeting
from hpcdist._worker import dialling, strangers
from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi

COOKIE = b"0123456789abcdef"
TIMEOUT = 20.0
Greeted = list[tuple[Any, dict[str, Any]]]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """A process with its own certificate, in which no more than four may be unproven."""
    node = Node()
    node.start()
    monkeypatch.setattr(tls, "_ours", tls.Certificate())
    monkeypatch.setattr(strangers, "_MOST", 4)
    yield node
    node.progress.stop()


@pytest.fixture
def opened(few: Node) -> Iterator[Callable[..., Greeted]]:
    """`opened(listener, secure)`: open an entrance; return the list of those who came in by it."""
    with contextlib.ExitStack() as stack:

        def make(listener: socket.socket, secure: bool) -> Greeted:
            came: Greeted = []
            entrance = strangers.Entrance(
                few, listener, COOKIE, lambda sock, hello: came.append((sock, hello)), secure=secure
            )
            stack.callback(lambda: [sock.close() for sock, _ in came])
            stack.callback(entrance.close)
            return came

        yield make
    eventually(lambda: not few.service(strangers.Strangers)._here, TIMEOUT)


@pytest.fixture
def silent() -> Iterator[Callable[..., list[socket.socket]]]:
    """`silent(target, n, source)`: n that dial from an address and say half a greeting."""
    with contextlib.ExitStack() as stack:

        def dial(target: Any, n: int, source: str = "127.0.0.1") -> list[socket.socket]:
            made = []
            for _ in range(n):
                sock = socket.create_connection(target, TIMEOUT, source_address=(source, 0))
                sock.sendall(b"\x16\x03\x01")  # how TLS begins
                sock.setblocking(False)
                made.append(stack.enter_context(sock))
            return made

        yield dial


def listening() -> socket.socket:
    (listener,) = network.listen("127.0.0.1")
    return listener


def come(target: Any) -> tls.Secure:
    """Dial as a worker does."""
    secure = network.dial([target], tls.dial, TIMEOUT)
    greeting.dial(secure, COOKIE, {"pid": 7}, TIMEOUT)
    return secure


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(64) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_half_greetings_hold_no_thread_and_nobody_up(
    few: Node, opened: Callable[..., Greeted], silent: Callable[..., list[socket.socket]]
) -> None:
    listener = listening()
    target = listener.getsockname()
    came = opened(listener, True)
    before = threading.active_count()
    crowd = silent(target, 40)
    mine = come(target)
    eventually(lambda: came, TIMEOUT)
    assert came[0][1] == {"pid": 7}
    assert len(few.service(strangers.Strangers)._here) <= 5  # and one on its way out
    assert threading.active_count() <= before + 2  # theirs, and the one that welcomes
    eventually(lambda: sum(map(hung_up, crowd)) >= 30, TIMEOUT)
    mine.close()
    for sock in crowd:
        sock.close()


def test_those_of_the_most_crowded_address_go_first(
    opened: Callable[..., Greeted], silent: Callable[..., list[socket.socket]]
) -> None:
    listener = listening()
    opened(listener, True)
    (alone,) = silent(listener.getsockname(), 1, "127.0.0.2")
    crowd = silent(listener.getsockname(), 20, "127.0.0.3")
    eventually(lambda: sum(map(hung_up, crowd)) == 17, TIMEOUT)
    assert not hung_up(alone)
    for sock in [alone, *crowd]:
        sock.close()


def test_many_of_ours_at_once_all_come_in(opened: Callable[..., Greeted]) -> None:
    listener = listening()
    target = listener.getsockname()
    came = opened(listener, True)
    made: list[tls.Secure] = []
    threads = [threading.Thread(target=lambda: made.append(come(target))) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    eventually(lambda: len(came) == 24, TIMEOUT)
    for secure in made:
        secure.close()


def test_without_descriptors_the_silent_go_and_ours_come_in(
    few: Node,
    opened: Callable[..., Greeted],
    silent: Callable[..., list[socket.socket]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strangers, "_most", lambda: 1000)
    listener = listening()
    target = listener.getsockname()
    came = opened(listener, True)
    crowd = silent(target, 8)
    eventually(lambda: len(few.service(strangers.Strangers)._here) == 8, TIMEOUT)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    ours = socket.socket()
    ours.settimeout(TIMEOUT)
    last = max(map(int, os.listdir("/proc/self/fd")))
    gaps = [os.dup(0)]  # where other tests have closed something
    while gaps[-1] < last:
        gaps.append(os.dup(0))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (gaps[-1] + 1, hard))
        ours.connect(target)  # not accepted before there is room
        eventually(lambda: any(map(hung_up, crowd)), TIMEOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in gaps:
            os.close(fd)
    secure = tls.dial(ours, TIMEOUT)
    greeting.dial(secure, COOKIE, {"pid": 7}, TIMEOUT)
    eventually(lambda: came, TIMEOUT)
    secure.close()
    for sock in crowd:
        sock.close()


def test_a_greeting_in_single_bytes_is_one(opened: Callable[..., Greeted], tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    came = opened(dialling.listen(path), False)

    class Slow(socket.socket):
        def sendall(self, data: Any, *_: Any) -> None:
            for byte in bytes(data):
                super().sendall(bytes([byte]))

    with Slow(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        greeting.dial(sock, COOKIE, {"pid": 7}, TIMEOUT)
        eventually(lambda: came, TIMEOUT)
        assert came[0][1] == {"pid": 7}


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.0\r\n\r\n", b"hpcdist1" + bytes(48)])
def test_a_stranger_is_hung_up_on(
    words: bytes, opened: Callable[..., Greeted], tmp_path: Path
) -> None:
    path = str(tmp_path / "sock")
    came = opened(dialling.listen(path), False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        sock.sendall(words)
        sock.shutdown(socket.SHUT_WR)
        assert len(sock.recv(4096)) == 24  # a challenge
        eventually(lambda: hung_up(sock))
    assert not came


class Marks:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_recorded_greeting_opens_nothing(opened: Callable[..., Greeted], tmp_path: Path) -> None:
    path, folder = str(tmp_path / "sock"), tmp_path / "unpickled"
    came = opened(dialling.listen(path), False)
    said = b""

    class Recorder(socket.socket):
        def sendall(self, data: Any, *_: Any) -> None:
            nonlocal said
            said += bytes(data)
            super().sendall(data)

    with Recorder(socket.AF_UNIX, socket.SOCK_STREAM) as ours:
        ours.connect(path)
        greeting.dial(ours, COOKIE, {"pid": 7}, TIMEOUT)
        eventually(lambda: came, TIMEOUT)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        sock.sendall(said + pickle.dumps(Marks(folder)))
        assert len(sock.recv(4096)) == 24  # a challenge, and another one than that
        eventually(lambda: hung_up(sock))
    assert len(came) == 1
    assert not folder.exists()


def test_many_strangers_are_told_of_in_one_line(
    few: Node,
    opened: Callable[..., Greeted],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(strangers, "_QUIET", 1e6)
    monkeypatch.setattr(strangers._log, "log", lambda level, text: lines.append(text))
    path = str(tmp_path / "sock")
    opened(dialling.listen(path), False)
    few.service(strangers.Strangers)._last_word = -1e9  # the process may have just begun
    for _ in range(8):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(path)
            sock.sendall(bytes(56))
            eventually(lambda sock=sock: hung_up(sock))
    eventually(lambda: few.service(strangers.Strangers)._unsaid == 7, TIMEOUT)
    assert len(lines) == 1
    assert "refused 1 connections of strangers" in lines[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_s_process_is_not_spoken_to(
    opened: Callable[..., Greeted], tmp_path: Path
) -> None:
    folder = Path("/tmp") / f"hpcdist-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    path = str(folder / "sock")
    try:
        opened(dialling.listen(path), False)
        os.chmod(path, 0o777)
        heard, tells = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setuid(65534)
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                    sock.connect(path)
                    sock.settimeout(TIMEOUT)
                    os.write(tells, b"heard " + sock.recv(64))
            except ConnectionError:
                os.write(tells, b"heard ")
            finally:
                os._exit(0)
        os.close(tells)
        with open(heard, "rb") as file:
            assert file.read() == b"heard "
        os.waitpid(child, 0)
    finally:
        os.unlink(path)
        folder.rmdir()


A_THOUSAND = '''
import json, os, resource, subprocess, sys, threading
import hpcdist
from hpcdist import ElasticManager

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
manager = ElasticManager(addr="127.0.0.1")
hpcdist.addprocs(manager)
with open(manager.join_file) as file:
    targets = json.load(file)["addresses"]
CROWD = """
import json, socket, sys
crowd = []
for k in range(1000):
    sock = socket.create_connection(tuple(json.loads(sys.argv[1])[0]), 20)
    sock.sendall(b"\\\\x16\\\\x03\\\\x01"[: k % 4])
    crowd.append(sock)
print("here", flush=True)
sys.stdin.read()
"""
crowd = subprocess.Popen(
    [sys.executable, "-c", CROWD, json.dumps(targets)],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard)),
)
assert crowd.stdout.readline() == "here\\n"
worker = subprocess.Popen(manager.command, shell=True)
pids = hpcdist.launch(manager).wait(1, timeout=40)
threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
print(hpcdist.remotecall_fetch(lambda: "in", pids[0]), threads < 20, fds < 400)
hpcdist.shutdown()
crowd.communicate("")
worker.wait()
'''


def test_a_thousand_half_greetings_cost_little(script: Callable[..., Any]) -> None:
    done = script(A_THOUSAND)
    assert done.out.splitlines()[-1] == "in True True", done.out + done.err
