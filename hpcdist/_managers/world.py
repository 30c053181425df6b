"""A world, from its start to its end: its door, its keeper, its workers' registration."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpcdist import _log
from hpcdist._errors import LaunchError
from hpcdist._managers import roster, secret, streams
from hpcdist._managers.arrivals import Arrival, Arrivals, reap
from hpcdist._managers.base import ClusterManager, KeptManager, WorkerConfig
from hpcdist._managers.door import Door
from hpcdist._managers.keepers import Keeper, RemoteKeeper
from hpcdist._managers.processes import tell
from hpcdist._monitor import output
from hpcdist._runtime.members import Member
from hpcdist._runtime.node import node
from hpcdist._transport.link import Link
from hpcdist._wire import greeting

if TYPE_CHECKING:
    from hpcdist._managers.launch import Launch

_TAIL = 20
_LOOK_EVERY = 0.25
_VERDICT = 0.2  # how long a death on this host is held back for its reason,
_VERDICT_AFAR = 1.5  # and one on another
_worlds = 0


class LaunchState(enum.Enum):
    """Where a launch is. A scheduler's own word is one too: `LaunchState("CONFIGURING")`."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @classmethod
    def _missing_(cls, value: object) -> LaunchState:
        word = object.__new__(cls)
        word._name_ = word._value_ = str(value)
        return cls._value2member_map_.setdefault(word._value_, word)  # type: ignore[return-value]

    def __str__(self) -> str:
        return str(self.value)


