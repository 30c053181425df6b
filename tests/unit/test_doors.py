"""Doors: how process 1 comes to one that cannot dial it."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdist._schedulers.calling import Caller
from hpcdist._schedulers.submit_host import SubmitHost
from hpcdist._transport import doors
from hpcdist._transport.network import Address
from tests.helpers import eventually

pytestmark = pytest.mark.any_mpi

WORD = b"it is me"


@pytest.fixture
def nobody() -> Iterator[list[Address]]:
    """Addresses at which nobody answers, and nobody will."""
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        yield [taken.getsockname()]


def agree(sock: socket.socket, timeout: float) -> str:
    """Take one who says the word for process 1."""
    sock.settimeout(timeout)
    with sock:
        if sock.recv(len(WORD)) != WORD:
            raise ConnectionError("a stranger")
    return "agreed"


def visit(folder: Path, *words: bytes) -> None:
    """Go to the door that somebody opens in a folder, once with each word."""
    ((_, targets),) = eventually(lambda: list(doors.doors(str(folder)).items()))
    for word in words:
        with socket.create_connection(targets[0], 10) as sock:
            if word:
                sock.sendall(word)


def test_process_1_comes_to_the_door(nobody: list[Address], tmp_path: Path) -> None:
    thread = threading.Thread(target=visit, args=(tmp_path, WORD))
    thread.start()
    assert doors.reach(nobody, agree, 60, str(tmp_path)) == "agreed"
    thread.join()
    assert doors.doors(str(tmp_path)) == {}


def test_strangers_at_the_door_are_passed_over(nobody: list[Address], tmp_path: Path) -> None:
    thread = threading.Thread(target=visit, args=(tmp_path, b"", b"stranger", WORD))
    thread.start()
    assert doors.reach(nobody, agree, 60, str(tmp_path)) == "agreed"
    thread.join()


def test_one_that_answers_needs_no_door(tmp_path: Path) -> None:
    def take(sock: socket.socket, timeout: float) -> str:
        sock.close()
        return "dialled"

    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert doors.reach([listener.getsockname()], take, 60, str(tmp_path)) == "dialled"
    assert list(tmp_path.iterdir()) == []


def test_nobody_comes(nobody: list[Address], tmp_path: Path) -> None:
    with pytest.raises(ConnectionError) as caught:
        doors.reach(nobody, agree, 0.3, str(tmp_path))
    for part in (f"port {nobody[0][1]}: Connection refused", "nor did it dial this host"):
        assert part in str(caught.value)
    assert doors.doors(str(tmp_path)) == {}


def test_a_folder_that_is_gone(nobody: list[Address], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConnectionError, match="no door can be opened"):
        doors.reach(nobody, agree, 60, str(tmp_path / "file"))


@pytest.mark.parametrize("gone", [False, True], ids=["in vain", "no longer needed"])
def test_each_door_is_visited_once(
    gone: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    door = tmp_path / doors.FOLDER / "n1-7"
    door.parent.mkdir()
    door.write_text("10.0.0.1|4711")
    called = list[object]()

    def call(targets: object) -> None:
        called.append(targets)
        if gone:
            door.unlink()
        raise ConnectionError("none of its addresses answers")

    def background(fn: Callable[[], object]) -> None:
        fn()

    up = SimpleNamespace(job="5", closed=True, renews=False, folder=str(tmp_path))
    world = SimpleNamespace(
        job="7", closed=False, renews=False, folder=str(tmp_path), door=SimpleNamespace(call=call)
    )
    launch: Any = SimpleNamespace(pending=True, worlds=[up, world], background=background)
    caller = Caller(launch, SubmitHost())
    caller.go_round()
    caller.go_round()
    assert called == [[("10.0.0.1", 4711)]]
    assert ("job 7 cannot dial process 1, nor is it reached" in caplog.text) != gone
