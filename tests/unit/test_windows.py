"""Windows: how a driver shows itself to other processes of its user, and to nobody else."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdist._events.windows import Closed, FolderView, FolderWindow, View, Window
from tests.helpers import eventually


@pytest.fixture
def window() -> Iterator[Window]:
    made = Window()
    yield made
    made.close()


def view_of(window: Window) -> View:
    """Look through a window of this process, which may have another: a driver's."""
    return View(os.getpid(), Path(f"/proc/self/fd/{window._memory}"))


def test_what_is_shown_is_seen(window: Window) -> None:
    view = view_of(window)
    assert view.read() is None
    for text in (b"first", b"a longer one", b"short"):
        window.show(text)
        assert view.read() == text


def test_a_question_arrives(window: Window) -> None:
    assert window.questions() == b""
    view_of(window).ask()
    assert window.questions() != b""
    assert window.questions() == b""


def test_questions_that_nobody_reads_block_nobody(window: Window) -> None:
    view = view_of(window)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(window._ask, b"?" * 65536)
    view.ask()


def test_half_a_picture_is_none(window: Window) -> None:
    view = view_of(window)
    window.show(b"whole")
    window._count += 1
    window._write_head(0)  # as in the middle of `show`
    assert view.read() is None


def test_a_driver_that_is_gone_is_closed() -> None:
    program = (
        "import sys, time\n"
        "from hpcdist._events.windows import Window\n"
        "window = Window()\n"
        "window.show(b'here')\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        view = View.of(process.pid)
        assert view is not None
        assert view.read() == b"here"
        process.kill()
        process.wait()
        for look in (view.read, view.ask, view.protocol):
            with pytest.raises(Closed):
                look()
        assert View.of(process.pid) is None


def test_a_fork_of_a_driver_is_no_driver(window: Window) -> None:
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        assert View.of(child) is None
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)
        for fd in (*ready, *go):
            os.close(fd)


def test_a_process_without_a_window() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert View.of(process.pid) is None
    assert View.of(1 << 22) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_another_user_sees_nothing(window: Window) -> None:
    window.show(b"secret")
    program = (
        "import os, sys\n"
        "from hpcdist._events.windows import View, views\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "print(View.of(int(sys.argv[1])), views())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(os.getpid())],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout == "None []\n", done.stderr


def test_a_window_of_files(tmp_path: Path) -> None:
    window, view = FolderWindow(str(tmp_path)), FolderView(str(tmp_path))
    assert window.questions() == b""
    assert view.read() is None
    view.ask()
    assert window.questions() == b"look\n"
    assert window.questions() == b""
    view.ask(stacks_of=3)
    assert eventually(window.questions) == b"stacks 3\n"
    window.show(json.dumps({"at": 1}).encode())
    assert eventually(view.read) == b'{"at": 1}'
    later = FolderView(str(tmp_path))
    assert later.read() is None  # what is there is of an earlier look
    (tmp_path / "exit").write_text("0")
    with pytest.raises(Closed):
        view.read()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    window, view = FolderWindow(str(tmp_path / "x")), FolderView(str(tmp_path / "x"))
    assert window.questions() == b""
    window.show(b"nobody sees it")
    with pytest.raises(Closed):
        view.ask()
