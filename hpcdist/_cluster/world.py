"""A world, from its start to its end: its door, its keeper, its workers' registration."""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from hpcdist import _log
from hpcdist._cluster.join_contents import join_contents
from hpcdist._cluster.launch_errors import how_ended, wrong_world
from hpcdist._cluster.listener import Listener
from hpcdist._cluster.pending_workers import Arrival, Arrivals, kill
from hpcdist._cluster.retirement import FAREWELL, mind_end, retire, tell_lingering
from hpcdist._cluster.roster import Roster, State
from hpcdist._cluster.world_states import Life, WorldStates
from hpcdist._contract.kept_managers import KeptManager, LaunchView
from hpcdist._contract.managers import WorkerConfig
from hpcdist._contract.phases import Phase
from hpcdist._contract.secret import Secret
from hpcdist._errors import LaunchError
from hpcdist._keeper import folders
from hpcdist._keeper.escaped_processes import MARK, marked
from hpcdist._keeper.keeper_link import KeeperLink, RemoteKeeper, reap
from hpcdist._keeper.lingering import write_private
from hpcdist._keeper.processes import Op, describe_status
from hpcdist._monitor.output import WorkersOutput
from hpcdist._transport.contracts import Way
from hpcdist._transport.link import Link
from hpcdist._wire import greeting
from hpcdist._wire.greeting import Hello, Socket
from hpcdist._wire.member import JobEnd, Member
from hpcdist._wire.messages import Welcome

_TAIL = 20
_VERDICT = 1.0  # how long a death on this host is held back for its reason,
_VERDICT_AFAR = 1.5  # and one on another
# How long ranks may take to end before they are made to. Where a job goes on there is no hurry, and
# harm: Grid Engine ends one in which ranks on other nodes were killed.
_GRACE, _GRACE_IN_JOB_THAT_STAYS = 1.0, 10.0
_CLOSE = 1.0  # seconds by which two answers on the same end may differ


