"""How processes of a cluster come to have links to each other.

A worker dials process 1, and other workers at the first message to them. A worker that cannot reach
another (a socket of another host, a wall between them) has process 1 ask the other to dial, which
goes round by way of process 1 where it cannot do that either.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from hpcdist import _log
from hpcdist._managers import detours
from hpcdist._runtime.controls import CALL_ME, TRUST
from hpcdist._runtime.members import Member
from hpcdist._runtime.node import node
from hpcdist._transport.link import Link
from hpcdist._transport.router import Peer
from hpcdist._wire import greeting
from hpcdist._wire.frames import Buffer

GREETING = 30.0
_REACHING = 20.0
_REACHING_PEER = 5.0  # there are other ways
_STRANGERS = 256  # how many may be in the middle of proving themselves
_QUIET = 60.0  # one line about strangers in so many seconds

cookie: bytes | None = None  # the cluster's, once this process is a worker
own_way: Callable[[Peer, Member], bool] | None = None  # a manager's, tried before the address
_links: list[Link] = []  # extra links: both sides dialled at once


class Unproven:
    """Those who have dialled and have not yet proved that they are ours."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._waiting: OrderedDict[int, socket.socket] = OrderedDict()
        self._last_word = -_QUIET
        self._unsaid = 0

    def enter(self, sock: socket.socket) -> int:
        """Take one in; return the number to give to `leave`.

        Ours are through within a moment: when there are too many, the oldest is a stranger.
        """
        oldest = None
        with self._lock:
            self._waiting[id(sock)] = sock
            if len(self._waiting) > _STRANGERS:
                _, oldest = self._waiting.popitem(last=False)
        if oldest is not None:
            try:
                oldest.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        return id(sock)

    def leave(self, number: int) -> None:
        """One has proved it, or has failed to."""
        with self._lock:
            self._waiting.pop(number, None)

    def refuse(self, exc: Exception) -> None:
        """Tell that one has failed, now and then."""
        with self._lock:
            self._unsaid += 1
            now = time.monotonic()
            if now - self._last_word <= _QUIET:
                return
            self._last_word, count, self._unsaid = now, self._unsaid, 0
        _log.log("warning", f"refused {count} connections of strangers; the last: {exc}")


def listen(path: str) -> socket.socket:
    """Listen on a Unix socket in a private folder."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if len(os.fsencode(path)) > 100:  # sun_path holds 108 bytes
        raise OSError(f"the path of a socket is too long: {path}; set TMPDIR to a shorter one")
    listener.bind(path)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def dial(join: dict[str, Any]) -> Any:
    """Reach process 1 as a join file says."""
    if "tls" in join:
        from hpcdist._transport import network, tls

        tls.adopt(join["tls"])
        targets = [(host, port) for host, port in join["addresses"]]
        return network.dial(targets, tls.dial, _REACHING)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(join["socket"])
    return sock


_unproven = Unproven()


def accept_links(listener: socket.socket, cookie: bytes, *, secure: bool = False) -> None:
    """Accept the links of other workers."""

    def ready(_: int) -> None:
        try:
            sock, _address = listener.accept()
        except OSError:  # it has gone again, or there are too many
            return
        number = _unproven.enter(sock)
        node.turns.background(lambda: _greet(sock, cookie, secure, number))

    node.progress.register(listener.fileno(), ready, 1)


def _greet(sock: Any, cookie: bytes, secure: bool, number: int) -> None:
    try:
        if secure:
            from hpcdist._transport import tls

            sock = tls.accept(sock, GREETING)
        hello = greeting.accept(sock, cookie, GREETING)
        pid = int(hello["pid"])
    except (OSError, ValueError, KeyError) as exc:
        sock.close()
        # One that ends at once got in by another of our addresses.
        if not isinstance(exc, ConnectionResetError) and "EOF" not in str(exc):
            _unproven.refuse(exc)
        return
    finally:
        _unproven.leave(number)
    peer = node.peers.get(pid)
    if peer is None:
        peer = node.peers[pid] = Peer(pid, node.progress)
    adopt(peer, sock)


def adopt(peer: Peer, sock: Any) -> Link:
    link = Link(sock, node.progress, node.deliver, _lost_link)
    link.peer = peer
    if peer.link is None:
        peer.link = link
    else:
        _links.append(link)
    link.begin()
    node.progress.dirty.append(peer)
    node.progress.nudge()
    return link


def reach(peer: Peer) -> None:
    """Dial a worker of another world. Called by the driver, so the dialling is done elsewhere."""
    member = node.members.living.get(peer.pid)
    if member is None:
        return
    peer.reach = None
    node.turns.background(lambda: _dial(peer, member))


def _dial(peer: Peer, member: Member, *, asked: bool = False) -> None:
    if own_way is not None and own_way(peer, member):
        return
    if not member.address or (_is_path(member.address) and member.host != socket.gethostname()):
        _do_without(peer, member, asked)
        return
    try:
        sock = _connect(member.address)
        greeting.dial(sock, _known_cookie(), {"kind": "peer", "pid": node.me}, GREETING)
    except OSError as exc:
        _log.log("info", f"worker {peer.pid} does not answer at {member.address}: {exc}")
        if _is_path(member.address):
            peer.reach = reach  # if it is dead, pid 1 tells; if not, the next message tries again
        else:
            _do_without(peer, member, asked)
        return
    adopt(peer, sock)


def _do_without(peer: Peer, member: Member, asked: bool) -> None:
    """We cannot dial a worker; one that has `asked` for it cannot dial us either."""
    if asked:
        detours.take(peer)
    else:
        _ask_for_a_call(peer, member)


def _ask_for_a_call(peer: Peer, member: Member) -> None:
    """Have a worker dial us that we cannot dial."""
    node.peers[1].control(CALL_ME, 0, pickle.dumps((peer.pid, node.me)))
    node.progress.nudge()

    def look() -> None:
        if peer.alive and peer.link is None:
            _log.log("warning", f"no way to worker {peer.pid} on {member.host} has been found")
            peer.reach = reach

    node.progress.call_later(_REACHING + _REACHING_PEER, look)


@node.control(CALL_ME)
def _on_call_me(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    whom, who = pickle.loads(body)
    other = node.peers.get(who if whom == node.me else whom)
    if other is None or not other.alive:
        return
    if whom != node.me:
        other.control(CALL_ME, 0, bytes(body))
        node.progress.soon()
    else:
        _call_back(other)


def _call_back(peer: Peer) -> None:
    member = node.members.living.get(peer.pid)
    if peer.link is not None:
        detours.take(peer)  # if it is one, it was taken before the other knew us
    elif member is not None:
        peer.reach = None
        node.turns.background(lambda: _dial(peer, member, asked=True))


@node.control(TRUST)
def _on_trust(peer: Peer, ident: int, body: Any, buffers: Sequence[Buffer]) -> None:
    from hpcdist._transport import tls

    tls.adopt(bytes(body).decode())


def _is_path(address: str) -> bool:
    return address.startswith("/")


def _connect(address: str) -> Any:
    if not _is_path(address):
        from hpcdist._transport import network, tls

        return network.dial(network.targets(address), tls.dial, _REACHING_PEER)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(GREETING)
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def _lost_link(link: Link) -> None:
    """A link between workers ended; whether the other is dead, pid 1 tells."""
    if link in _links:
        _links.remove(link)
    elif link.peer.link is link:
        link.peer.link = None
        link.peer.reach = reach


def _known_cookie() -> bytes:
    assert cookie is not None
    return cookie
