"""The page that shows live what the cluster is doing."""

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hpcdist
from hpcdist import Dashboard, WorkerPool, addprocs, dashboard, myid, pmap, remotecall, workers
from hpcdist._cluster.onlookers import Onlookers
from hpcdist._runtime.node import here
from tests.browser import COMMAND, Browser
from tests.cluster.test_executor import blocked_until
from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi


@pytest.fixture
def page() -> Iterator[Dashboard]:
    """A page that is closed in the end."""
    with dashboard() as made:
        yield made


def ask(
    page: Dashboard, target: str, cookie: str = "", method: str = "GET"
) -> tuple[int, dict[str, str], bytes]:
    """Ask for something; return the code, the headers and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    try:
        connection.request(method, target, headers={"Cookie": cookie} if cookie else {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def cookie_of(page: Dashboard) -> str:
    """Come by the page's address, as a browser does."""
    target = page.url.partition(str(page.port))[2]
    status, headers, body = ask(page, target)
    assert (status, headers["Location"], body) == (303, "./", b"")
    assert "HttpOnly" in headers["Set-Cookie"]
    return headers["Set-Cookie"].partition(";")[0]


def picture(page: Dashboard, cookie: str) -> Any:
    status, _, body = ask(page, "/picture", cookie)
    assert status == 200
    return json.loads(body)


def test_the_page_and_its_pictures(page: Dashboard, pids: list[int]) -> None:
    assert re.fullmatch(rf"http://127\.0\.0\.1:{page.port}/\?token=[\w-]{{20,}}", page.url)
    cookie = cookie_of(page)
    status, headers, body = ask(page, "/", cookie)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"<title>hpcdist</title>" in body
    seen = picture(page, cookie)
    assert [row["pid"] for row in seen["workers"]] == pids
    assert seen["driver"]["pid"] == 1


def test_the_page_needs_nothing_from_elsewhere(page: Dashboard) -> None:
    _, headers, body = ask(page, "/", cookie_of(page))
    assert not re.findall(rb"https?://|src=|href=|@import|url\(", body)
    assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("target", ["/", "/picture", "/pictures", "/x/y", "/?token=wrong"])
@pytest.mark.parametrize("cookie", ["", "hpcdist=1", "hpcdist-{port}=wrong", "\x80;;=,"])
def test_strangers_learn_nothing(page: Dashboard, target: str, cookie: str) -> None:
    for method in ("GET", "POST", "HEAD", "NONSENSE"):
        status, headers, body = ask(page, target, cookie.format(port=page.port), method)
        assert status == 403
        assert body in (b"403\n", b"")
        assert not {"Server", "Set-Cookie", "Date"} & set(headers)


