"""The page's server: it listens on this host alone, and has three things to give.

They are the page, the picture of now, and a stream with a picture a second. Their addresses are
relative, so that a proxy may put any prefix before them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from hpcdist._dashboard.access import Access

_PATIENCE = 10.0  # seconds for a request to come, and for a picture to be taken
_GUESTS_MOST = 32  # connections at a time
_ASIDE = ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


class Feed:
    """The newest picture, and those who wait for the next one.

    Args:
        watch: Begins to have pictures taken; returns what ends that.
    """

    def __init__(self, watch: Callable[[Callable[[bytes], None]], Callable[[], None]]) -> None:
        self._watch = watch
        self._changed = threading.Condition()
        self._picture = b""
        self._number = 0
        self._guests = 0
        self._stop: Callable[[], None] | None = None
        self.closed = False

    def take(self, picture: bytes) -> None:
        """Take a picture in, unless the last guest has just gone: the next gets a fresh one."""
        with self._changed:
            if not self._guests:
                return
            self._picture = picture
            self._number += 1
            self._changed.notify_all()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Have pictures taken meanwhile."""
        with self._changed:
            self._guests += 1
            if self._guests == 1:
                self._stop = self._watch(self.take)
        try:
            yield
        finally:
            with self._changed:
                self._guests -= 1
                if self._guests == 0 and self._stop is not None:
                    self._stop()
                    self._stop, self._picture = None, b""

    def pictures(self) -> Iterator[bytes]:
        """Give each picture as it comes, b"" where none does for long, until the page is closed."""
        seen = -1
        while True:
            with self._changed:
                came = self._changed.wait_for(partial(self._has_news, seen), _PATIENCE)
                if self.closed:
                    return
                seen, picture = self._number, self._picture if came else b""
            yield picture

    def _has_news(self, seen: int) -> bool:
        return self.closed or (self._number != seen and bool(self._picture))

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class Server(ThreadingHTTPServer):
    """Serves the page.

    Args:
        port: 0: any that is free.
        feed: The pictures.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, port: int, feed: Feed) -> None:
        super().__init__(("127.0.0.1", port), _Guest)
        self.feed = feed
        self.access = Access(self.server_address[1])
        self._places = threading.Semaphore(_GUESTS_MOST)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.2,), name="hpcdist-dashboard", daemon=True
        )
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a guest on a thread, or turn it away if there are too many."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a guest."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a guest that has gone is none of the user's business."""

    def close(self) -> None:
        """Serve nobody any more."""
        self.feed.close()
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Guest(BaseHTTPRequestHandler):
    """One request. Strangers get 403, whatever they ask for, and nothing more."""

    server: Server
    timeout = _PATIENCE

    def do_GET(self) -> None:
        """Give the page, a picture, or the stream."""
        access = self.server.access
        if access.has_token(self.path):
            self._give(303, b"", ("Location", "./"), ("Set-Cookie", access.set_cookie))
            return
        if not access.has_cookie(self.headers):  # type: ignore[arg-type]
            self._give(403, b"403\n")
            return
        name = urlsplit(self.path).path.rpartition("/")[2]
        if name == "":
            page = files(__package__).joinpath("page.html").read_bytes()
            kind = "text/html; charset=utf-8"
            self._give(200, page, ("Content-Type", kind), ("Content-Security-Policy", _POLICY))
        elif name == "picture":
            with self.server.feed.watched():
                picture = next(self.server.feed.pictures(), b"")
            self._give(200 if picture else 503, picture, ("Content-Type", "application/json"))
        elif name == "pictures":
            self._stream()
        else:
            self._give(404, b"404\n")

    def _stream(self) -> None:
        self.send_response_only(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("X-Accel-Buffering", "no")
        self._end()
        with self.server.feed.watched():
            for picture in self.server.feed.pictures():
                self.wfile.write(b"data: %b\n\n" % picture if picture else b":\n\n")

    def _give(self, code: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response_only(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self._end()
        self.wfile.write(body)

    def _end(self) -> None:
        for name, value in (*_ASIDE, ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request for a page: as any other stranger's."""
        self._give(403, b"403\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: this is the user's terminal."""
