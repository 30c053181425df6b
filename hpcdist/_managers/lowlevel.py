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
from typing import Any, NoReturn

from hpcdist import _log
from hpcdist._managers import reaching, secret, streams, worker
from hpcdist._managers.base import ClusterManager, WorkerConfig
from hpcdist._monitor import output
from hpcdist._runtime.controls import LEAVE, WELCOME
from hpcdist._runtime.members import Member
from hpcdist._runtime.node import node
from hpcdist._transport.contracts import Slot
from hpcdist._transport.link import Link
from hpcdist._transport.router import Peer
from hpcdist._wire import greeting

_GREETING = 30.0
_WAITING = "this process has called init_worker() and is in no cluster yet"


def start_worker(join: Any, *, stdin: Any = None) -> NoReturn:
    """Be a worker of the launch that a join file describes. Never returns.

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
    if node.refusal and _guest is None:
        raise RuntimeError(node.refusal)
    known = reaching.cookie
    if node.me != 1 and known is not None:
        secret.adopt(known)
    return secret.cookie() if cookie is None else secret.choose(cookie)


def init_worker(cookie: str, manager: ClusterManager | None = None) -> None:
    """Make this process a worker to be, which `process_messages` connects to its cluster.

    Args:
        cookie: The cluster's, as `cluster_cookie()` says on pid 1.
        manager: Where workers reach each other by its transport: its `connect` is called here with
            a config of `host`, `port` and `ident`. Without it they use sockets of their host.
    """
    global _guest
    if _guest is not None or node.serving or node.me != 1 or node.members.living:
        raise RuntimeError("this process is part of a cluster already")
    secret.adopt(secret.pad(cookie).encode("ascii"))
    node.refusal = _WAITING
    _guest = _Guest(manager)


def process_messages(reader: Any, writer: Any, incoming: bool = True) -> threading.Thread:
    """Take the messages of another process from `reader` and send ours through `writer`.

    Args:
        reader: A socket, a pipe, a binary file: what has `recv` or `read`.
        writer: What has `sendall` or `write`.
        incoming: Whether the other side made the connection; whoever made it greets first.

    Returns:
        The thread that sees to it. It ends with the connection. A worker that `join`s it on its
        main thread runs its calls there.
    """
    if _guest is None and not node.serving:
        raise RuntimeError("call init_worker(cookie) first: this process is no worker")
    node.start()
    thread = _Messages(streams.attach(reader, writer), incoming)
    thread.start()
    return thread


def worker_id_from_socket(x: Any) -> int:
    """Return the pid at the other end of a link, a socket, a stream or a descriptor; -1: unknown.

    Example:
        >>> import hpcdist, io
        >>> hpcdist.worker_id_from_socket(io.BytesIO())
        1
    """
    if isinstance(x, io.BytesIO | io.StringIO):
        return node.me
    return streams.pid_behind(x)


class _Guest(worker.Worker):
    """This process as a worker whose way to pid 1 is a manager's own."""

    def __init__(self, manager: ClusterManager | None) -> None:
        self.manager = manager
        self.cookie = secret.use()
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
            self.listeners = [reaching.listen(address)]
        facts = {"rank": -1, "host": socket.gethostname(), "os_pid": os.getpid()}
        greeting.send_hello(sock, {**facts, "address": address})
        link = Link(sock, node.progress, node.deliver, worker._lost_master)
        master = node.peers[1] = Peer(1, node.progress)
        master.link, link.peer = link, master
        node.handlers[WELCOME] = self._on_welcome
        node.handlers[LEAVE] = self._on_leave
        link.begin()
        try:
            node.progress.wait(self.welcome, time.monotonic() + float(told["timeout"]))
        except TimeoutError:
            worker.leave(1)
        return link

    def _on_welcome(self, *message: Any) -> None:
        node.refusal = None
        if self.manager is not None:
            reaching.own_way = self._connect
        super()._on_welcome(*message)

    def _connect(self, peer: Peer, member: Member) -> bool:
        """Reach another worker as the manager does; tell whether it has a way."""
        assert self.manager is not None
        _, _, port = member.address.rpartition(":")
        number = int(port) if port.isdigit() else None
        config = WorkerConfig(member.host, number, os_pid=member.os_pid, ident=member.ident)
        try:
            pair = self.manager.connect(peer.pid, config)
            if pair is None:
                return False
            _dial(peer.pid, streams.attach(*pair))
        except Exception as exc:  # the user's code; there may be a socket of the host yet
            _log.log("info", f"connect() to worker {peer.pid} failed: {exc!r}")
            return False
        return True

    def _on_leave(self, *_: Any) -> None:
        node.turns.stop()
        if not self.main_serves:
            node.turns.background(self._leave)

    def _leave(self) -> None:
        while node.turns.running:
            time.sleep(0.005)
        self.go()

    def serve_on_main(self, thread: _Messages) -> None:
        """Run calls on this thread, the main one, until told to leave."""
        while not self.welcome.ready:
            if not thread.is_alive():
                return
            time.sleep(0.01)
        self.main_serves = True
        signal.signal(signal.SIGINT, node.turns.on_sigint)
        node.serving = True
        node.turns.serve()
        self.go()

    def go(self) -> NoReturn:
        """Leave the cluster, and end."""
        output.restore()
        worker._say_goodbye()
        worker.leave(0)


_guest: _Guest | None = None


class _Messages(threading.Thread):
    """Greets whoever is at the other end, and lives as long as the connection."""

    def __init__(self, sock: socket.socket, incoming: bool) -> None:
        super().__init__(name="hpcdist-messages")
        self._sock = sock
        self._incoming = incoming

    def run(self) -> None:
        try:
            link = self._greet()
        except (OSError, ValueError, KeyError) as exc:
            _log.log("warning", f"no connection came about: {exc}")
            self._sock.close()
            return
        pause = 0.01
        while link.open:
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _greet(self) -> Link:
        if not self._incoming:
            return _dial(None, self._sock)
        hello = greeting.accept(self._sock, _cookie(), _GREETING)
        if hello["kind"] == "master":
            if _guest is None:
                raise ValueError("this process has its pid 1 already")
            return _guest.become(self._sock, hello)
        greeting.send_hello(self._sock, {"pid": node.me})
        return _adopt(int(hello["pid"]), self._sock)

    def join(self, timeout: float | None = None) -> None:
        guest = _guest
        on_main = threading.current_thread() is threading.main_thread()
        if guest is None or not on_main or timeout is not None or guest.main_serves:
            super().join(timeout)
            return
        guest.serve_on_main(self)
        super().join()


def _dial(pid: int | None, sock: socket.socket) -> Link:
    greeting.dial(sock, _cookie(), {"kind": "peer", "pid": node.me}, _GREETING)
    found = int(greeting.receive_hello(sock)["pid"])
    if pid not in (None, found):
        raise ValueError(f"worker {found} answered where {pid} was meant")
    return _adopt(found, sock)


def _adopt(pid: int, sock: socket.socket) -> Link:
    peer = node.peers.get(pid)
    if peer is None:
        peer = node.peers[pid] = Peer(pid, node.progress)
    return reaching.adopt(peer, sock)


def _cookie() -> bytes:
    return reaching.cookie or secret.use()
