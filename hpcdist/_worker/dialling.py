"""How processes of a cluster come to have links to each other.

A worker dials process 1, and other workers at the first message to them. A worker that cannot reach
another (a socket of another host, a wall between them) has process 1 ask the other to dial, which
goes round by way of process 1 where it cannot do that either.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from hpcdist import _log
from hpcdist._runtime.node import Mail, Node, Service, on
from hpcdist._transport.contracts import Way
from hpcdist._transport.link import Link
from hpcdist._transport.router import Peer
from hpcdist._wire import greeting
from hpcdist._wire.greeting import Hello, Socket
from hpcdist._wire.member import Member
from hpcdist._wire.messages import CallMe, Trust
from hpcdist._worker.relay import Relay
from hpcdist._worker.strangers import Entrance

GREETING = 30.0
_REACHING = 20.0
_REACHING_PEER = 5.0  # there are other ways


def listen(path: str) -> socket.socket:
    """Listen on a Unix socket in a private folder."""
    if len(os.fsencode(path)) > 100:  # sun_path holds 108 bytes
        raise OSError(f"the path of a socket is too long: {path}; set TMPDIR to a shorter one")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(128)
        listener.setblocking(False)
    except BaseException:  # a folder that is gone, for one
        listener.close()
        raise
    return listener


def dial(join: dict[str, Any], folder: str = "") -> Socket:
    """Reach process 1 as a join file says.

    Args:
        folder: Where that lies; in a job, process 1 sees it too.
    """
    if "tls" in join:
        from hpcdist._transport import doors, network, tls

        tls.adopt(join["tls"])
        targets = [(host, port) for host, port in join["addresses"]]
        if join.get("doors"):
            return doors.reach(targets, tls.dial, _REACHING, folder)
        return network.dial(targets, tls.dial, _REACHING)
    return _at_path(join["socket"])


class Links(Service):
    """The links between this process and workers, but for those that the workers' worlds know."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.cookie: bytes | None = None  # the cluster's, once this process is a worker
        self.own_way: Callable[[Peer, Member], bool] | None = None  # tried before the address
        self._extra: list[Way] = []  # where both sides dialled at once
        self._relay = node.service(Relay)

    def accept(self, listener: socket.socket, cookie: bytes, *, secure: bool = False) -> None:
        """Accept the links of other workers."""
        Entrance(self.node, listener, cookie, self._meet, secure=secure)

    def _meet(self, sock: Socket, hello: Hello) -> None:
        try:
            pid = int(hello["pid"])
        except (ValueError, KeyError, TypeError) as exc:
            _log.log("warning", f"refused a link that does not name its worker: {exc!r}")
            sock.close()
            return
        if pid in self.node.members.gone:  # a greeting that its end has overtaken
            sock.close()
            return
        self.adopt(self.known(pid), sock)

    def known(self, pid: int) -> Peer:
        """Return a worker, of which process 1 may not have told us yet."""
        peer = self.node.peers.get(pid)
        if peer is None:
            peer = self.node.peers[pid] = Peer(pid, self.node.progress)
        return peer

    def adopt(self, peer: Peer, sock: Socket) -> Link:
        link = Link(sock, self.node.progress, self.node.deliver, self.lost)
        self.take(peer, link)
        return link

    def take(self, peer: Peer, link: Way) -> None:
        """Use a link to a worker from now on."""
        link.peer = peer
        if peer.link is None:
            peer.link = link
        else:
            self._extra.append(link)
        link.begin()
        self.node.progress.dirty.append(peer)
        self.node.progress.nudge()

    def reach(self, peer: Peer) -> None:
        """Dial a worker of another world: on another thread, as the driver calls this."""
        member = self.node.members.living.get(peer.pid)
        if member is None:
            return
        peer.reach = None
        self.node.turns.background(lambda: self._dial(peer, member))

    def _dial(self, peer: Peer, member: Member, *, asked: bool = False) -> None:
        if self.own_way is not None and self.own_way(peer, member):
            return
        if not member.address or (_is_path(member.address) and member.host != socket.gethostname()):
            self._do_without(peer, member, asked)
            return
        try:
            sock = _connect(member.address)
            greeting.dial(
                sock, self._known_cookie(), {"kind": "peer", "pid": self.node.me}, GREETING
            )
        except OSError as exc:
            _log.log("info", f"worker {peer.pid} does not answer at {member.address}: {exc}")
            if _is_path(member.address):
                peer.reach = (
                    self.reach
                )  # if it is dead, pid 1 tells; if not, the next message tries again
            else:
                self._do_without(peer, member, asked)
            return
        self.adopt(peer, sock)

    def _do_without(self, peer: Peer, member: Member, asked: bool) -> None:
        """Ask a worker that we cannot dial to dial us; if it `asked` us to, use the relay."""
        if asked:
            self._relay.take(peer)
        else:
            self._ask_for_a_call(peer, member)

    def _ask_for_a_call(self, peer: Peer, member: Member) -> None:
        """Have a worker dial us that we cannot dial."""
        self.node.peers[1].send(CallMe(peer.pid, self.node.me))
        self.node.progress.nudge()

        def look() -> None:
            if peer.alive and peer.link is None:
                _log.log("warning", f"no way to worker {peer.pid} on {member.host} has been found")
                peer.reach = self.reach

        self.node.progress.call_later(_REACHING + _REACHING_PEER, look)

    @on(CallMe)
    def _on_call_me(self, said: CallMe, mail: Mail) -> None:
        other = self.node.peers.get(said.who if said.whom == self.node.me else said.whom)
        if other is None or not other.alive:
            return
        if said.whom != self.node.me:
            other.send(said)
            self.node.progress.soon()
        else:
            self._call_back(other)

    def _call_back(self, peer: Peer) -> None:
        member = self.node.members.living.get(peer.pid)
        if peer.link is not None:
            self._relay.take(peer)  # if it is one, it was taken before the other knew us
        elif member is not None:
            peer.reach = None
            self.node.turns.background(lambda: self._dial(peer, member, asked=True))

    @on(Trust)
    def _on_trust(self, said: Trust, mail: Mail) -> None:
        from hpcdist._transport import tls

        tls.adopt(said.certificate)

    def lost(self, link: Way) -> None:
        """Note that a link between workers ended; pid 1 says whether the other is dead."""
        if link in self._extra:
            self._extra.remove(link)
        elif link.peer.link is link:
            link.peer.link = None
            link.peer.reach = self.reach

    def _known_cookie(self) -> bytes:
        assert self.cookie is not None
        return self.cookie


def _is_path(address: str) -> bool:
    return address.startswith("/")


def _connect(address: str) -> Socket:
    if not _is_path(address):
        from hpcdist._transport import network, tls

        return network.dial(network.targets(address), tls.dial, _REACHING_PEER)
    return _at_path(address, GREETING)


def _at_path(path: str, timeout: float | None = None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock
