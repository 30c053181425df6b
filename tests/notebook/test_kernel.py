"""Cells run by a real kernel."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import eventually

manager = pytest.importorskip("jupyter_client.manager")
pytest.importorskip("ipykernel")

TIMEOUT = 60.0


class Notebook:
    """A kernel, and what has come of its cells."""

    def __init__(self, folder: Path) -> None:
        env = {**os.environ, "JUPYTER_RUNTIME_DIR": str(folder), "IPYTHONDIR": str(folder)}
        os.environ["JUPYTER_RUNTIME_DIR"] = str(folder)
        self.kernel, self._client = manager.start_new_kernel(env=env, startup_timeout=TIMEOUT)
        self.outputs: dict[str, list[tuple[str, str]]] = {}  # by cell: kinds and texts
        self._idle: set[str] = set()

    def begin(self, source: str) -> str:
        """Begin to run a cell; return its name."""
        return str(self._client.execute(source))

    def hear(self, timeout: float = TIMEOUT) -> None:
        """Take the next message of the kernel in."""
        message = self._client.get_iopub_msg(timeout=timeout)
        cell = message["parent_header"].get("msg_id", "")
        kind, content = message["msg_type"], message["content"]
        found = self.outputs.setdefault(cell, [])
        if kind == "stream":
            found.append((content["name"], content["text"]))
        elif kind in ("execute_result", "display_data"):
            found.append(("result", content["data"]["text/plain"]))
            if "text/html" in content["data"]:
                found.append(("html", content["data"]["text/html"]))
        elif kind == "error":
            found.append(("error", content["ename"] + ": " + content["evalue"]))
        elif kind == "status" and content["execution_state"] == "idle":
            self._idle.add(cell)

    def end(self, cell: str) -> None:
        """Wait until a cell has ended."""
        while cell not in self._idle:
            self.hear()

    def run(self, source: str) -> str:
        """Run a cell to its end; return its name."""
        cell = self.begin(source)
        self.end(cell)
        return cell

    def text(self, cell: str, *kinds: str) -> str:
        """Return what shows under a cell."""
        found = self.outputs.get(cell, [])
        return "".join(text for kind, text in found if not kinds or kind in kinds)

    def value(self, source: str) -> str:
        """Run an expression, and return what it shows."""
        return self.text(self.run(source), "result")

    def close(self) -> None:
        """End the kernel."""
        self._client.stop_channels()
        self.kernel.shutdown_kernel(now=True)
        self.kernel.cleanup_resources()


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    """A notebook with two workers, 2 and 3, and our magics."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    made = Notebook(tmp_path)
    try:
        begun = made.run("import hpcdist, time\npids = hpcdist.addprocs(2)\n%load_ext hpcdist")
        assert "error" not in dict(made.outputs[begun]), made.text(begun)
        yield made
    finally:
        made.close()


def test_magics_and_tables(notebook: Notebook) -> None:
    cell = notebook.run("%%px\nimport os\nprint('here is', hpcdist_pid := os.getpid())\n6 * 7")
    shown = notebook.text(cell)
    assert "From worker 2:\there is" in shown
    assert "From worker 3:\there is" in shown
    assert "Out[2]: 42\nOut[3]: 42\n" in shown
    assert notebook.text(notebook.run("%%px 3\n'only'"), "stdout") == "Out[3]: 'only'\n"
    assert notebook.text(notebook.run("%%px 2-3 --on one\n1"), "stdout") == "Out[2]: 1\n"
    notebook.run("%%everywhere\nshared = 'all have it'")
    assert notebook.value("shared") == "'all have it'"
    assert "Out[3]: 'all have it'" in notebook.text(notebook.run("%%px\nshared"))
    pids = notebook.run("%pids")
    assert "<th>pid</th>" in notebook.text(pids, "html")
    assert "idle" in notebook.text(pids, "result")
    assert "ZeroDivisionError" in notebook.text(notebook.run("%%px 2\n1 / 0"), "error")
    assert "not 'two three'" in notebook.text(notebook.run("%%px two three\n1"), "error")
    assert "no worker" in notebook.text(notebook.run("%%px gpu\n1"), "error").lower()


