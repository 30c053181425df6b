"""The keeper: the process that starts a world's ranks, watches them, and ends them.

Run by pid 1 as `python -m hpcdist._keeper.keeper`, with a socket to pid 1 as its fd 0. It runs
no user code and has one thread. When the socket ends, the world ends: that is why a worker stuck
in C dies with its driver. The keeper of a batch job is in `job_keeper`.

Messages both ways are a u32 length (little endian) and JSON. In: `launch`, then `kill`,
`registered`, `end`. Out: `launching`, `started`, `exit`, `out`, `launcher_exit`, `failed`, and
`ended` last.

Three ways to launch:

    pmi      MPICH's family: the ranks are forked from this process, already warm, and this process
             is their PMI-1 server. No launcher, so nobody kills the others when one dies.
    mpirun   Open MPI: `argv` is the whole command; ranks write to FIFOs in the world's directory.
    plain    no MPI: `size` independent processes.

With pmi and plain an empty `argv` means "fork, and call `work(join)` of the module `worker`".
Only light parts of the standard library are imported here: each one delays every world."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from hpcdist._keeper import folders
from hpcdist._keeper.aborts import blamed
from hpcdist._keeper.escaped_processes import MARK, sweep
from hpcdist._keeper.leftovers import Leftovers
from hpcdist._keeper.peaks import Peaks
from hpcdist._keeper.plans import Plan, Step
from hpcdist._keeper.pmi import PmiServer, Reply
from hpcdist._keeper.pmi_sockets import PmiSockets
from hpcdist._keeper.processes import (
    CHUNK,
    TAIL,
    Op,
    Output,
    become,
    default_signals,
    descends,
    describe_status,
    kill,
    kill_group,
    lead_group,
    open_fifos,
    pack,
    parse_launcher,
    point_streams,
    ranks_of_session,
    stat_of,
    take_status,
    unlink,
    unpack,
)

# Above this much unsent, the ranks' pipes are left unread: a stopped pid 1 then slows its ranks
# down, as a full terminal would, and does not fill this process's memory.
BACKLOG = 4 * 1024 * 1024
REGISTRATION_LAG = 0.25
FORKED_AT_ONCE = 4
EOF_KILL_AFTER = 1.5
TERM_KILL_AFTER = 0.5
# mpirun leaves by itself within 10 ms of its last rank, needs 0.27 s to kill ranks itself after a
# SIGTERM (both measured with Open MPI 5.0.11), and removes its files only if it is not killed.
LAUNCHER_TERM_AFTER = 0.3
LAUNCHER_KILL_AFTER = 1.0
GIVE_UP_AFTER = 1.4
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Keeper:
    """One world, from its launch to its end, driven by one epoll loop."""

    def __init__(self, link: int) -> None:
        self.link = link
        self.me = os.getpid()
        self.launch: Op = {}
        self.pids: dict[int, int] = {}
        self.births: dict[int, str] = {}
        self.living: set[int] = set()
        self.launcher: int | None = None
        self.launcher_status: int | None = None
        self.pmi: PmiServer | None = None
        self.leftovers = Leftovers()
        self.plan = Plan()
        self.ending = False
        self.given_up = False
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._paused = False
        self._watched: dict[int, Callable[[], object]] = {}
        self._outputs: dict[int, Output] = {}
        self._pmi_sockets = PmiSockets()
        self._lost: set[int] = set()
        self._registered: set[int] = set()
        self._last_words: dict[int | None, str] = {}
        self._peaks = Peaks()
        self._epoll = select.epoll()
        self._woken, self._waker = os.pipe()
        self._prctl = ctypes.CDLL(None).prctl

    def run(self) -> None:
        """Serve until the world has ended and everything is cleaned up."""
        self._set_blocking(False)
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        self._watch(self.link, self._read_link)
        self._watch(self._woken, self._read_signals)
        self._take_signals()
        while not (self.ending and self._all_gone()) and not self.given_up:
            self._turn()
        self._finish()

    def _turn(self) -> None:
        for fd, events in self._epoll.poll(self.plan.timeout):
            if fd == self.link and events & select.EPOLLOUT:
                self._flush()
            if fd == self.link and not events & ~select.EPOLLOUT:
                continue
            if fd in self._watched:
                self._watched[fd]()
        self.plan.run()

    def _watch(self, fd: int, react: Callable[[], object]) -> None:
        self._watched[fd] = react
        self._epoll.register(fd, select.EPOLLIN)

    def _close(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None and not (self._paused and fd in self._outputs):
            self._epoll.unregister(fd)
        self._outputs.pop(fd, None)
        os.close(fd)

    def _take_signals(self) -> None:
        """Claim the signals again: importing MPI takes SIGHUP (seen with MPICH 5.0.2)."""
        for quiet in (signal.SIGINT, signal.SIGHUP):
            signal.signal(quiet, signal.SIG_IGN)
        for heard in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(heard, lambda *_: None)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def _read_signals(self) -> None:
        caught = os.read(self._woken, 4096)
        if signal.SIGTERM in caught:
            self.end(grace=2.0)
        self._reap()

    def send(self, **event: object) -> None:
        self._outgoing += pack(event)
        self._flush()

    def _set_blocking(self, blocking: bool) -> None:
        os.set_blocking(self.link, blocking)

    def _receive(self) -> bytes:
        return os.read(self.link, CHUNK)

    def _transmit(self, data: bytes) -> int:
        return os.write(self.link, data)

    def _flush(self) -> None:
        if self.link < 0:
            return
        try:
            while self._outgoing:
                del self._outgoing[: self._transmit(bytes(self._outgoing[:CHUNK]))]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing.clear()
        wanted = select.EPOLLIN | (select.EPOLLOUT if self._outgoing else 0)
        if self.link in self._watched:
            self._epoll.modify(self.link, wanted)
        if (len(self._outgoing) > BACKLOG) != self._paused:
            self._pause(not self._paused)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        for fd in self._outputs:
            if paused:
                self._epoll.unregister(fd)
            else:
                self._epoll.register(fd, select.EPOLLIN)

    def _read_link(self) -> None:
        try:
            data = self._receive()
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose_link()
            return
        self._incoming += data
        for op in unpack(self._incoming):
            self._obey(op)

    def _lose_link(self) -> None:
        self._close(self.link)
        self.link = -1
        self._outgoing.clear()
        if self._paused:
            self._pause(False)
        self.stop(term_after=0.0, kill_after=EOF_KILL_AFTER)

    def _obey(self, op: Op) -> None:
        name = op["op"]
        if name == "launch" and not self.launch:
            self.launch = op
            self.send(ev="launching")
            try:
                self._start()
            except Exception as error:  # the edge of the process: pid 1 must hear of it
                self.fail(f"the keeper could not start the ranks: {error}")
        elif name == "kill":
            self._signal(op["rank"], op["signal"])
        elif name == "registered":
            self._note(op)
            self._register(op["rank"])
        elif name == "end":
            self.end(grace=float(op.get("grace", 2.0)))

    def _start(self) -> None:
        launch = self.launch
        os.environ.update(launch.get("env") or {})
        sys.path[:0] = [entry for entry in launch.get("path") or [] if entry not in sys.path]
        if launch.get("cwd"):
            os.chdir(launch["cwd"])
        if launch["how"] == "mpirun":
            self._start_launcher()
        else:
            self._start_ranks()

    def _start_ranks(self) -> None:
        launch = self.launch
        work = None if launch.get("argv") else self._warm_up()
        if launch["how"] == "pmi":
            share = launch.get("share") or [f"kvs_{self.me}_{time.time_ns():x}"]
            self.pmi = PmiServer(launch["size"], *share)
        self._fork_ranks(list(range(launch["size"]) if self.pmi is None else self.pmi.ranks), work)

    def _fork_ranks(self, ranks: list[int], work: Callable[[str], None] | None) -> None:
        """Start ranks, a few at a time: in between this process hears that it is to end."""
        for rank in ranks[:FORKED_AT_ONCE]:
            self._fork_rank(rank, work)
        if rest := ranks[FORKED_AT_ONCE:]:
            self.plan.later(0.001, lambda: self._fork_ranks(rest, work))

    def _warm_up(self) -> Callable[[str], None]:
        """Import once what every rank needs; forks then share it.

        The MPI library may be loaded before a fork as long as it is not initialised: it starts no
        thread and opens no descriptor until then (seen with MPICH 5.0.2).
        """
        import gc
        import importlib.util

        if self.launch["how"] == "pmi" and importlib.util.find_spec("mpi4py") is not None:
            importlib.import_module("mpi4py").rc.initialize = False
            importlib.import_module("mpi4py.MPI")
        work: Callable[[str], None] = importlib.import_module(self.launch["worker"]).work
        self._take_signals()
        # Frozen objects are not touched by the ranks' collector, so their pages stay shared.
        gc.freeze()
        return work

    def _fork_rank(self, rank: int, work: Callable[[str], None] | None) -> None:
        env = {"HPCDIST_RANK": str(rank)}
        ours, theirs = -1, -1
        if self.pmi is not None:
            # The rank keeps it out of its own children; only an exec needs it to be inherited.
            ours, theirs, told = self._pmi_sockets.open(rank, inherit=work is None)
            env |= {**told, "PMI_RANK": str(rank), "PMI_SIZE": str(self.pmi.size)}
        pid = self._fork(rank, env, theirs, signal.SIGKILL, work)
        if self.pmi is not None:
            os.close(theirs)
            self._watch(ours, lambda: self._serve_pmi(rank))
        self.pids[rank] = pid
        self.living.add(rank)
        self.send(ev="started", rank=rank, os_pid=pid)

    def _start_launcher(self) -> None:
        for fd, rank, number in open_fifos(self.launch["dir"], self.launch["size"]):
            self._collect(fd, rank, number)
        # Not SIGKILL: told to leave, mpirun also ends its ranks and removes its files.
        self.launcher = self._fork(None, {}, -1, signal.SIGTERM, None)

    def _collect(self, fd: int, rank: int | None, number: int) -> None:
        output = Output(fd, rank, number)
        self._outputs[fd] = output
        self._watched[fd] = lambda: self._forward(output)
        if not self._paused:
            self._epoll.register(fd, select.EPOLLIN)

    def _fork(
        self,
        rank: int | None,
        env: dict[str, str],
        keep: int,
        death_signal: int,
        work: Callable[[str], None] | None,
    ) -> int:
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, 0)
                self._prctl(PR_SET_PDEATHSIG, int(death_signal))
                if os.getppid() != self.me:
                    os._exit(1)
                point_streams(out_write, err_write)
                self._forget([out_read, out_write, err_read, err_write], keep)
                os.environ.update(env)
                become(self.launch, work)
            except BaseException as error:  # never back into the keeper's loop
                os.write(2, f"hpcdist: a rank could not be set up: {error!r}\n".encode())
            finally:
                os._exit(1)
        # Both sides set the group: whichever runs first, a kill of the group reaches the rank.
        lead_group(pid)
        os.close(out_write)
        os.close(err_write)
        self._collect(out_read, rank, 1)
        self._collect(err_read, rank, 2)
        return pid

    def _forget(self, pipes: list[int], keep: int) -> None:
        """Close, in a child, everything that is the keeper's: a held copy would hide an end."""
        signal.set_wakeup_fd(-1)
        self._epoll.close()
        for fd in {*self._watched, *pipes, self._waker} - {keep}:
            os.close(fd)
        default_signals()

    def _serve_pmi(self, rank: int) -> None:
        assert self.pmi is not None
        data = self._pmi_sockets.read(rank)
        if not data:
            self._close(self._pmi_sockets.forget(rank))
            return
        self._answer_pmi(self.pmi.feed(rank, data))
        if rank in self.pmi.aborts:
            self._signal(rank, signal.SIGKILL)
        else:
            self._signal(rank, signal.SIGCONT)

    def _answer_pmi(self, replies: list[Reply]) -> None:
        self._pmi_sockets.write(replies)

    def _note(self, op: Op) -> None:
        """Remember where a rank is, which has told pid 1."""
        if self.launch.get("how") == "mpirun":
            self._adopt(op["rank"], op["os_pid"])

    def _register(self, rank: int) -> None:
        if rank in self.living and rank in self.pids:
            self.leftovers.note(self.pids[rank])
        self._registered.add(rank)
        if self.births:
            self._peaks.follow(self.plan, lambda: self.births.keys() & self.living, self.pids)
        if self.pmi is not None and len(self._registered) == self.launch["size"]:
            self.leftovers.unname()
            self._answer_pmi(self.pmi.complete())

    def _doubt(self, rank: int, status: int | None) -> None:
        """Judge a rank's end: before all have registered the others would wait for it in MPI_Init.

        Its registration may still be on the way from pid 1, hence the delay.
        """
        size = self.launch["size"]
        if self.ending or self.launch["how"] == "plain" or len(self._registered) == size:
            return

        def decide() -> None:
            if not self.ending and len(self._registered) < size:
                self.fail(
                    f"rank {rank} ended ({describe_status(status)}) before the world was up", rank
                )

        self.plan.later(REGISTRATION_LAG, decide)

    def _adopt(self, rank: int, pid: int) -> None:
        """Take a launcher's rank for ours if it is on this host, started by us.

        A world over several hosts reports pids that may belong to strangers here.
        """
        status = stat_of(pid)
        if status is not None and descends(pid, self.me):
            self.pids[rank] = pid
            self.births[rank] = status.birth
            self.living.add(rank)

    def _find_ranks(self) -> None:
        """Learn the pids of those of the launcher's ranks that have not registered."""
        if self.launcher is None or len(self.pids) == self.launch["size"]:
            return
        for rank, pid in ranks_of_session(os.getsid(0)).items():
            if rank not in self.pids:
                self._adopt(rank, pid)

    def _forward(self, output: Output) -> bool:
        """Send on what has arrived; False when there is no more for now."""
        data = output.read()
        if data is None:
            return False
        self._say(output, output.lines.feed(data, last=not data))
        if not data:
            self._close(output.fd)
        return bool(data)

    def _say(self, output: Output, text: str) -> None:
        rank, number = output.rank, output.number
        if rank is None and number == 2:
            text, deaths = parse_launcher(text)
            for other, status in deaths:
                self._lose(other, status)
        self._send_output(rank, number, text)

    def _send_output(self, rank: int | None, number: int, text: str) -> None:
        if not text:
            return
        if rank is None or number == 2:
            self._last_words[rank] = (self._last_words.get(rank, "") + text)[-TAIL:]
        self.send(ev="out", rank=rank, fd=number, text=text)

    def _drain(self, rank: int | None) -> None:
        """Forward the last of a rank's output and close it.

        The streams may stay open in some grandchild; the rank is gone all the same.
        """
        for output in [output for output in self._outputs.values() if output.rank == rank]:
            while self._forward(output):
                pass
            if output.fd in self._outputs:
                self._close(output.fd)
                self._say(output, output.lines.feed(b"", last=True))

    def _lose(self, rank: int, status: int | None) -> None:
        """Note that a launcher's rank has ended."""
        if self.launcher is None or rank in self._lost:
            return
        self._lost.add(rank)
        self.living.discard(rank)
        self._drain(rank)
        self._send_exit(rank, status)
        self._doubt(rank, status)

    def _send_exit(self, rank: int, status: int | None) -> None:
        all_end = self.launch["how"] == "hydra"  # as soon as one calls MPI_Abort
        launcher, peak = self.launcher_status, self._peaks.of(rank)
        abort = blamed(self._last_words, rank, status, launcher, all_end=all_end)
        self.send(ev="exit", rank=rank, status=status, abort=abort, launcher=launcher, peak=peak)

    def _reap(self) -> None:
        children = {pid: rank for rank, pid in self.pids.items() if rank in self.living}
        for pid, rank in children.items() if self.launcher is None else ():
            ended = take_status(pid)
            if ended is not None:
                self._peaks.note(rank, ended[1])
                self._bury(rank, ended[0])
        if self.launcher is not None and self.launcher_status is None:
            ended = take_status(self.launcher)
            if ended is not None:
                self._bury_launcher(ended[0])

    def _bury(self, rank: int, status: int) -> None:
        if self.pmi is not None:
            status = self.pmi.aborts.get(rank, status)
            self._answer_pmi(self.pmi.leave(rank))
        self.living.discard(rank)
        self._drain(rank)
        self._send_exit(rank, status)
        self._doubt(rank, status)

    def _bury_launcher(self, status: int) -> None:
        self.launcher_status = status
        self._drain(None)
        up = bool(self._registered or self.pids or self._lost)
        if not self.ending and not up:  # before its ranks' ends, which would say less
            command = os.path.basename(self.launch["argv"][0])
            self.fail(f"{command} ended with status {status} before any rank was up", None)
        self._signal_all(signal.SIGKILL)
        for rank in range(self.launch["size"]):
            self._lose(rank, None)
        self.send(ev="launcher_exit", status=status)

    def fail(self, reason: str, whose: int | None = None) -> None:
        """Give the world up, with the last words of a rank or (None) of the launcher."""
        self.send(ev="failed", text=f"{reason}\n{self._last_words.get(whose, '')}".strip())
        self.stop(term_after=None, kill_after=0.0)

    def crash(self, error: Exception) -> None:
        """End everything at once: this process itself is at fault."""
        self.fail(f"the keeper itself failed: {error!r}")
        self._signal_all(signal.SIGKILL)
        self._end_launcher(signal.SIGTERM)
        self._finish()

    def end(self, grace: float) -> None:
        self.stop(term_after=grace, kill_after=grace + TERM_KILL_AFTER)

    def stop(self, term_after: float | None, kill_after: float) -> None:
        """Plan the end. A second call, from a more urgent cause, replaces the plan."""
        now = time.monotonic()
        kill_at = now + kill_after
        steps: list[Step] = [
            (kill_at, lambda: self._signal_all(signal.SIGKILL)),
            (kill_at + GIVE_UP_AFTER, lambda: setattr(self, "given_up", True)),
        ]
        if term_after is not None:
            steps.append((now + term_after, lambda: self._signal_all(signal.SIGTERM)))
        if self.launcher is not None:
            steps.append((kill_at + LAUNCHER_TERM_AFTER, lambda: self._end_launcher(15)))
            steps.append((kill_at + LAUNCHER_KILL_AFTER, lambda: self._end_launcher(9)))
        if not self.ending or self.plan.starts_later_than(steps):
            self.plan.become(steps)
        self.ending = True

    def _signal_all(self, number: int) -> None:
        self._find_ranks()
        for rank in sorted(self.living):
            self.leftovers.note(self.pids[rank])
        for rank in sorted(self.living):
            self._signal(rank, number)
        if self.launcher is not None and len(self.pids) < self.launch["size"]:
            self._end_launcher(signal.SIGTERM)  # some ranks are out of our reach, not of its

    def _signal(self, rank: int, number: int) -> None:
        if rank not in self.pids:
            self._find_ranks()
        if rank not in self.living or rank not in self.pids:
            return
        pid = self.pids[rank]
        if rank in self.births:
            status = stat_of(pid)
            if status is None or status.birth != self.births[rank]:
                return
        if number == signal.SIGKILL:
            self.leftovers.note(pid)
            kill_group(pid, number)
        kill(pid, number)

    def _end_launcher(self, number: int) -> None:
        if self.launcher is not None and self.launcher_status is None:
            kill_group(self.launcher, number)

    def _all_gone(self) -> bool:
        if self.launcher is not None:
            return self.launcher_status is not None
        return not self.living

    def _finish(self) -> None:
        for rank in self.births:
            if rank in self.living:
                self._signal(rank, signal.SIGKILL)
        if self.link < 0:  # with its driver goes what its ranks have started
            sweep(os.environ.get(MARK))
        self.leftovers.remove(self.pmi.segments if self.pmi is not None else "")
        if self.launch.get("join"):
            unlink(self.launch["join"])
        if self.launch.get("dir"):
            folders.remove(self.launch["dir"])
        self.send(ev="ended")
        if self.link >= 0:
            # pid 1 may be busy: what it has not read yet goes out within a second or not at all.
            self._set_blocking(True)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(1)
            self._flush()


def main() -> NoReturn:
    """Keep a world. fd 0 is moved away first, so that no child can inherit it."""
    link = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    serve(Keeper(link))


def serve(keeper: Keeper) -> NoReturn:
    """Run a keeper, whatever happens to it."""
    try:
        keeper.run()
    except Exception as error:  # the edge of the process: nothing may outlive it
        keeper.crash(error)
    os._exit(0)


if __name__ == "__main__":
    main()
