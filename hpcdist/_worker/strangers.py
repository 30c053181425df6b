"""Those who have dialled and have not yet proved that they are ours.

All of them are looked after by one thread, which there is only while there are any: a stranger that
says half a greeting and no more costs a descriptor, and no more than `_PATIENCE` seconds of it.
There are only so many at a time. When there are too many, some that are silent have to go: of the
address from which most have come, those that came first, unless they have shown the cluster's
certificate. Ours are not silent, and one that was too slow tries again (see `network.dial`). They
go by the dozen: with 10,000 at the door, looking through all of them for each one would keep
ours waiting behind them.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hpcdist import _log
from hpcdist._runtime.node import Node, Service
from hpcdist._wire import greeting
from hpcdist._wire.greeting import Hello

_PATIENCE = 30.0  # 64 workers that start on two cores take their time
_MOST = 1024
_SHARE = 4  # they may have this part of all descriptors
_AT_ONCE = 8  # one in so many of the silent goes when there are too many
_SILENCE = 0.25  # seconds without a step further after which one counts as silent
_GULP = 8  # that are let in before messages have their turn
_RETRY = 0.02  # how long nobody is let in where all have something to say
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_QUIET = 60.0  # one line about strangers in so many seconds
_CREDENTIALS = struct.Struct("iII")  # struct ucred in unix(7): pid, uid, gid

Welcome = Callable[[Any, dict[str, Any]], None]


class _Stranger:
    """One that has dialled, and how far it has come."""

    def __init__(self, sock: socket.socket, host: str, entrance: Entrance) -> None:
        self.host = host
        self.welcome = entrance.welcome
        self.stepped = time.monotonic()  # when it last came a step further; bytes alone are none
        self.deadline = self.stepped + _PATIENCE
        self.turned_away = False
        self.shaking = entrance.secure
        self.sock: Any = sock
        if entrance.secure:
            from hpcdist._transport import tls

            self.sock = tls.begin(sock)
        self.fd: int = self.sock.fileno()
        self._talk = greeting.accepting(entrance.cookie)
        self._said: bytes = b""  # by us, and not yet sent
        self._wanted = 0
        self._got = b""
        self._step(None)

    def advance(self) -> Hello | None:
        """Go on without waiting; return what it says of itself once it has proved to be ours.

        Raises:
            OSError: It is a stranger, or has gone.
        """
        try:
            if self.shaking:
                self.sock.shake()
                self.shaking = False
                self.stepped = time.monotonic()
            while True:
                if self._said:
                    self._said = self._said[self.sock.send(self._said) :]
                    if not self._said:
                        self._step(b"")
                    continue
                part = self.sock.recv(self._wanted - len(self._got))
                if not part:
                    raise ConnectionResetError("it hung up during the greeting")
                self._got += part
                if len(self._got) == self._wanted:
                    got, self._got = self._got, b""
                    self._step(got)
        except BlockingIOError:
            return None
        except StopIteration as exc:
            hello: Hello = exc.value
            return hello

    def hang_up(self) -> None:
        """End the connection, which another thread may be using; that one closes it."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has gone already
            pass

    def _step(self, got: bytes | None) -> None:
        self.stepped = time.monotonic()
        step = self._talk.send(got)  # type: ignore[arg-type]  # None begins it
        if isinstance(step, int):
            self._wanted = step
        else:
            self._said = step


