"""Links that leave the host: TCP under TLS 1.3, both sides showing the cluster's one certificate.

The certificate and its key are made by process 1, live in memory, and travel in join files only:
who has one may join. Loaded only where a link leaves the host.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import Any

from hpcdist import _config

_RECORD = 16 * 1024  # what one TLS record carries at most
_CHUNK = 256 * 1024
_DAYS = 400

_lock = threading.Lock()  # guards both below
_pem: str | None = None
_contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None


def certificate() -> str:
    """Return the cluster's key and certificate (PEM), made at the first question."""
    global _pem
    with _lock:
        if _pem is None:
            _pem = _make()
        return _pem


def adopt(pem: str) -> None:
    """Take over the certificate of the cluster that this process joins."""
    global _pem
    with _lock:
        _pem = pem


def accept(sock: socket.socket, timeout: float) -> Secure:
    """Agree on TLS with whoever dialled; an OSError if it is not one of ours."""
    return _agree(sock, 0, timeout)


def dial(sock: socket.socket, timeout: float) -> Secure:
    """Agree on TLS with whom we dialled; an OSError if it is not one of ours."""
    return _agree(sock, 1, timeout)


class Secure:
    """A TLS connection with the manners of a plain socket, as far as links and greetings use them.

    What would block raises BlockingIOError, as a plain socket does. Several threads may use it, as
    they may a plain socket: OpenSSL itself spoils its records when two are at one connection.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._one_at_a_time = threading.Lock()
        # OpenSSL wants a write that would have blocked tried again with the very same bytes.
        self._owed: memoryview | bytes | None = None
        self.fileno = sock.fileno
        self.settimeout = sock.settimeout
        self.setblocking = sock.setblocking
        self.setsockopt = sock.setsockopt
        self.getpeername = sock.getpeername
        self.pending = sock.pending
        self.close = sock.close

    def recv(self, size: int) -> bytes:
        """Receive up to `size` bytes."""
        try:
            with self._one_at_a_time:
                return self._sock.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def recv_into(self, buffer: Any) -> int:
        """Receive into a buffer; at most one record."""
        try:
            with self._one_at_a_time:
                return self._sock.recv_into(buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def send(self, data: Any) -> int:
        """Send some of `data`; return how much."""
        return self.sendmsg((memoryview(data),))

    def sendall(self, data: Any) -> None:
        """Send all of `data`, waiting where it has to."""
        with self._one_at_a_time:
            self._sock.sendall(data)

    def sendmsg(self, views: Sequence[memoryview]) -> int:
        """Send some of what the views hold, in their order; return how much."""
        with self._one_at_a_time:
            if self._owed is None:
                self._owed = _gather(views)
            try:
                sent = self._sock.send(self._owed)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None
            self._owed = None if sent == len(self._owed) else self._owed[sent:]
            return sent


def _gather(views: Sequence[memoryview]) -> memoryview | bytes:
    if len(views) == 1 or views[0].nbytes >= _RECORD:
        return views[0][:_CHUNK]
    parts: list[memoryview] = []
    room = _RECORD
    for view in views:
        parts.append(view[:room])
        room -= parts[-1].nbytes
        if not room:
            break
    return b"".join(parts)


def _agree(sock: socket.socket, side: int, timeout: float) -> Secure:
    keep_alive(sock)
    sock.settimeout(timeout)
    context = _both()[side]
    try:
        return Secure(context.wrap_socket(sock, server_side=not side))
    except BaseException:
        sock.close()
        raise


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel find out that the other host, or the way to it, is gone.

    It asks every `heartbeat` seconds of silence; without an answer for `heartbeat_limit` seconds,
    also to what was sent, the connection ends. A process that is merely stopped stays alive.
    """
    every = max(1, round(_config.setting("heartbeat")))
    limit = max(every, round(_config.setting("heartbeat_limit")))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, limit // every - 1))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit * 1000)


def _both() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of those who are dialled and of those who dial."""
    global _contexts
    pem = certificate()
    with _lock:
        if _contexts is None:
            _contexts = (
                _context(pem, ssl.PROTOCOL_TLS_SERVER),
                _context(pem, ssl.PROTOCOL_TLS_CLIENT),
            )
        return _contexts


def _context(pem: str, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # one certificate for all hosts; the key is what counts
    context.verify_mode = ssl.CERT_REQUIRED
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    context.load_verify_locations(cadata=pem[pem.index("-----BEGIN CERTIFICATE") :])
    fd = os.memfd_create("hpcdist-key")  # the library takes a key from a file only
    try:
        os.write(fd, pem.encode())
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def _make() -> str:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hpcdist cluster")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)  # clocks of nodes differ
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + _DAYS * day)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return (private + made.public_bytes(serialization.Encoding.PEM)).decode()