class World:
    """One world of a launch."""

    def __init__(self, launch: Launch, size: int | None) -> None:
        global _worlds
        _worlds += 1
        self.number = _worlds
        self.launch = launch
        self.manager = launch.manager
        self.settings = launch.settings
        self.expected = size  # how many workers are to come; None: not known yet
        self.first = roster.reserve(size) if size else 0
        self.by_rank: dict[int, int] = {}
        self.registered: list[int] = []
        self.keeper: Keeper | RemoteKeeper | None = None
        self.has_keeper = False
        self.ranks_may_leave = True
        self.mpi = False
        self.command = ""
        self.phase = "starting the launcher"
        self.label = ""  # what tells it from the launch's other worlds
        self.failure: LaunchError | None = None  # where the launch goes on without it
        self.arrivals = Arrivals()
        self.job: Any = None  # the scheduler's id
        self.verdict: Any = None  # and what it last said of the job
        self.script = ""
        self.up = False  # its keeper has spoken to us, or nobody has to
        self.closed = False
        self._over = False  # its job has ended, or does so by itself
        self._keeper_spoke = False
        self._abandoned = False
        self._seen: set[int] = set()  # ranks that have greeted
        self._living: set[int] = set()
        self._tail: deque[str] = deque(maxlen=200)
        self._cookie = secret.use()
        self._door: Door | None = None
        self._removed = threading.Lock()  # held once the folder is being removed
        self.folder = ""

    @property
    def pids(self) -> list[int]:
        """Those of its workers that have registered."""
        return self.registered

    @property
    def is_job(self) -> bool:
        """Whether a scheduler starts it, on hosts of its own choice."""
        return self.launch.jobs_of is not None

    @property
    def on_network(self) -> bool:
        """Whether its workers are on other hosts."""
        return self.launch.on_network

    @property
    def patience(self) -> float:
        """How long the death of one of its workers is held back for its reason."""
        return _VERDICT_AFAR if self.on_network else _VERDICT

    @property
    def word(self) -> str:
        """How it stands: the scheduler's word where there is one."""
        return "PENDING" if self.verdict is None else str(self.verdict.word)

    @property
    def join_file(self) -> str:
        """The path of its join file."""
        return os.path.join(self.folder, "join")

    def complete(self) -> bool:
        """Tell whether all of its workers have registered."""
        return self.expected is not None and len(self.registered) >= self.expected

    @property
    def settled(self) -> bool:
        """Whether no more workers will come."""
        return self.complete() or self._abandoned

    def log(self, n: int = _TAIL) -> list[str]:
        """Return the last lines it has printed."""
        return list(self._tail)[-n:]

    # Starting

    def prepare(self) -> None:
        """Make its folder, listen for its workers and write its join file."""
        jobs = self.launch.jobs_of
        if jobs is not None:
            self.folder = jobs.make_folder(self.settings)
        elif not self.launch.hosts_apart:  # there, its keeper makes one
            self.folder = tempfile.mkdtemp(prefix="hpcdist-")
        self._open_door()
        self._write_join()

    def start_own(self) -> None:
        """Let a manager of the user's own start its workers."""
        params = {**vars(self.settings), **self.settings.extra, "join": self.join_file}
        params.pop("extra")
        self.command = " ".join(self.manager.worker_command(params))
        node.turns.background(lambda: self._run_manager(params))

    def set_clock(self) -> None:
        """From now on its workers have so much time to register."""
        node.progress.call_later(self.settings.timeout, self._on_timeout)

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
            self._fail("the manager launched no worker")
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
        if not self.launch.pending:
            return
        for entry in self.arrivals.missing():
            process = entry.config.process
            status = process.poll() if isinstance(process, subprocess.Popen) else None
            if status:  # 0 may be a submission that is done
                self._fail(f"a worker's process ended early: {tell(status)}")
                return
        node.progress.call_later(_LOOK_EVERY, self._look_at_processes)

    def _open_door(self) -> None:
        if self.on_network:
            assert isinstance(self.manager, KeptManager)
            self._door = Door.on_network(self.manager.interface(self.settings), self._greet)
        else:
            self._door = Door.on_host(os.path.join(self.folder, "sock"), self._greet)

    def _write_join(self) -> None:
        settings = self.settings
        self.env = settings.variables
        assert self._door is not None
        self.join: dict[str, Any] = {
            **self._door.told,
            "cookie": self._cookie.hex(),
            "dir": "" if self.is_job else self.folder,
            "world": self.number,
            "size": self.expected,
            "timeout": settings.timeout,
            "how": "",
            "mpi": False,
            "path": [os.path.abspath(p) if p else os.getcwd() for p in sys.path],
            "cwd": settings.dir,
            "env": self.env,
        }
        self.save_join()

    def save_join(self, **changes: Any) -> None:
        """Write the join file, which is the cluster's secret."""
        self.join.update(changes)
        self.mpi = bool(self.join["mpi"])
        if not self.folder:
            return
        draft = self.join_file + ".new"  # whoever reads finds a whole one
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(self.join, file)
        os.replace(draft, self.join_file)

    def take(self, keeper: Keeper | RemoteKeeper) -> bool:
        """Take charge of a keeper that is being started; False if the world has ended."""
        with roster.lock:
            if not self.closed:
                self.keeper = keeper
        return self.keeper is keeper

    def watch(self, keeper: Keeper | RemoteKeeper) -> None:
        """Listen to a keeper that works for this world."""
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
        elif kind == "lost":
            self._on_lost(event["ranks"], event["why"])
        elif kind == "launcher_exit":
            if not self.complete():
                self._fail(f"the launcher ended ({tell(event['status'])})")
        elif kind == "failed":
            self._fail(event["text"])
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
            if self.launch.pending:
                self._fail(f"worker {rank} of the launch ended: {tell(status)}")
            return
        if status is None and self.is_job:
            roster.fade(pid)  # the scheduler may know more
            return
        killed = status is not None and status < 0
        roster.fade(pid, f"killed by {tell(status)}" if killed else tell(status))

    def _on_lost(self, ranks: Sequence[int], why: str) -> None:
        """One of several hosts is out of reach."""
        if not self.complete():
            self._fail(why)
        for rank in ranks:
            self._living.discard(rank)
            if rank in self.by_rank:
                roster.fade(self.by_rank[rank], why)

    def _keeper_gone(self) -> None:
        keeper, self.keeper = self.keeper, None
        if keeper is None:
            return
        node.progress.unregister(keeper.fileno())
        keeper.close()
        if self.is_job:
            node.turns.background(self._after_job)
            return
        if not self.complete():
            self._fail(keeper.gone)
        self.close()
        for pid in list(self.by_rank.values()):
            roster.fade(pid, keeper.gone)
        node.turns.background(lambda: _reap(keeper))

    def _after_job(self) -> None:
        """The job has ended, or its first node is out of reach: ask the scheduler how."""
        since = time.time()
        for pid in list(self.by_rank.values()):
            roster.fade(pid)
        assert self.launch.jobs_of is not None
        unasked = self.launch.pending or any(not roster.removed(p) for p in self.registered)
        verdict = self.launch.jobs_of.end_of(self) if unasked else None
        why = f"its job {self.job} ended" + (f": {verdict}" if verdict else "")
        if not self.complete():
            self._fail(why)
        for pid in list(self.by_rank.values()):
            roster.explain(pid, why, since)
        self.close()
        self._remove_folder()
        self._over = True

    # Registration

    def _greet(self, sock: Any) -> None:
        """Take in whoever dialled and has proved to be one of ours. On a thread of its own."""
        try:
            hello = greeting.accept(sock, self._cookie, 10.0)
            if hello.get("world") != self.number:
                raise ValueError(f"a member of world {hello.get('world')} dialled {self.number}")
            if hello["kind"] == "keeper":
                self._take_keeper(sock, hello)
                return
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
            self._fail(wrong)
            return
        if isinstance(self.manager, KeptManager):
            self._register(sock, hello, None)
            return
        entry = self.arrivals.match(hello, self.settings.timeout)
        if entry is None:
            _log.log("warning", "a worker that no WorkerConfig speaks of was turned away")
            sock.close()
            return
        self._register(sock, hello, entry)

    def _take_keeper(self, sock: Any, hello: dict[str, Any]) -> None:
        if self.up or self.closed:
            sock.close()
            return
        self.up = True
        self.phase = "starting the workers"
        self.watch(RemoteKeeper(sock, hello["host"]))
        self.set_clock()
        self.launch.changed()

    def _wrong_world(self, hello: dict[str, Any]) -> str | None:
        for what in ("python", "hpcdist"):
            ours = greeting.about()[what]
            if self.is_job and hello.get(what) != ours:
                return (
                    f"the worker on {hello['host']} has {what} {hello.get(what)}, this process "
                    f"has {ours}: choose its interpreter with python="
                )
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

    def _register(self, sock: Any, hello: dict[str, Any], entry: Arrival | None) -> None:
        with roster.lock:
            if self._abandoned or self.closed:
                sock.close()
                return
            if entry is None:
                rank = int(hello["rank"])
                pid = self.first + rank
                config = WorkerConfig(
                    host=hello["host"], os_pid=hello["os_pid"], job_id=self.job and str(self.job)
                )
            else:
                rank, pid, config = self.arrivals.all.index(entry), entry.pid, entry.config
            member = Member(
                hello["host"],
                hello["os_pid"],
                self.number,
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
        self.registered.append(pid)
        where = {"os_pid": hello["os_pid"], "host": hello["host"], "step": hello.get("step")}
        self._to_keeper({"op": "registered", "rank": rank, **where})
        self._check()

    def _check(self) -> None:
        if self.complete():
            self._shut_door()
        self.launch.changed()

    def _shut_door(self) -> None:
        if self._door is not None:
            self._door.close()
            self._door = None
        if not self.folder:
            return
        for name in ("join", "sock"):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.folder, name))

    # Failing

    def _on_timeout(self) -> None:
        if not self.complete() and not self._abandoned:
            missing = "some" if self.expected is None else self.expected - len(self.registered)
            silent = "" if self._seen else "; none has been heard of"
            who = f"{missing} worker" if missing == 1 else f"{missing} workers"
            self._fail(f"{who} did not register within {self.settings.timeout:g} s{silent}")

    def _fail(self, what: BaseException | str) -> None:
        self.launch.fail(what, world=self)

    def abandon(self) -> None:
        """End what has not registered; those that have stay."""
        if self._abandoned or self.complete():
            return
        self._abandoned = True
        self._shut_door()
        for entry in self.arrivals.abandon():
            node.turns.background(lambda entry=entry: self._kill(entry))  # type: ignore[misc]
        if not self.registered:
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

    # Ending

    def signal(self, pid: int, number: int) -> bool:
        """Send a signal to a worker through the keeper; tell whether there is one."""
        for rank, other in self.by_rank.items():
            if other == pid:
                return self._to_keeper({"op": "kill", "rank": rank, "signal": number})
        return False

    def knows_end(self, pid: int) -> bool:
        """Tell whether the keeper has told of a worker's end, or never will."""
        rank = next((rank for rank, p in self.by_rank.items() if p == pid), None)
        return self.keeper is None or rank not in self._living

    def _to_keeper(self, op: dict[str, Any]) -> bool:
        if self.keeper is None:
            return False
        try:
            self.keeper.send(op)
        except OSError:  # it has ended; its events tell
            return False
        return True

    def lost(self, pid: int) -> None:
        """A worker is gone; with the last one the world ends."""
        living = [p for p in self.registered if roster.book[p].state is not roster.State.GONE]
        if not living and (self.complete() or self._abandoned):
            self.close()

    def close(self) -> None:
        """End the world: its keeper ends what is left and removes the folder."""
        with roster.lock:
            if self.closed:
                return
            self.closed = True
        self._shut_door()
        if not self.ranks_may_leave:
            roster.release(self.registered)
        keeper = self.keeper
        if isinstance(keeper, Keeper) and not self._keeper_spoke:
            # Whatever was started in its place does not listen. It leads a session of its own.
            with contextlib.suppress(OSError):
                os.killpg(keeper.process.pid, 9)
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not self._to_keeper({"op": "end", "grace": 1.0}) and not self.is_job:
            self._remove_folder()

    def _remove_folder(self) -> None:
        if not self._removed.acquire(False) or not self.folder:
            return
        if self.launch.jobs_of is not None:
            self.launch.jobs_of.forget_folder(self)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def ended(self) -> bool:
        """Tell whether nothing of this world is left."""
        if self.is_job:
            return self._over
        return self.keeper is None

    def forget(self) -> None:
        """The scheduler has been told to end it; nobody waits for its keeper any more."""
        if self.closed:
            self._remove_folder()
            self._over = True


def _reap(keeper: Keeper | RemoteKeeper) -> None:
    try:
        keeper.wait(10)
    except Exception as exc:  # TimeoutExpired: its own watchdog ends it
        _log.log("warning", f"a keeper did not leave: {exc}")
