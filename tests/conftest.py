"""What every test gets: a time limit, a printed seed, a check for leftovers, and the fixtures.

Three kinds of run share this file. `pytest tests/unit tests/cluster` is one process, pid 1 of the
clusters its tests make. `pytest tests/slurm` is one too; its tests' programs run on the machines of
a cluster (see `tests/slurm/conftest.py`). `mpiexec -n 4 python -m pytest --with-mpi tests/mpi` is
four, which run the same tests in step (see `tests/mpi/conftest.py`); there rank 0 chooses seed and
temporary folder.

With `-n 4` (pytest-xdist) there are four runs of the first kinds side by side, each with a mark, a
temporary folder and a /dev/shm of its own; the process that started them, the controller, runs no
test, and prints what they tell it.
"""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import helpers
from tests._leftovers import MARK, Leftovers, descriptors
from tests._limits import Limit, dump_stacks_of
from tests._own_shm import hide_shm

ROOT = Path(__file__).resolve().parent.parent

# Seconds a test may take, and the whole end of a session: the check for leftovers, and the
# interpreter's exit with all that is registered there.
TEST_LIMIT = 60.0
SESSION_END_LIMIT = 60.0
# When all ranks of a world are too late, they report one after the other.
RANK_REPORT_TIME = 0.5
# Descriptors that may come to stay: a module may open a few for good (a selector, the interpreter's
# own), a leak grows with every module and so passes the second figure.
MODULE_SLACK = 8
SESSION_SLACK = 24


@dataclass
class Run:
    """The state of this session."""

    seed: int
    rank: int
    size: int
    folder: Path
    limit: Limit
    leftovers: Leftovers
    descriptors_at_start: Any
    left_at_end: list[str]

    @property
    def in_world(self) -> bool:
        """Whether this process is one of several ranks."""
        return self.size > 1


RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of `random` in every test")
    parser.addoption("--need-hosts", action="store_true", help="no hosts: a failure, not a skip")


def go_without(request: pytest.FixtureRequest, why: str) -> None:
    """Skip, or fail where it was said that hosts can be made."""
    if request.config.getoption("--need-hosts"):
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


# --- the session ------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    # A run in the background of a shell has SIGINT ignored, and its children inherit that: the
    # drivers whose Ctrl-C is tested would not hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = config.getoption("--seed")
    if seed is None:
        seed = config.option.seed = random.SystemRandom().randrange(2**32)  # xdist passes it on
    rank, size, (seed, folder) = _agree_on_start(config, seed)
    mark = uuid.uuid4().hex
    _set_environment(folder, mark)
    if size == 1:
        hide_shm()
    # Capturing is suspended while plugins are configured: descriptor 2 is the real stderr here.
    stderr_fd = os.dup(2)
    leftovers = Leftovers(mark, folder)
    config.stash[RUN] = Run(
        seed=seed,
        rank=rank,
        size=size,
        folder=folder,
        limit=Limit(
            stderr_fd,
            report=lambda headline: _report_hang(config, stderr_fd, headline),
            clean_up=lambda: _clean_up_after_hang(config),
        ),
        leftovers=leftovers,
        descriptors_at_start=descriptors(),
        left_at_end=[],
    )
    if rank > 0:
        _keep_quiet(config)


def pytest_report_header(config: pytest.Config) -> str:
    run = config.stash[RUN]
    ranks = f", {run.size} ranks" if run.in_world else ""
    return f"seed: {run.seed} (again with --seed {run.seed}), mpi: {helpers.mpi_flavour()}{ranks}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash[RUN]
    # Never taken back: it also covers the interpreter's exit.
    run.limit.start("the end of the session", SESSION_END_LIMIT)
    run.left_at_end += _leftovers_at_end(run)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_at_end"] = run.left_at_end
        run.limit.stop()  # from here on it waits for the others, until the controller ends it
    if run.left_at_end and session.exitstatus in (pytest.ExitCode.OK, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests._side_by_side import ByCluster

    # In the order of the command line: what takes long is named first.
    config.option.loadscopereorder = False
    return ByCluster(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        from tests._side_by_side import begins_at

        items.sort(key=lambda item: begins_at(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what a process that ran tests beside others has found at its end."""
    left = [error] if error else getattr(node, "workeroutput", {}).get("left_at_end", [])
    node.config.stash[RUN].left_at_end += [f"{node.gateway.id}: {what}" for what in left]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left = terminalreporter.config.stash[RUN].left_at_end
    if left:
        terminalreporter.section("ERROR: left behind by this session", red=True)
        for what in left:
            terminalreporter.write_line(what)


def pytest_unconfigure(config: pytest.Config) -> None:
    run = config.stash.get(RUN, None)
    if run is not None and run.rank == 0:
        shutil.rmtree(run.folder, ignore_errors=True)


def _agree_on_start(config: pytest.Config, seed: int) -> tuple[int, int, tuple[int, Path]]:
    """Return rank, size, and the seed and folder that all ranks share."""
    if not config.getoption("--with-mpi", False):
        return 0, 1, (seed, _make_folder())
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    shared = (seed, _make_folder()) if world.rank == 0 else None
    return world.rank, world.size, world.bcast(shared)


def _make_folder() -> Path:
    # Directly below /tmp and short: sockets with at most 107 characters in their names live in it.
    # The run around this one has set the variable.
    return Path(tempfile.mkdtemp(prefix="ht-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))


def _set_environment(folder: Path, mark: str) -> None:
    """Give this run a mark, a temporary folder of its own, and nobody's settings."""
    outer = os.environ.get(MARK)
    for name in [name for name in os.environ if name.startswith("HPCDIST_")]:
        del os.environ[name]
    # Images of containers set this. Each process that a test starts would compile the package anew:
    # with it, a driver and its worker take twice the processor time, and so does collecting tests.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.environ[MARK] = f"{outer}:{mark}" if outer else mark
    os.environ["HPCDIST_DIR"] = str(folder / "state")
    # The tests' own files stay where pytest keeps those of the last three runs.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # forget the one looked up before


def _keep_quiet(config: pytest.Config) -> None:
    """Let only rank 0 print; another rank's text is shown when its session went wrong as a whole.

    What fails in a test on another rank, rank 0 reports.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    text = io.StringIO()
    screen, reporter._tw._file = reporter._tw._file, text

    def show() -> None:
        session = reporter._session
        expected = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if session is None or session.exitstatus not in expected:
            screen.write(f"rank {config.stash[RUN].rank}:\n{text.getvalue()}\n")

    config.add_cleanup(show)


def _leftovers_at_end(run: Run) -> list[str]:
    left = run.leftovers.wait_processes()
    if not run.in_world:
        _shut_down()
        left += run.leftovers.wait_processes()
    if run.rank == 0:
        left += run.leftovers.wait_files()
    if not run.in_world:
        left += run.leftovers.wait_descriptors(run.descriptors_at_start, SESSION_SLACK)
    return left


def _shut_down() -> None:
    """End what the package keeps in this process between clusters, if it is loaded at all."""
    hpcdist = sys.modules.get("hpcdist")
    if hpcdist is not None and hasattr(hpcdist, "shutdown"):
        hpcdist.shutdown()


# --- the time limit ---------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Set the alarm for the whole of a test: fixtures, test, and what is taken down after it."""
    run = item.config.stash[RUN]
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0]) if marker else TEST_LIMIT
    run.limit.start(item.nodeid, helpers.patient(limit))
    random.seed(f"{run.seed} {item.nodeid}")
    try:
        return (yield)
    finally:
        run.limit.stop()


def _report_hang(config: pytest.Config, stderr_fd: int, headline: str) -> None:
    """Print what may tell why a test hangs; the process ends after it."""
    run = config.stash[RUN]

    def say(text: str) -> None:
        os.write(stderr_fd, text.encode(errors="replace"))

    processes = run.leftovers.processes()
    time.sleep(run.rank * RANK_REPORT_TIME)
    say(f"{headline}on rank {run.rank}\n" if run.in_world else headline)
    say("".join(f"{process}\n" for process in processes))
    asked = dump_stacks_of([process.os_pid for process in processes])
    say(f"(asked for their stacks: {asked})\n")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=False)
        out, err = capture.read_global_capture()
        say(f"\n=== captured stdout ===\n{out}\n=== captured stderr ===\n{err}")


def _clean_up_after_hang(config: pytest.Config) -> None:
    """Leave nothing on the machine that would disturb the next run."""
    run = config.stash[RUN]
    # The first rank to end takes the world with it.
    time.sleep((run.size - run.rank - 1) * RANK_REPORT_TIME)
    run.leftovers.wait_processes(timeout=0)
    shutil.rmtree(run.folder, ignore_errors=True)


# --- leftovers --------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a module that leaves processes, descriptors or files.

    Being the first fixture of its module, it is taken down last.
    """
    run = request.config.stash[RUN]
    before = descriptors()
    yield
    left = run.leftovers.wait_processes()
    # Inside a world, the cluster ends with its `with` block, and MPI opens files as it sees fit.
    if not run.in_world:
        _shut_down()
        left += run.leftovers.wait_files()
        left += run.leftovers.wait_descriptors(before, MODULE_SLACK)
    if left:
        pytest.fail(f"{request.node.nodeid} left behind:\n" + "\n".join(left), pytrace=False)


# --- fixtures ---------------------------------------------------------------


@pytest.fixture(scope="module")
def pids() -> Iterator[list[int]]:
    """Three workers for all tests of a module."""
    import hpcdist

    yield hpcdist.addprocs(3)
    _remove(hpcdist.workers())


@pytest.fixture
def fresh() -> Iterator[Callable[..., list[int]]]:
    """`fresh(n, **params)`: workers for one test alone."""
    import hpcdist

    added: list[int] = []

    def add(what: Any = 1, **params: Any) -> list[int]:
        new = hpcdist.addprocs(what, **params)
        added.extend(new)
        return new

    yield add
    living = set(hpcdist.workers())
    _remove([pid for pid in added if pid in living])


def _remove(pids: Sequence[int]) -> None:
    import hpcdist

    # `workers()` is [1] when there is none.
    left = [pid for pid in pids if pid != 1]
    if left:
        hpcdist.rmprocs(left)


@dataclass(frozen=True)
class Finished:
    """How a driver ended."""

    rc: int
    out: str
    err: str


@pytest.fixture
def script(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Finished]:
    """`script(text, ranks=None, args=(), stdin=None, env=None, timeout=60)`: run a driver.

    The driver is a file of its own in `tmp_path`, with its own session, so that a Ctrl-C or a kill
    sent to it reaches nobody else. With `ranks` it runs under this environment's mpiexec. A value
    None in `env` takes a variable away.
    """
    run = request.config.stash[RUN]
    count = 0

    def start(
        text: str,
        ranks: int | None = None,
        args: Sequence[str] = (),
        stdin: str | None = None,
        env: dict[str, str | None] | None = None,
        timeout: float = 60,
    ) -> Finished:
        nonlocal count
        count += 1
        driver = tmp_path / f"driver{count}.py"
        driver.write_text(text)
        command = [sys.executable, str(driver), *args]
        if ranks is not None:
            command = [*helpers.mpiexec(ranks), *command]
        run.limit.at_least(timeout + 10)
        timeout = helpers.patient(timeout)
        return _run_driver(
            command, tmp_path / f"driver{count}", stdin, _driver_environment(ranks, env), timeout
        )

    return start


def _driver_environment(ranks: int | None, env: dict[str, str | None] | None) -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    environment: dict[str, str | None] = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT),
        "PYTHONUNBUFFERED": None,  # with it a line is two writes, and mpiexec mixes those of ranks
        **(helpers.mpi_environment() if ranks is not None else {}),
        **(env or {}),
    }
    return {name: value for name, value in environment.items() if value is not None}


def _run_driver(
    command: list[str], base: Path, stdin: str | None, env: dict[str, str], timeout: float
) -> Finished:
    # Files, not pipes: a pipe would keep us waiting for every process that has inherited it.
    files = {name: base.with_suffix(f".{name}") for name in ("in", "out", "err")}
    files["in"].write_text(stdin or "")
    with (
        files["in"].open("rb") as in_file,
        files["out"].open("wb") as out_file,
        files["err"].open("wb") as err_file,
        subprocess.Popen(
            command,
            stdin=in_file,
            stdout=out_file,
            stderr=err_file,
            cwd=base.parent,
            env=env,
            start_new_session=True,
        ) as process,
    ):
        try:
            rc = process.wait(timeout)
        except subprocess.TimeoutExpired:
            rc = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    out, err = (files[name].read_text(errors="replace") for name in ("out", "err"))
    if rc is None:
        pytest.fail(
            f"the driver did not end within {timeout:g} s: {command}\n"
            f"--- stdout ---\n{out}\n--- stderr ---\n{err}",
            pytrace=False,
        )
    return Finished(rc, out, err)
