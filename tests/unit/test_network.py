"""Addresses, and how one of several is found that answers."""

from __future__ import annotations

import gc
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdist._transport import network
from hpcdist._worker import dialling
from tests.helpers import eventually, patient

HELLO = b"it is me"


@pytest.fixture
def ours() -> Iterator[socket.socket]:
    """Somebody who answers as we do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    break
                with sock:
                    sock.sendall(HELLO)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Somebody who takes every connection and never says a word."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        yield listener


def agree(sock: socket.socket, timeout: float) -> socket.socket:
    sock.settimeout(timeout)
    said = sock.recv(len(HELLO))
    if said != HELLO:
        raise ConnectionError("somebody else")
    return sock


def nobody() -> network.Address:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()


def target(listener: socket.socket) -> network.Address:
    return listener.getsockname()[:2]


def test_loopback_is_no_address_for_others() -> None:
    every = [*network._version4(), *network._version6()]
    assert ("lo", "127.0.0.1") in every
    routable = network.addresses()
    if any(name != "lo" for name, _ in every):
        assert "127.0.0.1" not in routable
        assert "::1" not in routable


def test_an_interface_is_chosen_by_its_name_or_address() -> None:
    assert "127.0.0.1" in network.addresses("lo")
    assert network.addresses("127.0.0.1") == ["127.0.0.1"]


def test_an_unknown_interface_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"interface='ib7': this host has .*lo \(127\.0\.0\.1\)"):
        network.addresses("ib7")


def test_listeners_are_told_and_read_as_one_word() -> None:
    listeners = network.listen("lo")
    try:
        assert network.targets(network.name(listeners)) == [target(each) for each in listeners]
        assert not any(os.get_inheritable(each.fileno()) for each in listeners)
    finally:
        for listener in listeners:
            listener.close()


def test_an_address_that_cannot_be_listened_on_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "addresses", lambda _=None: ["192.0.2.1", "127.0.0.1"])
    (listener,) = network.listen()
    with listener:
        assert target(listener)[0] == "127.0.0.1"
    monkeypatch.setattr(network, "addresses", lambda _=None: ["192.0.2.1"])
    with pytest.raises(OSError, match="choose one with interface="):
        network.listen()


def test_the_one_that_answers_is_found_among_others(ours: socket.socket) -> None:
    sock = network.dial([nobody(), nobody(), target(ours)], agree, 5.0)
    with sock:
        assert sock.getpeername() == target(ours)


def test_one_that_accepts_and_says_nothing_holds_nobody_up(
    silent: socket.socket, ours: socket.socket
) -> None:
    """Another service, or a firewall that answers for everybody."""
    begin = time.monotonic()
    with network.dial([target(silent), target(ours)], agree, 20.0) as sock:
        assert sock.getpeername() == target(ours)
    assert time.monotonic() - begin < patient(8.0)


def test_every_failure_is_named(silent: socket.socket) -> None:
    refused = nobody()
    begin = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        network.dial([refused, target(silent)], agree, 1.0)
    assert time.monotonic() - begin < patient(3.0)
    told = str(caught.value)
    assert f"127.0.0.1 port {refused[1]}: Connection refused" in told
    assert f"127.0.0.2 port {target(silent)[1]}: timed out" in told


def test_silence_is_told_with_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    # 192.0.2.0/24 is for documentation (RFC 5737): nobody answers, or nobody can be reached.
    with pytest.raises(ConnectionError, match=r"192\.0\.2\.1 port 9: "):
        network.dial([("192.0.2.1", 9)], agree, 0.3)
    with pytest.raises(ConnectionError, match="none given"):
        network.dial([], agree, 0.3)


def test_a_process_with_many_descriptors_can_dial(ours: socket.socket) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("not as many descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held: list[int] = []
    try:
        while not held or held[-1] < 1030:
            held.append(os.open(os.devnull, os.O_RDONLY))
        network.dial([target(ours)], agree, 5.0).close()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_socket_is_left_open(ours: socket.socket, silent: socket.socket) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    network.dial([nobody(), target(silent), target(ours)], agree, 8.0).close()
    with pytest.raises(ConnectionError):
        network.dial([nobody(), target(silent)], agree, 0.3)
    eventually(lambda: count() == before)


def test_a_socket_that_cannot_be_used_is_closed(tmp_path: Path) -> None:
    """The folder of a world that ends as it begins is gone. pytest fails at what is unclosed."""
    gone = f"{tmp_path}/gone/sock"
    with pytest.raises(FileNotFoundError):
        dialling.listen(gone)
    with pytest.raises(FileNotFoundError):
        dialling.dial({"socket": gone})
    gc.collect()