class World(WorldStates):
    """One world of a launch."""

    def __init__(self, launch: LaunchView, size: int | None) -> None:
        super().__init__()
        self.launch = launch
        self._node = launch.node
        self._roster = launch.node.service(Roster)
        self._output = launch.node.service(WorkersOutput)
        self.number = next(self._roster.world_numbers)
        self.manager = launch.manager
        self.settings = launch.settings
        self.expected = size  # how many workers are to come; None: not known yet
        self.first = self._roster.reserve(size) if size else 0
        self.seats: Sequence[int] = range(size or 0)  # which of the launch's workers they are
        self.renews = False  # it takes the place of workers that were lost
        self.ready = False  # all have greeted that are to take it
        self.retired = False  # another takes its place
        self.by_rank: dict[int, int] = {}
        self.registered: list[int] = []
        self.keeper: KeeperLink | RemoteKeeper | None = None
        self.has_keeper = False
        self.ranks_may_leave = True
        self.mpi = False
        self.command = ""
        self.label = ""  # what tells it from the launch's other worlds
        self.failure: LaunchError | None = None  # where the launch goes on without it
        self.arrivals = Arrivals()
        self.job: Any = None  # the scheduler's id
        self.verdict: Any = None  # and what it last said of the job
        self.end: JobEnd | None = None  # of the job, where that is known
        self.submitted_at = self.up_at = 0.0  # how long the job has waited
        self.up = False  # its keeper has spoken to us, or nobody has to
        self.stays = False  # its job is to outlive it: `linger=`
        self._lingers = False  # and does
        self._keeper_spoke = False
        self._seen: set[int] = set()  # ranks that have greeted
        self._held: list[tuple[Socket, Hello]] = []  # greetings that wait for the others'
        self._living: set[int] = set()
        self._tail: deque[str] = deque(maxlen=200)
        self._cookie = self._node.service(Secret).use()
        self.door: Listener | None = None
        self._removing = self._node.machine.lock()  # held while the folder is being removed
        self._removed = False
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
    def has_arrived(self) -> bool:
        """Whether all of its workers have greeted, or no more will come."""
        arrived = self.expected is not None and len(self.by_rank) >= self.expected
        return arrived or self._takes_nobody

    @property
    def settled(self) -> bool:
        """Whether no more workers will come."""
        return self.complete() or self._takes_nobody

    @property
    def is_renewed(self) -> bool:
        """Whether what it loses is replaced."""
        return self.launch.is_renewed

    def log(self, n: int = _TAIL) -> list[str]:
        """Return the last lines that its job's script and its workers have printed."""
        heard = list(self._tail)
        jobs = self.launch.jobs_of
        written = [] if jobs is None or n < 1 else jobs.log_of(self, n)
        told = set(written)  # a launcher's words are in both
        return [*written, *(line for line in heard if line not in told)][-n:] if n > 0 else []

    # Starting

    def prepare(self) -> None:
        """Make its folder, listen for its workers and write its join file."""
        jobs = self.launch.jobs_of
        if jobs is not None:
            self.folder = jobs.make_folder(self.launch.plan)
        elif not self.launch.hosts_apart:  # there, its keeper makes one
            self.folder = folders.private()
        self._open_door()
        self._write_join()

    def set_end(self, end: JobEnd | None) -> None:
        """Note when its job ends, which the scheduler or the job itself has told."""
        if self.end is not None and end is not None and abs(self.end.at - end.at) < _CLOSE:
            return
        self.end = end
        self._roster.set_end(self.by_rank.values(), end)
        mind_end(self._node, self)
        self.launch.changed()

    @property
    def time_left(self) -> float | None:
        """How many seconds its job may still run, where that is known."""
        return None if self.end is None else max(0.0, self.end.at - self._node.machine.time())

    def retire(self) -> None:
        """Give its workers nothing new; they leave once they are idle."""
        up = self.time_left is not None and self.time_left <= FAREWELL
        parting = f"its job {self.job} ended: its time was up" if up else "removed"
        retire(self._node, [self._roster.book[pid] for pid in self.registered], parting)

    def set_clock(self) -> None:
        """Give its workers so much time, from now on, to register."""
        itself = weakref.ref(self)  # once ended it need not stay for this
        self._node.progress.call_later(self.settings.timeout, lambda: World._on_timeout(itself()))

    def _open_door(self) -> None:
        if self.on_network:
            interface = self.launch.plan.interface
            self.door = Listener.on_network(self._node, interface, self._cookie, self._greet)
        else:
            path = os.path.join(self.folder, "sock")
            self.door = Listener.on_host(self._node, path, self._cookie, self._greet)

    def _write_join(self) -> None:
        settings = self.settings
        mark = secrets.token_hex(8)
        self.env = {**settings.variables, MARK: marked(mark)}
        assert self.door is not None
        self.join: dict[str, Any] = {
            **join_contents(settings, self.door.told, self.env, self._cookie),
            "dir": "" if self.is_job else self.folder,
            "mark": mark if self.is_job else "",
            "world": self.number,
            "size": self.expected,
        }
        self.save_join()

    def save_join(self, **changes: object) -> None:
        """Write the join file, which is the cluster's secret."""
        self.join.update(changes)
        self.mpi = bool(self.join["mpi"])
        if self.folder:
            write_private(self.join_file, self.join)

    def move_to(self, folder: str, job: Any) -> bool:
        """Run in another job's folder; False: its keeper has come, to the folder it has."""
        with self._roster.lock:
            if not self.up:
                self.folder, self.job = folder, job
        return not self.up

    def take(self, keeper: KeeperLink | RemoteKeeper) -> bool:
        """Take charge of a keeper that is being started; False if the world has ended."""
        with self._roster.lock:
            if not self.closed:
                self.keeper = keeper
        return self.keeper is keeper

    def watch(self, keeper: KeeperLink | RemoteKeeper) -> None:
        """Listen to a keeper that works for this world."""
        self.keeper = keeper
        self.has_keeper = True
        self._node.progress.register(keeper.fileno(), self._on_keeper, 1)

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

    def _on_event(self, event: Op) -> None:
        kind: str = event["ev"]
        rank: Any = event.get("rank")
        if kind == "started":
            self._living.add(rank)
            self.reach(Phase.STARTING_WORKERS)
        elif kind == "out":
            self._on_output(rank, event["fd"], event["text"])
        elif kind == "exit":
            if rank in self.by_rank:
                self._roster.note_peak(self.by_rank[rank], event.get("peak"))
            self._on_exit(rank, event["status"], event["abort"], event["launcher"])
        elif kind == "lost":
            self._on_lost(event["ranks"], event["why"])
        elif kind == "lingers":
            self._lingers = True
            tell_lingering(self.job, event["seconds"])
        elif kind == "launcher_exit":
            if not self.complete():
                self._fail(f"the launcher ended ({describe_status(event['status'])})")
        elif kind == "failed":
            self._fail(event["text"])
        elif kind == "ended":
            self._keeper_gone()

    def _on_output(self, rank: int | None, fd: int, text: str) -> None:
        self._tail.extend(text.splitlines())
        pid = self.by_rank.get(rank) if rank is not None else None
        if pid is not None:
            self._output.show(pid, fd, text)

    def _on_exit(
        self, rank: int, status: int | None, abort: Sequence[int], launcher: int | None
    ) -> None:
        self._living.discard(rank)
        pid = self.by_rank.get(rank)
        if pid is None:
            if self.launch.pending or (self.renews and not self.settled):
                self._fail(f"worker {rank} of the launch ended: {describe_status(status)}")
        elif abort and abort[0] == rank:  # perhaps after its exit code, and then better
            self._roster.correct(pid, f"MPI_Abort with code {abort[1]}")
        elif abort:
            self._roster.fade(
                pid, f"MPI_Abort with code {abort[1]} in worker {self.first + abort[0]}"
            )
        elif status is None and self.is_job:
            self._roster.fade(pid)  # the scheduler may know more
        elif status is None:
            self._roster.fade(pid, f"its launcher ended ({describe_status(launcher)})")
        else:
            self._roster.hear_end(pid, how_ended(status, here=not self.on_network))

    def _on_lost(self, ranks: Sequence[int], why: str) -> None:
        """Note that one of several hosts is out of reach."""
        if not self.complete():
            self._fail(why)
        for rank in ranks:
            self._living.discard(rank)
            if rank in self.by_rank:
                self._roster.fade(self.by_rank[rank], why)

    def _keeper_gone(self) -> None:
        keeper, self.keeper = self.keeper, None
        if keeper is None:
            return
        self._node.progress.unregister(keeper.fileno())
        keeper.close()
        if self.is_job:
            self._node.turns.background(self._after_job)
            return
        if not self.complete():
            self._fail(keeper.gone)
        self.close()
        for pid in list(self.by_rank.values()):
            self._roster.fade(pid, keeper.gone)
        self._node.turns.background(lambda: reap(keeper))

    def _after_job(self) -> None:
        """End this world after its job; ask the scheduler how that ended."""
        since = self._node.machine.time()
        for pid in list(self.by_rank.values()):
            self._roster.fade(pid)
        if self._lingers:
            self.close()
            self._life.to(Life.OVER)
            return
        assert self.launch.jobs_of is not None
        unasked = self.launch.pending or any(not self._roster.removed(p) for p in self.registered)
        verdict = self.launch.jobs_of.end_of(self) if unasked else None
        why = f"its job {self.job} ended" + (f": {verdict}" if verdict else "")
        if not self.complete():
            self._fail(why)
        for pid in list(self.by_rank.values()):
            self._roster.explain(pid, why, since)
        self.close()
        self._remove_folder()
        self._life.to(Life.OVER)

    # Registration

    def _greet(self, sock: Socket, hello: Hello) -> None:
        """Take in one that has proved to be one of ours. On a thread of its own."""
        try:
            if hello.get("world") != self.number:
                raise ValueError(f"a member of world {hello.get('world')} dialled {self.number}")
            if hello["kind"] == "keeper":
                self._take_keeper(sock, hello)
                return
            self._seen.add(int(hello["rank"]))
            if self.mpi:
                self.reach(Phase.INITIALISING_MPI)
            sock.settimeout(self.settings.timeout)
            hello.update(greeting.receive_hello(sock))
        except (OSError, ValueError, KeyError) as exc:
            _log.log("info", f"a greeting failed: {exc}")
            sock.close()
            return
        wrong = wrong_world(self, hello)
        if wrong:
            sock.close()
            self._fail(wrong)
            return
        if isinstance(self.manager, KeptManager):
            for greeted in self._admitted(sock, hello):
                self._register(*greeted, None)
            return
        entry = self.arrivals.match(hello, self.settings.timeout)
        if entry is None:
            _log.log("warning", "refused a worker that no WorkerConfig names")
            sock.close()
            return
        self._register(sock, hello, entry)

    def _take_keeper(self, sock: Socket, hello: Hello) -> None:
        run = os.path.basename(self.folder)
        with self._roster.lock:
            if self.up or self.closed or hello.get("run", run) != run:
                sock.close()
                return
            self.up = True
        self.up_at = self._node.machine.now()
        self.reach(Phase.STARTING_WORKERS)
        if self.end is None and hello.get("ends") is not None:
            self.set_end(JobEnd(float(hello["ends"]), self.launch.walltime))
        self.watch(RemoteKeeper(sock, hello["host"]))
        self.set_clock()
        self.launch.changed()

    def _admitted(self, sock: Socket, hello: Hello) -> list[tuple[Socket, Hello]]:
        """Return whom to register now. What replaces a world of MPI comes whole, or not at all."""
        with self._roster.lock:
            if not (self.renews and self.mpi) or self._takes_nobody:
                return [(sock, hello)]
            self._held.append((sock, hello))
            if len(self._held) != self.expected:
                return []
            self.ready = True
            held, self._held = self._held, []
        self.launch.changed()  # those whose place they take retire first
        return held

    def _register(self, sock: Socket, hello: Hello, entry: Arrival | None) -> None:
        with self._roster.lock:
            if self._takes_nobody:
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
                tags=self.settings.tags,
            )
            link = self._link(sock)
            settings = self.settings
            welcome = Welcome(pid, member, settings.topology, settings.concurrency, self.first)
            self.by_rank[rank] = pid
            self._output.logs[pid] = self._tail
            self._roster.register(pid, member, self.manager, config, self, link, welcome)
        where = {"os_pid": hello["os_pid"], "host": hello["host"], "step": hello.get("step")}
        self._to_keeper({"op": "registered", "rank": rank, **where})
        self._roster.admit(at_once=all(world.has_arrived for world in self.launch.worlds))

    def joined(self, pids: Sequence[int]) -> None:
        """Note that workers are registered, and that all others know of them."""
        self.registered += pids
        for pid in pids:
            if self._roster.book[pid].state is State.GONE:  # meanwhile
                self.lost(pid)
        self._check()

    def _link(self, sock: Socket) -> Way:
        """Make the link to a worker that has greeted."""
        return Link(sock, self._node.progress, self._node.deliver, self._roster.lost_link)

    def _check(self) -> None:
        if self.complete():
            self._shut_door()
        self.launch.changed()

    def _shut_door(self) -> None:
        with self._roster.lock:  # whoever takes them out registers them
            held, self._held = self._held, []
        for sock, _ in held:
            sock.close()
        if self.door is not None:
            self.door.close()
            self.door = None
        if not self.folder:
            return
        for name in ("join", "sock"):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.folder, name))

    # Failing

    def _on_timeout(self: World | None) -> None:
        if self is not None and not self.complete() and not self._takes_nobody:
            missing = "some" if self.expected is None else self.expected - len(self.registered)
            silent = "" if self._seen else "; none has dialled in"
            who = f"{missing} worker" if missing == 1 else f"{missing} workers"
            self._fail(f"{who} did not register within {self.settings.timeout:g} s{silent}")

    def _fail(self, what: BaseException | str) -> None:
        self.launch.fail(what, world=self)

    def abandon(self) -> None:
        """End what has not registered; those that have stay."""
        if self._takes_nobody or self.complete():
            return
        with self._roster.lock:
            self._life.to(Life.ABANDONED)
        self._shut_door()
        for entry in self.arrivals.abandon():
            self._node.turns.background(lambda entry=entry: kill(self.manager, entry))  # type: ignore[misc]
        if not self.by_rank:
            self.close()
            return
        for rank in list(self._living):
            if rank not in self.by_rank:
                self._to_keeper({"op": "kill", "rank": rank, "signal": 9})

    def dismiss(self) -> None:
        """Ask all of its workers to leave, also one whose registration is not yet complete."""
        with self._roster.lock:
            records = [
                self._roster.book[p] for p in self.by_rank.values() if p in self._roster.book
            ]
        self._roster.dismiss(records)

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

    def _to_keeper(self, op: Op) -> bool:
        if self.keeper is None:
            return False
        try:
            self.keeper.send(op)
        except OSError:  # it has ended; its events tell
            return False
        return True

    def lost(self, pid: int) -> None:
        """Note that a worker is gone; with the last one the world ends."""
        book = self._roster.book  # which may have forgotten those that died with it
        living = [p for p in self.registered if p in book and book[p].state is not State.GONE]
        if not living and (self.complete() or self._takes_nobody):
            if not (self.is_renewed or any(map(self._roster.has_left, self.registered))):
                self.outlive()  # all have crashed
            self.close()
        if self.is_renewed:
            self.launch.changed()

    def outlive(self) -> None:
        """Let its job outlive it, where that is wanted."""
        if not (self.closed or self.retired or self.launch.plan.linger is None):
            whole = self.expected in (*self.launch.plan.sizes, self.launch.plan.each)
            self.stays = whole and self.up and self.settled and bool(self.registered)

    def close(self) -> None:
        """End the world: its keeper ends what is left and removes the folder."""
        with self._roster.lock:
            if not self._life.to(Life.CLOSED):
                return
        self._shut_door()
        if not self.ranks_may_leave:
            self._roster.release(self.registered)
        keeper = self.keeper
        if isinstance(keeper, KeeperLink) and not self._keeper_spoke:
            # Whatever was started in its place does not listen. It leads a session of its own.
            keeper.kill()
            folders.remove(self.folder)
            return
        grace = _GRACE_IN_JOB_THAT_STAYS if self.stays else _GRACE
        heard = self._to_keeper({"op": "end", "grace": grace, "stay": self.stays})
        if not heard and not self.is_job:
            self._remove_folder()

    def _remove_folder(self) -> None:
        """Remove the folder, or wait until another thread has: this process may end after us."""
        with self._removing:
            if self._removed or self.stays or not self.folder:
                return
            if self.launch.jobs_of is not None:
                self.launch.jobs_of.forget_folder(self)
            else:
                folders.remove(self.folder)
            self._removed = True

    def clear_away(self) -> None:
        """Remove what was made for it although it had been closed meanwhile."""
        if self.closed and self.keeper is None:
            self._shut_door()
            folders.remove(self.folder)

    def ended(self) -> bool:
        """Tell whether nothing of this world is left."""
        return self._life.now is Life.OVER if self.is_job else self.keeper is None

    def forget(self) -> None:
        """Stop expecting the keeper: the scheduler was told to end the job."""
        if self.closed and not self.stays:
            self._remove_folder()
            self._life.to(Life.OVER)
