"""TLS between hosts: who gets in, who does not, and that a connection bears rough use."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hpcdist._transport import tls

TIMEOUT = 10.0
Pair = tuple[tls.Secure, tls.Secure]


@pytest.fixture(autouse=True)
def own_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_ours", tls.Certificate())


def sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection: who accepted, who dialled."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    return accepted, dialled


def accept(sock: socket.socket, timeout: float) -> tls.Secure:
    """Agree on TLS with whoever dialled, waiting for it."""
    secure = tls.begin(sock)
    secure.settimeout(timeout)
    try:
        secure.shake()
    except OSError:
        secure.close()
        raise
    return secure


@pytest.fixture
def pair() -> Iterator[Pair]:
    accepted, dialled = sockets()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(accept, accepted, TIMEOUT)
        near = tls.dial(dialled, TIMEOUT)
        far = other.result(TIMEOUT)
    yield near, far
    near.close()
    far.close()


def receive(end: tls.Secure, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = end.recv(size - len(data))
        if not part:
            break
        data += part
    return bytes(data)


def refused(stranger: Callable[[socket.socket], object]) -> OSError:
    """Let somebody dial; return with what error he was turned away."""
    accepted, dialled = sockets()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(accept, accepted, 2.0)
        with dialled:
            try:
                stranger(dialled)
            except OSError:
                pass  # he may hear of it, or not
            with pytest.raises(OSError) as caught:
                other.result(TIMEOUT)
    assert accepted.fileno() == -1, "the socket of a stranger stays open"
    return caught.value


def test_both_ends_know_each_other_and_speak_tls_13(pair: Pair) -> None:
    near, far = pair
    near.sendall(b"hello")
    assert receive(far, 5) == b"hello"
    far.sendall(b"you")
    assert receive(near, 3) == b"you"
    assert near._sock.version() == far._sock.version() == "TLSv1.3"
    assert near._sock.getpeercert(True) == far._sock.getpeercert(True)


def test_the_key_is_in_no_file(pair: Pair) -> None:
    left = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _open(fd)]
    assert not [name for name in left if "hpcdist-key" in name]


def _open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def _client(**changes: object) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for name, value in changes.items():
        setattr(context, name, value)
    return context


def test_one_without_a_certificate_is_turned_away() -> None:
    def stranger(sock: socket.socket) -> None:
        with _client().wrap_socket(sock) as wrapped:
            wrapped.sendall(b"x" * 100)
            wrapped.recv(1)

    assert isinstance(refused(stranger), ssl.SSLError)


def test_one_with_a_certificate_of_his_own_is_turned_away(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.path.join(tmp_path, "own.pem")
    with open(path, "w") as file:
        file.write(tls._make())  # the same name, another key
    context = _client()
    context.load_cert_chain(path)

    def stranger(sock: socket.socket) -> None:
        with context.wrap_socket(sock) as wrapped:
            wrapped.sendall(b"x" * 100)
            wrapped.recv(1)

    assert isinstance(refused(stranger), ssl.SSLError)


def test_an_older_protocol_is_turned_away() -> None:
    context = _client(maximum_version=ssl.TLSVersion.TLSv1_2)
    assert isinstance(refused(context.wrap_socket), ssl.SSLError)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.0\r\n\r\n", b"hpcdist1" * 40, bytes(4096)])
def test_one_who_speaks_something_else_is_turned_away(words: bytes) -> None:
    def stranger(sock: socket.socket) -> None:
        sock.sendall(words)
        sock.recv(1)

    refused(stranger)


def test_one_who_says_nothing_is_turned_away_in_time() -> None:
    assert isinstance(refused(lambda sock: sock.recv(1)), TimeoutError)


def test_one_who_dribbles_is_turned_away_in_time() -> None:
    def stranger(sock: socket.socket) -> None:
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
        for byte in hello:
            sock.sendall(bytes([byte]))
            if select.select([sock], [], [], 0.2)[0]:
                return

    refused(stranger)


def test_one_who_answers_where_we_dial_is_not_believed(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "own.pem")
    with open(path, "w") as file:
        file.write(tls._make())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    accepted, dialled = sockets()

    def answer() -> None:
        try:
            context.wrap_socket(accepted, server_side=True).close()
        except OSError:
            accepted.close()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(answer)
        with pytest.raises(ssl.SSLCertVerificationError):
            tls.dial(dialled, TIMEOUT)
        other.result(TIMEOUT)
    assert dialled.fileno() == -1


def test_the_kernel_watches_over_the_way(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(end: tls.Secure, option: int) -> int:
        return end._sock.getsockopt(socket.IPPROTO_TCP, option)

    for end in pair:
        assert end._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, every, count = (
            told(end, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + every * count <= 12, "silence is noticed within heartbeat_limit, about"
        assert told(end, socket.TCP_USER_TIMEOUT) == 10_000


# As a link uses it: nothing blocks


def test_what_would_block_says_so_as_a_plain_socket_does(pair: Pair) -> None:
    near, _ = pair
    near.setblocking(False)
    with pytest.raises(BlockingIOError):
        near.recv(10)
    with pytest.raises(BlockingIOError):
        near.recv_into(bytearray(10))
    with pytest.raises(BlockingIOError):
        while True:
            near.send(bytes(1 << 16))


def test_much_goes_both_ways_at_once_without_blocking(pair: Pair) -> None:
    size = 24 << 20
    block = os.urandom(1 << 20)
    data = block * (size >> 20)
    got: list[str] = []

    def shovel(end: tls.Secure) -> None:
        end.setblocking(False)
        todo = [memoryview(data[:7]), memoryview(data[7:100]), memoryview(data[100:])]
        seen, digest = 0, hashlib.sha256()
        while todo or seen < size:
            wanted = select.POLLIN | (select.POLLOUT if todo else 0)
            poll = select.poll()
            poll.register(end.fileno(), wanted)
            poll.poll(1000 if not end.pending() else 0)
            try:
                sent = end.sendmsg(todo) if todo else 0
                while todo and sent >= todo[0].nbytes:
                    sent -= todo.pop(0).nbytes
                if sent:
                    todo[0] = todo[0][sent:]
            except BlockingIOError:
                pass
            try:
                part = end.recv(1 << 20)
                seen += len(part)
                digest.update(part)
            except BlockingIOError:
                pass
        got.append(digest.hexdigest())

    threads = [threading.Thread(target=shovel, args=(end,)) for end in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert got == [hashlib.sha256(data).hexdigest()] * 2


def test_several_threads_send_while_one_receives(pair: Pair) -> None:
    """As pid 1 does with a keeper: many threads tell of registrations while its words are read."""
    near, far = pair
    word, each, senders = b"0123456789abcdef" * 8, 1500, 4
    heard, stop = bytearray(), threading.Event()

    def keeper() -> None:
        far.setblocking(False)
        while len(heard) < each * senders * len(word):
            select.select([far.fileno()], [], [], 0.0)
            for act in (lambda: far.send(b"z" * 512), lambda: heard.extend(far.recv(1 << 16))):
                try:
                    act()
                except BlockingIOError:
                    pass

    def listen() -> None:
        while not stop.is_set():
            if select.select([near.fileno()], [], [], 0.05)[0]:
                near.recv(1 << 16)

    def talk() -> None:
        for _ in range(each):
            near.sendall(word)

    with ThreadPoolExecutor(6) as pool:
        tasks = [pool.submit(keeper), *(pool.submit(talk) for _ in range(senders))]
        listener = pool.submit(listen)
        try:
            for task in tasks:
                task.result(40)
        finally:
            stop.set()
        listener.result(TIMEOUT)
    assert heard == word * (each * senders)


def test_a_forked_child_lets_go_without_a_word(pair: Pair) -> None:
    near, far = pair
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(near.detach())  # as a child of a process with links does
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    near.sendall(b"still here")
    assert receive(far, 10) == b"still here"
