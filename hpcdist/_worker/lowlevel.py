"""The low-level part: for managers that start workers, or carry messages, in a way of their own.

On pid 1 `manager.connect(pid, config)` returns a pair of streams. On the worker the program that
has the other end of them says who it is by `init_worker(cookie, manager)` and hands them to
`process_messages`. Pid 1 dials and the worker accepts, with the greeting of any other link; then
the worker says what pid 1 has to know of it.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from typing import Any, NoReturn

from hpcdist import _log
from hpcdist._contract.managers import ClusterManager, WorkerConfig
from hpcdist._contract.secret import Secret, pad
from hpcdist._monitor import output
from hpcdist._numbers import whole
from hpcdist._public import public
from hpcdist._runtime.node import Mail, Node, Service, here
from hpcdist._transport.contracts import Slot
from hpcdist._transport.link import Link
from hpcdist._transport.router import Peer
from hpcdist._wire import greeting
from hpcdist._wire.member import Member
from hpcdist._wire.messages import Leave, Welcome
from hpcdist._worker import worker
from hpcdist._worker.dialling import Links, listen
from hpcdist._worker.streams import Streams

_GREETING = 30.0
_WAITING = "this process has called init_worker() and is in no cluster yet"


@public
def start_worker(join: Any, *, stdin: Any = None) -> NoReturn:
    """Work for the launch that a join file describes. Never returns.

    Args:
        join: The path of the join file; None or "-" where its contents come by `stdin`.
        stdin: A file, or a text, with the contents of the join file; `sys.stdin` by default.
    """
    if stdin is None and join not in (None, "-"):
        worker.work(os.fspath(join))
    source = sys.stdin if stdin is None else stdin
    text = source if isinstance(source, str | bytes) else source.read()
    # What is read once, as a file is: it is in memory alone, and so the secret stays off the disk.
    fd = os.memfd_create("hpcdist-join")
    os.fchmod(fd, 0o600)
    os.write(fd, text.encode() if isinstance(text, str) else text)
    worker.work(f"/proc/self/fd/{fd}")


@public
def cluster_cookie(cookie: str | None = None, /) -> str:
    """Return the cluster's cookie of 16 characters, or set it before the first worker.

    Args:
        cookie: At most 16 ASCII characters; a shorter one is filled up with blanks.

    Raises:
        ValueError: It is too long, or not ASCII.
        RuntimeError: Workers have been started already.

    Example:
        >>> import hpcdist
        >>> len(hpcdist.cluster_cookie())
        16
    """
    node, guests = here.node, Guests.here()
    if guests.guest is None:
        node.admit()
    known, secret = node.service(Links).cookie, node.service(Secret)
    if node.me != 1 and known is not None:
        secret.adopt(known)
    return secret.cookie() if cookie is None else secret.choose(cookie)


@public
def init_worker(cookie: str, manager: ClusterManager | None = None) -> None:
    """Make this process a worker to be, which `process_messages` connects to its cluster.

    Args:
        cookie: The cluster's, as `cluster_cookie()` says on pid 1.
        manager: Where workers reach each other by its transport: its `connect` is called here with
            a config of `host`, `port` and `ident`. Without it they use sockets of their host.
    """
    node, guests = here.node, Guests.here()
    there = guests.guest is not None or node.turns.serving or node.me != 1
    if there or node.members.living:
        raise RuntimeError("this process is part of a cluster already")
    node.service(Secret).adopt(pad(cookie).encode("ascii"))
    node.refusal = _WAITING
    guests.guest = _Guest(node, manager)


@public
def process_messages(reader: object, writer: object, incoming: bool = True) -> threading.Thread:
    """Take the messages of another process from `reader` and send ours through `writer`.

    Args:
        reader: A socket, a pipe, a binary file: what has `recv` or `read`.
        writer: What has `sendall` or `write`.
        incoming: Whether the other side made the connection; that side greets first.

    Returns:
        The thread that does so. It ends with the connection. A worker that `join`s it on its
        main thread runs its calls there.
    """
    guests = Guests.here()
    if guests.guest is None and not guests.node.turns.serving:
        raise RuntimeError("call init_worker(cookie) first: this process is no worker")
    guests.node.start()
    thread = _Messages(guests, Streams.here().attach(reader, writer), incoming)
    thread.start()
    return thread


@public
def worker_id_from_socket(x: object) -> int:
    """Return the pid at the other end of a link, a socket, a stream or a descriptor; -1: unknown.

    Example:
        >>> import hpcdist, io
        >>> hpcdist.worker_id_from_socket(io.BytesIO())
        1
    """
    node = here.node
    if node.service(Guests).guest is None:
        node.admit()
    if isinstance(x, io.BytesIO | io.StringIO):
        return node.me
    return node.service(Streams).pid_behind(x)


class Guests(Service):
    """Connections that managers, or programs, of the user's own have made."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.guest: _Guest | None = None  # this process, once it is a worker to be
        self._links = node.service(Links)
        self._secret = node.service(Secret)

    def dial(self, pid: int | None, sock: socket.socket) -> Link:
        """Greet the process at the other end, which is to be `pid` if that is known."""
        mine = {"kind": "peer", "pid": self.node.me}
        greeting.dial(sock, self._cookie(), mine, _GREETING)
        found = int(greeting.receive_hello(sock)["pid"])
        if pid not in (None, found):
            raise ValueError(f"worker {found} answered in place of worker {pid}")
        return self._adopt(found, sock)

    def accept(self, sock: socket.socket) -> Link:
        """Be greeted by the process at the other end."""
        hello = greeting.accept(sock, self._cookie(), _GREETING)
        if hello["kind"] == "master":
            if self.guest is None:
                raise ValueError("this process already has a pid 1")
            return self.guest.become(sock, hello)
        greeting.send_hello(sock, {"pid": self.node.me})
        return self._adopt(int(hello["pid"]), sock)

    def _adopt(self, pid: int, sock: socket.socket) -> Link:
        peers = self.node.peers
        peer = peers.get(pid)
        if peer is None:
            peer = peers[pid] = Peer(pid, self.node.progress)
        return self._links.adopt(peer, sock)

    def _cookie(self) -> bytes:
        return self._links.cookie or self._secret.use()