def test_prints_show_under_the_cell_that_caused_them(notebook: Notebook, tmp_path: Path) -> None:
    go = tmp_path / "go"
    notebook.run(
        "def later(path, text):\n"
        "    import os, time\n"
        "    while not os.path.exists(path): time.sleep(0.01)\n"
        "    print(text)\n"
    )
    first = notebook.run(f"one = hpcdist.remotecall(later, 2, {str(go)!r}, 'of the first')")
    second = notebook.run(f"two = hpcdist.remotecall(later, 3, {str(go)!r}, 'of the second')")
    go.touch()
    third = notebook.run("one.result(), two.result(); hpcdist.remotecall_fetch(print, 2, 'third')")
    deadline = time.monotonic() + TIMEOUT
    while "second" not in notebook.text(second) or "first" not in notebook.text(first):
        notebook.hear(deadline - time.monotonic())
    assert notebook.text(first, "stdout") == "From worker 2:\tof the first\n"
    assert notebook.text(second, "stdout") == "From worker 3:\tof the second\n"
    assert notebook.text(third, "stdout") == "From worker 2:\tthird\n"
    warned = notebook.run(
        "def warn():\n"
        "    import sys\n"
        "    print('mind this', file=sys.stderr)\n"
        "hpcdist.pmap(lambda k: warn(), [1], pool=hpcdist.WorkerPool([3]))\n"
    )
    assert notebook.text(warned, "stderr") == "From worker 3:\tmind this\n"


def test_stopping_a_cell_ends_its_calls_alone(notebook: Notebook, tmp_path: Path) -> None:
    go = tmp_path / "go"
    notebook.run(
        "def linger(path, mark):\n"
        "    import os, time\n"
        "    open(mark, 'w').close()\n"
        "    while not os.path.exists(path): time.sleep(0.01)\n"
        "    return 'done'\n"
    )
    notebook.run(f"old = hpcdist.remotecall(linger, 2, {str(go)!r}, {str(tmp_path / 'a')!r})")
    stopped = notebook.begin(
        f"hpcdist.remotecall_fetch(linger, 3, {str(go)!r}, {str(tmp_path / 'b')!r})"
    )
    eventually((tmp_path / "a").exists)
    eventually((tmp_path / "b").exists)
    notebook.kernel.interrupt_kernel()
    notebook.end(stopped)
    assert "KeyboardInterrupt" in notebook.text(stopped, "error")
    # Worker 3 is free again; worker 2 goes on with what an earlier cell has begun.
    assert notebook.value("hpcdist.remotecall_fetch(hpcdist.myid, 3)") == "3"
    assert notebook.value("old.done()") == "False"
    go.touch()
    assert notebook.value("old.result()") == "'done'"


def gone(os_pid: int) -> bool:
    try:
        os.kill(os_pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_no_worker_outlives_the_kernel(notebook: Notebook, how: str) -> None:
    said = notebook.value("[row.os_pid for row in hpcdist.status()]")
    driver, *others = (int(word) for word in said.strip("[]").split(","))
    if how == "restart":
        notebook.kernel.restart_kernel(now=False)
    else:
        os.kill(driver, signal.SIGKILL)
    assert len(others) == 2
    for os_pid in others:
        assert eventually(lambda os_pid=os_pid: gone(os_pid))


def test_unloading(notebook: Notebook) -> None:
    notebook.run("%unload_ext hpcdist")
    shown: Any = notebook.text(notebook.run("%%px\n1"), "stderr", "error")
    assert "px" in shown
    assert notebook.value("hpcdist.remotecall_fetch(hpcdist.myid, 3)") == "3"