class Strangers(Service):
    """All of this process."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = threading.Lock()  # guards all below
        self._here: dict[int, _Stranger] = {}  # by descriptor, the oldest first
        self._leaving = 0  # how many of them have been turned away
        self._epoll: select.epoll | None = None  # there while the thread is
        self._last_word = -_QUIET
        self._unsaid = 0

    def has_room(self) -> bool:
        """Tell whether another one may come; one that is silent makes room."""
        with self._lock:
            return self.has_place or self._turn_some_away()

    @property
    def has_place(self) -> bool:
        """Whether another one may come without anybody's going."""
        return len(self._here) - self._leaving < _most()

    def make_room(self) -> None:
        """Have some go, if any is silent: there are no descriptors left."""
        with self._lock:
            self._turn_some_away()

    def _turn_some_away(self) -> bool:
        living = [s for s in self._here.values() if not s.turned_away]
        now = time.monotonic()
        poll = select.poll()
        # One that has shown the certificate is ours, and would not dial again.
        quiet = [s for s in living if s.shaking and now - s.stepped > _SILENCE]
        for stranger in quiet:
            poll.register(stranger.fd, select.POLLIN)
        speaking = {fd for fd, _ in poll.poll(0)}  # our thread has not come to these yet
        crowds = Counter(s.host for s in living if s.shaking)
        most = max(crowds.values(), default=0)
        silent = [s for s in quiet if s.fd not in speaking and crowds[s.host] == most]
        for oldest in silent[: max(1, len(silent) // _AT_ONCE)]:
            oldest.turned_away = True
            self._leaving += 1
            # The thread may be reading from it, so it is not closed here; the thread sees the end.
            oldest.hang_up()
        return bool(silent)

    def enter(self, stranger: _Stranger) -> None:
        """Take one in."""
        with self._lock:
            begins = self._epoll is None
            if self._epoll is None:
                self._epoll = select.epoll()
            self._here[stranger.fd] = stranger
            both = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP
            self._epoll.register(stranger.fd, both | select.EPOLLET)
        if begins:
            try:
                self.node.turns.background(self._serve)
            except RuntimeError as exc:  # no thread is available: the next one tries again
                self._forget(stranger)
                self._epoll = None
                raise OSError(f"cannot greet anybody: {exc}") from exc

    def _serve(self) -> None:
        """Greet, until all have been greeted."""
        while True:
            with self._lock:
                epoll = self._epoll
                assert epoll is not None
                if not self._here:
                    self._epoll = None
                    epoll.close()
                    return
                oldest = next(iter(self._here.values()))
            for fd, _ in epoll.poll(max(0.0, oldest.deadline - time.monotonic())):
                self._listen_to(self._here[fd])
            self._lose_patience()

    def _listen_to(self, stranger: _Stranger) -> None:
        try:
            hello = stranger.advance()
        except Exception as exc:  # the edge: whatever one of them does, the others are served
            self._dismiss(stranger, exc)
            return
        if hello is not None:
            self._forget(stranger)
            stranger.sock.settimeout(_PATIENCE)
            self.node.turns.background(lambda: stranger.welcome(stranger.sock, hello))

    def _lose_patience(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [s for s in self._here.values() if s.deadline <= now]
        for stranger in late:
            self._dismiss(stranger, TimeoutError(f"it was silent for {_PATIENCE:g} s"))

    def _forget(self, stranger: _Stranger) -> None:
        with self._lock:
            assert self._epoll is not None
            self._epoll.unregister(stranger.fd)
            del self._here[stranger.fd]
            self._leaving -= stranger.turned_away

    def _dismiss(self, stranger: _Stranger, why: Exception) -> None:
        self._forget(stranger)
        stranger.sock.close()
        if stranger.turned_away:
            self.refuse(ConnectionError("it was silent, and too many others came"))
        elif not isinstance(why, ConnectionResetError):  # such got in by another of our addresses
            self.refuse(why)

    def refuse(self, exc: Exception) -> None:
        """Tell that one has failed, now and then."""
        with self._lock:
            self._unsaid += 1
            now = time.monotonic()
            if now - self._last_word <= _QUIET:
                return
            self._last_word, count, self._unsaid = now, self._unsaid, 0
        _log.log("warning", f"refused {count} connections of strangers; the last: {exc}")


class Entrance:
    """A listening socket, and what becomes of those who dial it.

    Args:
        node: Whose it is.
        listener: It listens already.
        cookie: What they have to know.
        welcome: Called with each connection that has proved to be ours, and with what the other
            side says of itself. It is called on a thread of its own and may take its time.
        secure: Whether they come by TLS; if not, by a Unix socket.
    """

    def __init__(
        self,
        node: Node,
        listener: socket.socket,
        cookie: bytes,
        welcome: Welcome,
        *,
        secure: bool,
    ) -> None:
        self._progress = node.progress
        self._strangers = node.service(Strangers)
        self.cookie = cookie
        self.welcome = welcome
        self.secure = secure
        self._listener = listener
        self._open = True
        self._watched = False
        self._watch()

    def close(self) -> None:
        """Let no more strangers in."""
        self._open = False
        if self._watched:
            self._progress.unregister(self._listener.fileno())
        self._listener.close()

    def _watch(self) -> None:
        if self._open:
            self._watched = True
            self._progress.register(self._listener.fileno(), self._knock, select.EPOLLIN)

    def _pause(self) -> None:
        """Look away: the system keeps those who come, until there is room."""
        self._watched = False
        self._progress.unregister(self._listener.fileno())
        self._progress.call_later(_RETRY, self._watch)

    def _knock(self, _: int) -> None:
        if not self._strangers.has_room():
            self._pause()
            return
        for _ in range(_GULP):
            try:
                sock, address = self._listener.accept()
            except OSError as exc:
                if exc.errno in _FULL:
                    self._strangers.make_room()
                    self._pause()
                return
            self.admit(sock, address[0] if self.secure else "")
            if not self._strangers.has_place:
                return

    def admit(self, sock: socket.socket, host: str) -> None:
        """Greet one that has come from a host, or that was dialled there in place of that."""
        try:
            sock.setblocking(False)
            if not self.secure:
                _check_user(sock)
            self._strangers.enter(_Stranger(sock, host, self))
        except OSError as exc:
            sock.close()
            if not isinstance(exc, ConnectionError):  # it has gone again
                self._strangers.refuse(exc)


def _check_user(sock: socket.socket) -> None:
    """Refuse another user's process, which should not even get into the folder of the socket."""
    told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(told)
    if uid != os.geteuid():
        raise PermissionError(f"process {pid} dialled, which belongs to user {uid} and not to us")


def _most() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, soft // _SHARE))
