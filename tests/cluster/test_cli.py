"""The command line, and one driver run in all three ways: by itself, by mpiexec, by `run`."""

import fcntl
import getpass
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import eventually, mpi_flavour, patient

ROOT = Path(__file__).resolve().parents[2]

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """`cli("run", "-n", "2", ...)`: run `python -m hpcdist`, in a folder and session of its own."""

    def run(
        *args: str, env: dict[str, str] | None = None, stdin: str = "", python: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *python, "-m", "hpcdist", *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=patient(50),
            start_new_session=True,
            check=False,
        )

    return run


# --- one driver, three ways ------------------------------------------------------------------

Launched = Callable[..., Any]
WAYS = ["python", "mpiexec 1", "mpiexec 2", "mpiexec 5", "mpiexec 16", "run 0", "run 2"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    way: str = request.param
    if way.startswith("mpiexec") and mpi_flavour() == "none":
        pytest.skip("there is no mpiexec")
    return way


@pytest.fixture
def launched(way: str, script: Callable[..., Any], cli: Cli, tmp_path: Path) -> Launched:
    """`launched(text, *args)`: run a driver in the way of this test; returns (code, out, err)."""
    kind, _, number = way.partition(" ")

    def launch(text: str, *args: str) -> tuple[int, str, str]:
        if kind == "run":
            (tmp_path / "driver.py").write_text(text)
            done = cli("run", "-n", number, "driver.py", *args)
            return done.returncode, done.stdout, done.stderr
        finished = script(text, ranks=int(number) if number else None, args=args)
        return finished.rc, finished.out, finished.err

    return launch


def workers_of(way: str) -> list[int]:
    """The pids that `init()` without a number leaves a driver with."""
    kind, _, number = way.partition(" ")
    count = {"python": 0, "mpiexec": int(number or 1) - 1, "run": int(number or 0)}[kind]
    return list(range(2, 2 + count)) or [1]


DRIVER = """
import sys
import hpcdist

hpcdist.init()
hpcdist.init()

def talk(word):
    print(word)
    return hpcdist.myid()

print(hpcdist.workers(), __name__, sys.argv[1:])
print([hpcdist.remotecall_fetch(talk, pid, "hello") for pid in hpcdist.workers()])
if sys.argv[1:] == ["raise"]:
    raise LookupError("the end")
if sys.argv[1:] == ["text"]:
    sys.exit("some last words")
if sys.argv[1:]:
    sys.exit(int(sys.argv[1]))
"""


def test_a_driver_runs_in_every_way(launched: Launched, way: str) -> None:
    code, out, _ = launched(DRIVER)
    pids = workers_of(way)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == f"{pids} __main__ []"
    spoken = ["hello"] if pids == [1] else [f"From worker {pid}:\thello" for pid in pids]
    assert lines[1:-1] == spoken
    assert lines[-1] == str(pids)


@pytest.mark.parametrize(("argument", "code"), [("7", 7), ("0", 0), ("text", 1)])
def test_the_drivers_exit_code_is_the_programs(
    launched: Launched, argument: str, code: int
) -> None:
    got, _, err = launched(DRIVER, argument)
    assert got == code
    assert ("some last words" in err) == (argument == "text")


def test_a_drivers_exception_ends_all_with_its_traceback(launched: Launched) -> None:
    code, _, err = launched(DRIVER, "raise")
    assert code == 1
    assert err.count("LookupError: the end") == 1
    assert 'raise LookupError("the end")' in err
    assert str(ROOT / "hpcdist") not in err
    assert "runpy" not in err


def test_a_number_for_init_counts_where_nobody_else_said_one(launched: Launched, way: str) -> None:
    code, out, _ = launched("import hpcdist; hpcdist.init(2); print(hpcdist.workers())")
    given = workers_of(way)
    assert code == 0
    assert out.strip() == str([2, 3] if given == [1] else given)


def test_the_first_program_of_the_readme(launched: Launched, way: str) -> None:
    code, out, err = launched((ROOT / "docs" / "examples" / "first.py").read_text())
    pids = [2, 3, 4] if workers_of(way) == [1] else workers_of(way)
    assert code == 0, err
    assert "3.1415926536" in out
    assert f"16 from {pids[0]}" in out
    assert f"On worker {pids[-1]}:\nZeroDivisionError: division by zero" in out


# --- run -------------------------------------------------------------------------------------


def test_run_is_as_python_would(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "beside.py").write_text("name = 'beside'")
    (folder / "driver.py").write_text(
        "import sys, beside, hpcdist\n"
        "print([__name__, __file__, __spec__, __package__, sys.argv, sys.path[0]])\n"
        "print(sys.modules['__main__'].__dict__ is globals())\n"
        "print(hpcdist.remotecall_fetch(lambda: __import__('beside').name, hpcdist.ANY))\n"
    )
    args = ["elsewhere/driver.py", "-n", "3", "--help"]
    ours = cli("run", "-n", "1", *args)
    plain = subprocess.run(
        [sys.executable, *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ours.stdout == plain.stdout
    assert ours.stdout.endswith("beside\n")


def test_run_a_module(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "__main__.py").write_text(
        "import sys, hpcdist\n"
        "def f(): return hpcdist.myid()\n"
        "print(__name__, __package__, sys.argv[1:], hpcdist.remotecall_fetch(f, 2))\n"
    )
    done = cli("run", "-n", "1", "-m", "package", "-n", "5")
    assert done.stdout == "__main__ package ['-n', '5'] 2\n"


def test_run_a_folder(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").write_text("import helper; print(helper.value)")
    (tmp_path / "app" / "helper.py").write_text("value = 3")
    assert cli("run", "-n", "1", "app").stdout == "3\n"


def test_a_program_that_does_not_compile(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("a = = 1")
    done = cli("run", "-n", "1", "bad.py")
    assert done.returncode == 1
    assert "SyntaxError" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_do_not_run_the_driver(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(
        "import hpcdist\nprint('once')\n"
        "print(hpcdist.everywhere.call(lambda: 'once' in dir(), pids=[2, 3]))\n"
    )
    assert cli("run", "-n", "2", "driver.py").stdout == "once\n{2: False, 3: False}\n"


def test_an_excepthook_of_the_drivers_is_used(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(
        "import sys\n"
        "def hook(kind, value, tb): print('hook', value, tb.tb_frame.f_code.co_name)\n"
        "sys.excepthook = hook\n"
        "raise ValueError('x')\n"
    )
    done = cli("run", "-n", "1", "driver.py")
    assert (done.returncode, done.stdout) == (1, "hook x <module>\n")


def test_an_interrupted_driver_ends_as_under_python(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text("raise KeyboardInterrupt")
    done = cli("run", "-n", "1", "driver.py")
    assert done.returncode == -signal.SIGINT


def test_the_exit_code_stands_though_workers_are_busy(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(
        "import sys, time, hpcdist\nhpcdist.remotecall(time.sleep, 2, 1000)\nsys.exit(9)\n"
    )
    began = time.monotonic()
    assert cli("run", "-n", "2", "driver.py").returncode == 9
    assert time.monotonic() - began < 10


def test_run_is_not_for_an_mpi_launch(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "driver.py").touch()
    done = cli("run", "-n", "1", "driver.py", env={"PMI_RANK": "0", "PMI_SIZE": "2"})
    assert done.returncode == 2
    assert "init()" in done.stderr


def test_workers_that_do_not_come_up(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text("print('never')")
    done = cli("run", "-n", "1", "driver.py", env={"HPCDIST_TIMEOUT": "0.001"})
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("hpcdist run: ")
    assert "did not register" in done.stderr
    assert "Traceback" not in done.stderr


# --- machine files ---------------------------------------------------------------------------


def test_a_machine_file_adds_workers_here(cli: Cli, tmp_path: Path) -> None:
    lines = f"# here\n2*localhost\n\n{getpass.getuser()}@{socket.gethostname()}  # one more\n"
    (tmp_path / "machines").write_text(lines)
    (tmp_path / "driver.py").write_text("import hpcdist; print(hpcdist.workers())")
    assert cli("run", "--machine-file", "machines", "driver.py").stdout == "[2, 3, 4]\n"


@pytest.mark.parametrize(
    "line", ["two words", "*localhost", "some*localhost", "-oProxyCommand=x", "localhost:0"]
)
def test_a_machine_file_that_is_not_understood_is_refused(
    cli: Cli, tmp_path: Path, line: str
) -> None:
    (tmp_path / "machines").write_text(line)
    (tmp_path / "driver.py").touch()
    done = cli("run", "--machine-file", "machines", "driver.py")
    assert done.returncode == 2
    assert line in done.stderr
    assert "[count*][user@]host" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_other_machines_of_a_file_are_reached_by_ssh(cli: Cli, tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "no way to $*" >&2\nexit 255\n')
    ssh.chmod(0o755)
    (tmp_path / "machines").write_text("localhost\n2*nobody@elsewhere.example:2222\n")
    (tmp_path / "driver.py").touch()
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = cli("run", "--machine-file", "machines", "driver.py", env={"PATH": path})
    assert done.returncode == 1
    assert done.stderr.startswith("hpcdist run: nobody@elsewhere.example port 2222: no way to -o")
    assert "Traceback" not in done.stderr


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", "command is missing"),
        ("frobnicate", "'frobnicate'"),
        ("--frob", "--frob"),
        ("run", "-n N"),
        ("run -n 2", "program to run is missing"),
        ("run -n two driver.py", "'two'"),
        ("run -n -1 driver.py", "'-1'"),
        ("run -n 1 missing.py", "no file missing.py"),
        ("run -n 1 -m", "name of a module"),
        ("run --machine-file missing driver.py", "missing"),
        ("repl -p x", "'x'"),
        ("repl more", "more"),
        ("demo -n 1", "'1'"),
        ("worker", "--join"),
    ],
)
def test_wrong_arguments(cli: Cli, tmp_path: Path, args: str, words: str) -> None:
    (tmp_path / "driver.py").touch()
    done = cli(*args.split())
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("args", ["--help", "run --help", "repl -h", "demo -h", "worker -h"])
def test_help(cli: Cli, args: str) -> None:
    done = cli(*args.split())
    assert done.returncode == 0
    assert done.stdout.startswith("usage: hpcdist")
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_version(cli: Cli) -> None:
    import hpcdist

    assert cli("--version").stdout == f"hpcdist {hpcdist.__version__}\n"


# --- a closed pipe -----------------------------------------------------------------------------

CHATTY = """
import hpcdist

def talk():
    for k in range(2000):
        print("line", k, flush=True)

hpcdist.everywhere.call(talk)
talk()
"""


@pytest.mark.parametrize(
    "args",
    [
        "doctor",
        "script -n 2 --scheduler slurm driver.py",
        "submit -n 2 --scheduler slurm --dry-run driver.py",
        "run -n 1 driver.py",
        "demo",
        "--help",
    ],
)
@pytest.mark.parametrize("streams", ["stdout", "both"])
def test_a_closed_pipe_ends_quietly(args: str, streams: str, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(CHATTY)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "hpcdist", *args.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=writer if streams == "both" else subprocess.PIPE,
        text=True,
        timeout=patient(50),
        check=False,
    )
    os.close(writer)
    assert not done.stderr
    # argparse swallows it; the others do what SIGPIPE does to a program.
    assert done.returncode == (0 if args == "--help" else 141)


# --- demo ------------------------------------------------------------------------------------


def shown_in_the_readme() -> str:
    text = (ROOT / "README.md").read_text()
    return text.partition("and prints\n\n```text\n")[2].partition("```\n")[0]


def without_folder(output: str) -> str:
    return re.sub(r'(?<=File ").*(?=/first\.py")', "...", output)


def test_the_demo_prints_what_the_readme_shows(cli: Cli) -> None:
    done = cli("demo")
    assert done.returncode == 0, done.stderr
    shown = f"$ mpiexec -n 4 python first.py\n\n{shown_in_the_readme()}"
    assert without_folder(done.stdout) == shown


def test_demo_without_an_mpi(cli: Cli, tmp_path: Path) -> None:
    # Finders that do not see mpi4py are the nearest thing to a machine without it.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blind:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def find_spec(self, name, *rest):\n"
        "        hidden = name.partition('.')[0] == 'mpi4py'\n"
        "        return None if hidden else self.finder.find_spec(name, *rest)\n"
        "sys.meta_path[:] = map(Blind, sys.meta_path)\n"
    )
    done = cli("demo", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n\n")
    assert "without MPI" in first
    assert without_folder(rest) == shown_in_the_readme()


# --- worker ----------------------------------------------------------------------------------


def test_a_worker_starts_light(cli: Cli) -> None:
    done = cli("worker", "--join", "missing", python=("-X", "importtime"))
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hpcdist._worker.worker" in loaded
    heavy = {"argparse", "asyncio", "jinja2", "mpi4py", "numpy", "runpy.run_path", "ssl"}
    assert not loaded & (heavy | {"hpcdist._cli.parser", "hpcdist._managers.lifecycle"})


@pytest.mark.parametrize("text", ["", "no json\n"])
def test_a_worker_that_is_told_nothing(cli: Cli, text: str) -> None:
    done = cli("worker", "--join", "-", stdin=text)
    assert done.returncode == 1
    assert done.stderr == "hpcdist worker: standard input did not bring a join file\n"


JOINS_BY_STDIN = """
import subprocess
import hpcdist


class ByStdin(hpcdist.ClusterManager):
    def launch(self, params):
        command = self.worker_command(params)
        with open(command[-1]) as file:
            text = file.read()
        worker = subprocess.Popen([*command[:-1], "-"], stdin=subprocess.PIPE, text=True)
        worker.stdin.write(text)  # and the pipe stays open
        worker.stdin.flush()
        self.worker = worker
        yield hpcdist.WorkerConfig(process=worker)

    def manage(self, pid, config, op):
        if op == "deregister":
            config.process.stdin.close()
            config.process.wait()


if __name__ == "__main__":
    pids = hpcdist.addprocs(ByStdin())
    print(hpcdist.remotecall_fetch(lambda: hpcdist.myid(), pids[0]))
    hpcdist.rmprocs(pids)
"""


def test_a_worker_joins_by_stdin(script: Callable[..., Any]) -> None:
    done = script(JOINS_BY_STDIN)
    assert (done.rc, done.out) == (0, "2\n"), done.err


# --- repl ------------------------------------------------------------------------------------


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *args: str, cwd: Path) -> None:
        ours, theirs = pty.openpty()
        self.fd = ours
        self.text = ""
        begin = (
            "import fcntl, os, sys, termios\n"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "main = 'import sys; sys.modules[\"IPython\"] = None; '  # the plain prompt, always\n"
            "main += 'from hpcdist._cli.main import main; sys.exit(main())'\n"
            "os.execv(sys.executable, [sys.executable, '-c', main, *sys.argv[1:]])\n"
        )
        try:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x18\0\xc8\0\0\0\0\0")  # 24 lines of 200
            self.process = subprocess.Popen(
                [sys.executable, "-c", begin, *args],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
                start_new_session=True,
            )
        finally:
            os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def press_control_c(self) -> None:
        """Press Ctrl-C once the program waits: Python, too, loses one that comes just before."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        assert eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
        self.type("\x03")

    def enter(self, line: str, answer: str) -> None:
        """Type a line and wait for its answer and the next prompt."""
        self.text = ""
        self.type(line + "\n")
        self.expect(rf"(?s){answer}.*(>>> |In \[)")

    def expect(self, pattern: str, timeout: float = 20.0) -> None:
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.text):
            self._read(deadline - time.monotonic())
            if time.monotonic() > deadline:
                raise AssertionError(f"{pattern!r} did not appear in:\n{self.text}")

    def _read(self, timeout: float) -> None:
        ready, _, _ = select.select([self.fd], [], [], max(0.0, timeout))
        if ready:
            try:
                self.text += os.read(self.fd, 65536).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the other end is closed
                time.sleep(0.01)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def repl(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def start(*args: str) -> Terminal:
        terminals.append(Terminal("repl", *args, cwd=tmp_path))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_a_session(repl: Callable[..., Terminal]) -> None:
    terminal = repl("-p", "2")
    terminal.expect(r"process 1, workers 2, 3\n(.|\n)*(>>> |In \[)")
    terminal.enter("hpcdist.nprocs() * 111", "333")
    terminal.enter("offset = 40", "")
    terminal.enter("remotecall_fetch(lambda: offset + myid(), 3) * 10", "430")
    terminal.enter(
        "remotecall_fetch(print, 2, 'written ' 'there')", "From worker 2:\twritten there"
    )
    terminal.enter("1 / 0", "ZeroDivisionError")
    terminal.type("\x04")
    assert eventually(lambda: terminal.process.poll() is not None, 20)
    assert terminal.process.returncode == 0


def test_control_c_in_a_session(repl: Callable[..., Terminal]) -> None:
    terminal = repl("-p", "2")
    terminal.expect(r">>> |In \[")
    terminal.text = ""
    terminal.type("half a li")
    terminal.expect("half a li")
    terminal.press_control_c()
    terminal.expect(r"KeyboardInterrupt(.|\n)*>>> |In \[")
    terminal.enter("nworkers() * 111", "222")
    # A wait: it ends, the call goes on.
    terminal.text = ""
    terminal.type("fetch(remotecall(lambda: (print('it', 'began'), hpcdist.sleep(1000)), 2))\n")
    terminal.expect("it began")
    terminal.press_control_c()
    terminal.expect(r"KeyboardInterrupt")
    terminal.enter("remotecall_fetch(myid, 2) * 111", "222")
    terminal.enter("[s.pid * 7 for s in hpcdist.status()]", r"\[7, 14, 21\]")
    terminal.type("\x04")
    assert eventually(lambda: terminal.process.poll() is not None, 20)
    assert terminal.process.returncode == 0


def test_a_session_without_workers_remembers_its_lines(
    repl: Callable[..., Terminal], tmp_path: Path
) -> None:
    pytest.importorskip("readline")
    terminal = repl()
    terminal.expect(r"no workers yet(.|\n)*(>>> |In \[)")
    terminal.enter("6 * 7 * 10", "420")
    terminal.type("exit()\n")
    assert eventually(lambda: terminal.process.poll() is not None, 20)
    history = Path(os.environ["HPCDIST_DIR"]) / "history"
    assert "6 * 7 * 10" in history.read_text()


def test_a_piped_session(cli: Cli) -> None:
    done = cli("repl", "-p", "1", stdin="print(remotecall_fetch(myid, 2) * 111)\n")
    assert done.returncode == 0
    assert "222" in done.stdout
