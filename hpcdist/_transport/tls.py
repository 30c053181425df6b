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
from typing import NamedTuple

from hpcdist import _config
from hpcdist._wire.frames import Buffer

_RECORD = 16 * 1024  # what one TLS record carries at most
_CHUNK = 256 * 1024
_DAYS = 400


class Contexts(NamedTuple):
    """What TLS is spoken with."""

    dialled: ssl.SSLContext  # by those who are dialled,
    dialling: ssl.SSLContext  # and by those who dial


class Certificate:
    """A cluster's certificate as one process knows it, and the contexts that are made of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both below
        self._pem: str | None = None
        self._contexts: Contexts | None = None

    def certificate(self) -> str:
        """Return the cluster's key and certificate (PEM), made at the first question."""
        with self._lock:
            if self._pem is None:
                self._pem = _make()
            return self._pem

    def adopt(self, pem: str) -> None:
        """Take over the certificate of the cluster that this process joins."""
        with self._lock:
            if pem != self._pem:
                self._pem, self._contexts = pem, None

    def contexts(self) -> Contexts:
        """Return what TLS is spoken with, made at the first question."""
        pem = self.certificate()
        with self._lock:
            if self._contexts is None:
                self._contexts = Contexts(
                    _context(pem, ssl.PROTOCOL_TLS_SERVER),
                    _context(pem, ssl.PROTOCOL_TLS_CLIENT),
                )
            return self._contexts


_ours = Certificate()  # this process is part of one cluster


def certificate() -> str:
    """Return the cluster's key and certificate (PEM), made at the first question."""
    return _ours.certificate()


def adopt(pem: str) -> None:
    """Take over the certificate of the cluster that this process joins."""
    _ours.adopt(pem)


def begin(sock: socket.socket) -> Secure:
    """Begin to agree on TLS with a dialler: `Secure.shake` does it, without waiting."""
    sock.setblocking(False)
    return _wrap(sock, 0)


def dial(sock: socket.socket, timeout: float) -> Secure:
    """Agree on TLS with the process we dialled; an OSError if it is not one of ours."""
    sock.settimeout(timeout)
    secure = _wrap(sock, 1)
    try:
        secure.shake()
    except BaseException:
        secure.close()
        raise
    return secure


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
        self.detach = sock.detach

    def shake(self) -> None:
        """Agree with the other side, as far as it goes.

        Raises:
            BlockingIOError: There is more to come.
            ConnectionResetError: The other side hung up.
            OSError: It is not one of ours.
        """
        try:
            self._sock.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLEOFError as exc:
            raise ConnectionResetError("it hung up before TLS was agreed on") from exc

    def shutdown(self, how: int) -> None:
        """Shut it down, as other threads may be using it: SSLSocket would forget its state."""
        socket.socket.shutdown(self._sock, how)

    def recv(self, size: int) -> bytes:
        """Receive up to `size` bytes."""
        try:
            with self._one_at_a_time:
                return self._sock.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def recv_into(self, buffer: memoryview) -> int:
        """Receive into a buffer; at most one record."""
        try:
            with self._one_at_a_time:
                return self._sock.recv_into(buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def send(self, data: Buffer) -> int:
        """Send some of `data`; return how much."""
        return self.sendmsg((memoryview(data),))

    def sendall(self, data: Buffer) -> None:
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


def _wrap(sock: socket.socket, side: int) -> Secure:
    try:
        keep_alive(sock)
        context = _ours.contexts()[side]
        wrapped = context.wrap_socket(sock, server_side=not side, do_handshake_on_connect=False)
    except BaseException:
        sock.close()
        raise
    return Secure(wrapped)


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