def test_what_is_no_request(page: Dashboard) -> None:
    for said in (b"\x16\x03\x01\n\n", b"GET\n\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000 + b"\n"):
        with socket.create_connection(("127.0.0.1", page.port), 30) as sock:
            try:
                sock.sendall(said)
                sock.shutdown(socket.SHUT_WR)
                heard = sock.recv(4096)
            except ConnectionError:  # it has hung up before it had read all
                continue
            assert b"hpcdist" not in heard
            assert b"Python" not in heard
    assert picture(page, cookie_of(page))["workers"] is not None


def test_behind_a_proxy_s_prefix(page: Dashboard, pids: list[int]) -> None:
    cookie = cookie_of(page)
    status, headers, _ = ask(page, f"/user/me/proxy/{page.port}/" + page.url.rpartition("/")[2])
    assert (status, headers["Location"]) == (303, "./")
    assert ask(page, f"/user/me/proxy/{page.port}/", cookie)[0] == 200
    assert ask(page, f"/user/me/proxy/{page.port}/picture", cookie)[0] == 200
    assert ask(page, "/nothing", cookie)[0] == 404


class Stream:
    """Reads the stream of pictures, as the page does."""

    def __init__(self, page: Dashboard) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
        self._connection.request("GET", "/pictures", headers={"Cookie": cookie_of(page)})
        self._answer = self._connection.getresponse()
        assert self._answer.getheader("Content-Type") == "text/event-stream"

    def next(self) -> Any:
        while line := self._answer.readline():
            if line.startswith(b"data: "):
                return json.loads(line[6:])
        return None

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


@pytest.fixture
def stream(page: Dashboard) -> Iterator[Stream]:
    """The stream of the page."""
    made = Stream(page)
    yield made
    made.close()


def held(path: str, k: int) -> int:
    if k >= 4:
        blocked_until(path)
    return myid()


def test_the_stream_shows_a_map_and_a_death(
    stream: Stream, pids: list[int], tmp_path: Path
) -> None:
    (mine,) = addprocs(1)
    go = str(tmp_path / "go")
    found: list[list[int]] = []
    mapping = threading.Thread(
        target=lambda: found.append(pmap(held, [go] * 40, range(40), batch_size=1))
    )
    mapping.start()
    try:
        while not [m for m in stream.next()["maps"] if m["done"] == 4]:
            pass
        seen = stream.next()
        (shown,) = seen["maps"]
        assert (shown["function"], shown["total"], shown["failures"]) == ("held", 40, 0)
        busy = [row for row in seen["workers"] if row["state"] == "busy"]
        assert {row["call"] for row in busy} <= {"held", "blocked_until"}
    finally:
        (tmp_path / "go").touch()
        mapping.join()
    while stream.next()["maps"]:
        pass
    remotecall(exec, mine, "import os; os._exit(3)")
    while mine in [row["pid"] for row in stream.next()["workers"]]:
        pass
    assert len(found[0]) == 40


def test_nothing_is_gathered_while_nobody_looks(page: Dashboard, pids: list[int]) -> None:
    onlookers = here.node.service(Onlookers)
    stream = Stream(page)
    assert stream.next()
    assert onlookers.is_busy
    stream.close()
    eventually(lambda: not onlookers.is_busy)


def test_a_page_that_is_closed(pids: list[int]) -> None:
    page = dashboard()
    stream = Stream(page)
    assert stream.next()
    page.close()
    page.close()
    while stream.next() is not None:
        pass
    stream.close()
    with pytest.raises(ConnectionRefusedError):
        ask(page, "/")
    assert "closed" in repr(page)
    assert "hpcdist-dashboard" not in [thread.name for thread in threading.enumerate()]


def test_a_port_that_is_taken(page: Dashboard) -> None:
    with pytest.raises(OSError, match=f"port {page.port} cannot be used.*port=0"):
        dashboard(port=page.port)
    for port in (-1, 65536, True, "8080"):
        with pytest.raises(ValueError, match="port is a number from 0 to 65535"):
            dashboard(port=port)  # type: ignore[arg-type]


def test_too_many_guests_are_turned_away(page: Dashboard) -> None:
    crowd = [socket.create_connection(("127.0.0.1", page.port), 30) for _ in range(40)]
    try:
        turned_away = [sock for sock in crowd[32:] if sock.recv(1) == b""]
        assert turned_away
    finally:
        for sock in crowd:
            sock.close()
    eventually(lambda: ask_or_none(page) == 303)


def ask_or_none(page: Dashboard) -> int | None:
    try:
        return ask(page, page.url.partition(str(page.port))[2])[0]
    except (ConnectionError, http.client.HTTPException):
        return None


def test_on_a_worker(pids: list[int]) -> None:
    with pytest.raises(hpcdist.RemoteException, match="Only process 1"):
        hpcdist.remotecall_fetch(dashboard, pids[0])
    assert set(pids) <= set(workers())


@pytest.mark.slow
@pytest.mark.skipif(COMMAND is None, reason="there is no chromium")
def test_in_a_real_browser(page: Dashboard, pids: list[int], tmp_path: Path) -> None:
    go = str(tmp_path / "go")
    (mine,) = addprocs(1)
    calls = [remotecall(blocked_until, pid, go) for pid in pids]
    mapping = threading.Thread(
        target=lambda: pmap(held, [go] * 40, range(40), pool=WorkerPool([mine]))
    )
    mapping.start()
    browser = Browser(page.url, tmp_path / "profile")
    try:
        eventually(lambda: f"{len(pids) + 1} workers" in browser.text())
        assert browser.evaluate("location.search") == ""  # the token has gone from the address
        eventually(lambda: "blocked_until" in browser.text())
        eventually(lambda: "Maps" in browser.text() and "held" in browser.text())
        Path(go).touch()
        mapping.join()
        eventually(lambda: "Maps" not in browser.text())
        remotecall(exec, mine, "import os; os._exit(3)")
        eventually(lambda: f"worker {mine} on" in browser.text())
        assert "has gone" in browser.text()
        page.close()
        eventually(lambda: "the driver has ended" in browser.text())
    finally:
        Path(go).touch()
        browser.close()
    assert all(call.result() for call in calls)