class _Guest(worker.Worker):
    """This process as a worker whose way to pid 1 is a manager's own."""

    def __init__(self, node: Node, manager: ClusterManager | None) -> None:
        self._belong_to(node)
        self.manager = manager
        self.cookie = node.service(Secret).use()
        self.rank = -1
        self.comm = None
        self.bells = None
        self.listeners: list[socket.socket] = []
        self.welcome = Slot()
        self.main_serves = False

    def become(self, sock: socket.socket, told: dict[str, Any]) -> Link:
        """Serve pid 1, which has dialled and told what a join file tells."""
        self.join = told
        sys.path.extend(p for p in told["path"] if p not in sys.path)
        if os.path.isdir(told["cwd"]):
            os.chdir(told["cwd"])
        os.environ.update(told["env"])
        address = ""
        if told["host"] == socket.gethostname() and os.path.isdir(told["dir"]):
            address = os.path.join(told["dir"], f"g{told['you']}")
            self.listeners = [listen(address)]
        facts = {"rank": -1, "host": socket.gethostname(), "os_pid": os.getpid()}
        greeting.send_hello(sock, {**facts, "address": address})
        link = Link(sock, self.node.progress, self.node.deliver, self._life.lost_master)
        master = self.node.peers[1] = Peer(1, self.node.progress)
        master.link, link.peer = link, master
        self.node.on(Welcome)(self._on_welcome)
        self.node.on(Leave)(self._on_leave)
        link.begin()
        try:
            self.node.progress.wait(self.welcome, time.monotonic() + float(told["timeout"]))
        except TimeoutError:
            self._life.leave(1)
        return link

    def _on_welcome(self, said: Welcome, mail: Mail) -> None:
        self.node.refusal = None
        if self.manager is not None:
            self._links.own_way = self._connect
        super()._on_welcome(said, mail)

    def _connect(self, peer: Peer, member: Member) -> bool:
        """Reach another worker as the manager does; tell whether it has a way."""
        assert self.manager is not None
        _, _, port = member.address.rpartition(":")
        config = WorkerConfig(member.host, whole(port), os_pid=member.os_pid, ident=member.ident)
        try:
            pair = self.manager.connect(peer.pid, config)
            if pair is None:
                return False
            sock = self.node.service(Streams).attach(*pair)
            self.node.service(Guests).dial(peer.pid, sock)
        except Exception as exc:  # the user's code; there may be a socket of the host yet
            _log.log("info", f"connect() to worker {peer.pid} failed: {exc!r}")
            return False
        return True

    def _on_leave(self, said: Leave, mail: Mail) -> None:
        self.node.turns.stop()
        if not self.main_serves:
            self.node.turns.background(self._leave)

    def _leave(self) -> None:
        while self.node.turns.running:
            time.sleep(0.005)
        self.go()

    def serve_on_main(self, thread: _Messages) -> None:
        """Run calls on this thread, the main one, until told to leave."""
        while not self.welcome.ready:
            if not thread.is_alive():
                return
            time.sleep(0.01)
        self.main_serves = True
        signal.signal(signal.SIGINT, self.node.turns.on_sigint)
        self.node.turns.serving = True
        self.node.turns.serve()
        self.go()

    def go(self) -> NoReturn:
        """Leave the cluster, and end."""
        output.restore()
        self._life.say_goodbye()
        self._life.leave(0)


class _Messages(threading.Thread):
    """Greets the process at the other end, and lives as long as the connection."""

    def __init__(self, guests: Guests, sock: socket.socket, incoming: bool) -> None:
        super().__init__(name="hpcdist-messages")
        self._guests = guests
        self._sock = sock
        self._incoming = incoming

    def run(self) -> None:
        greet = self._guests.accept if self._incoming else partial(self._guests.dial, None)
        try:
            link = greet(self._sock)
        except (OSError, ValueError, KeyError) as exc:
            _log.log("warning", f"the connection failed: {exc}")
            self._sock.close()
            return
        pause = 0.01
        while link.open:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def join(self, timeout: float | None = None) -> None:
        guest = self._guests.guest
        on_main = threading.current_thread() is threading.main_thread()
        if guest is None or not on_main or timeout is not None or guest.main_serves:
            super().join(timeout)
            return
        guest.serve_on_main(self)
        super().join()
