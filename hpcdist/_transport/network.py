"""Where processes of other hosts can reach this one, and how we reach them."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Address = tuple[str, int]
T = TypeVar("T")

_SIOCGIFCONF = 0x8912  # linux/sockios.h
_IFREQ = 40  # sizeof(struct ifreq) with 64 bits: a name of 16 bytes, then a sockaddr
_BACKLOG = 1024
_AGAIN = 0.1  # seconds until those that hung up are dialled again
_AGREEING = 5.0  # how long one that says nothing keeps us from the next that has answered


def addresses(interface: str | None = None) -> list[str]:
    """List the addresses of this host that others may reach, or those of one interface.

    Args:
        interface: The name of an interface, or an address of this host.

    Raises:
        ValueError: There is no such interface; it names those there are.
    """
    found = [*_version4(), *_version6()]
    if interface is None:
        routable = [address for _, address in found if not _is_local(address)]
        return routable or [address for _, address in found]
    chosen = [address for name, address in found if interface in (name, address)]
    if not chosen:
        known = ", ".join(f"{name} ({address})" for name, address in found)
        raise ValueError(f"interface={interface!r}: this host has {known}")
    return chosen


def listen(interface: str | None = None, port: int = 0) -> list[socket.socket]:
    """Listen on a port of each address that others may reach.

    Args:
        interface: As for `addresses`.
        port: Which; 0: any.

    Raises:
        OSError: There is no such address, or the port is taken on all of them.
    """
    listeners = []
    refused = ""
    for address in addresses(interface):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        if port:  # one that has just been left may be taken again
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as exc:  # an address that is being taken away, or not yet usable
            refused = f" ({address} port {port}: {exc.strerror})" if port else ""
            listener.close()
            continue
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        listeners.append(listener)
    if not listeners:
        raise OSError(
            f"no address of this host can be listened on{refused}; choose one with interface="
        )
    return listeners


def name(listeners: Sequence[socket.socket]) -> str:
    """Write where to reach these listeners as one word; see `targets`."""
    pairs = [listener.getsockname()[:2] for listener in listeners]
    return ",".join(f"{host}|{port}" for host, port in pairs)


def targets(text: str) -> list[Address]:
    """Read what `name` has written.

    >>> targets("10.0.0.1|4711,fd00::2|4712")
    [('10.0.0.1', 4711), ('fd00::2', 4712)]
    """
    pairs = [part.split("|") for part in text.split(",")]
    return [(host, int(port)) for host, port in pairs]


def dial(
    targets: Sequence[Address], agree: Callable[[socket.socket, float], T], timeout: float
) -> T:
    """Reach one of several addresses of a process; all are tried at once.

    Where the other side hangs up on us (it may have been too busy), all are tried once more, until
    the time is up.

    Args:
        targets: Where it may be reached.
        agree: Makes a connection of a socket that is connected; an OSError means that it was
            somebody else.
        timeout: How long to try, in seconds.

    Raises:
        ConnectionError: None answered; it names each, and what went wrong there.
    """
    deadline = time.monotonic() + timeout
    while True:
        failures: dict[Address, OSError] = {}
        made = _dial_once(targets, agree, deadline, failures)
        if made is not None:
            return made
        hung_up = any(isinstance(exc, ConnectionResetError) for exc in failures.values())
        if not hung_up or time.monotonic() + _AGAIN > deadline:
            break
        time.sleep(_AGAIN)
    tried = "; ".join(
        f"{host} port {port}: {exc.strerror or exc}" for (host, port), exc in failures.items()
    )
    raise ConnectionError(f"none of its addresses answers as it should ({tried or 'none given'})")


def _dial_once(
    targets: Sequence[Address],
    agree: Callable[[socket.socket, float], T],
    deadline: float,
    failures: dict[Address, OSError],
) -> T | None:
    begun = time.monotonic()
    waiting = _connect_all(targets, failures)
    try:
        while waiting and time.monotonic() < deadline:
            for sock in _connected(waiting, deadline):
                target = waiting.pop(sock)
                left = max(1.0, deadline - time.monotonic())
                try:
                    _raise_error(sock)
                    return agree(sock, min(left, _AGREEING) if waiting else left)
                except OSError as exc:
                    sock.close()
                    failures[target] = exc
    finally:
        for sock, target in waiting.items():
            sock.close()
            failures[target] = TimeoutError(f"no answer within {deadline - begun:.0f} s")
    return None


def _connect_all(
    targets: Sequence[Address], failures: dict[Address, OSError]
) -> dict[socket.socket, Address]:
    waiting = {}
    for host, port in targets:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            status = sock.connect_ex((host, port))
        except OSError as exc:
            status = exc.errno or errno.EINVAL
        if status in (0, errno.EINPROGRESS):
            waiting[sock] = (host, port)
        else:
            sock.close()
            failures[host, port] = OSError(status, os.strerror(status))
    return waiting


def _connected(waiting: dict[socket.socket, Address], deadline: float) -> list[socket.socket]:
    """Wait until some are connected, or have failed to; none if the time is up."""
    poll = select.poll()  # select() knows no descriptor above 1023
    for sock in waiting:
        poll.register(sock, select.POLLOUT)
    ready = {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
    return [sock for sock in waiting if sock.fileno() in ready]


def _raise_error(sock: socket.socket) -> None:
    status = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if status:
        raise OSError(status, os.strerror(status))


def _version4() -> list[tuple[str, str]]:
    room = array.array("B", bytes(256 * _IFREQ))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("iL", len(room), room.buffer_info()[0])
        size = struct.unpack("iL", fcntl.ioctl(sock.fileno(), _SIOCGIFCONF, request))[0]
    data = room.tobytes()
    entries = [data[start : start + _IFREQ] for start in range(0, size, _IFREQ)]
    return [(e[:16].split(b"\0")[0].decode(), socket.inet_ntoa(e[20:24])) for e in entries]


def _version6() -> list[tuple[str, str]]:
    try:
        with open("/proc/net/if_inet6") as file:  # proc(5)
            lines = [line.split() for line in file]
    except OSError:
        return []
    import ipaddress  # 2 ms: not at start-up

    found = [(row[5], str(ipaddress.IPv6Address(int(row[0], 16)))) for row in lines]
    return [(name, address) for name, address in found if not _is_link_local(address)]


def _is_local(address: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(address).is_loopback


def _is_link_local(address: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(address).is_link_local
