"""The keeper of a batch job: `hpcdist keeper --join FILE -- srun ... hpcdist worker --join FILE`.

It is the command of the job script, on the job's first node. It dials pid 1 itself, its ranks are a
launcher's on any of the job's hosts, and with its own end the script ends, and so the job. In a job
that outlives its driver it becomes `hpcdist keeper --linger FILE -- ...`: see `lingering`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from typing import NoReturn

from hpcdist import _config
from hpcdist._keeper import lasting_srun, launcher_output, lingering
from hpcdist._keeper.aborts import blamed, names_abort
from hpcdist._keeper.escaped_processes import MARK, sweep
from hpcdist._keeper.job_end import job_end
from hpcdist._keeper.keeper import PR_SET_PDEATHSIG, Keeper, serve
from hpcdist._keeper.processes import ASKED, CHUNK, Op, Output, stat_of, unlink
from hpcdist._transport import doors, tls
from hpcdist._wire import greeting

_REACHING = 20.0
_CALLING_BACK = 10.0  # a driver that has just made a claim is there, or gone
_GREETING = 10.0


class JobKeeper(Keeper):
    """The keeper of one job.

    Args:
        secure: The link to pid 1.
        launch: What to launch: the join file's contents, and the launcher's `argv`.
        join: The join file. It goes with process 1, which may have been killed.
        environ: What this process was started with.
    """

    def __init__(self, secure: tls.Secure, launch: Op, join: str, environ: dict[str, str]) -> None:
        super().__init__(secure.fileno())
        self._environ = environ
        self._secure = secure
        self._told = launch
        self._join = join
        self._programs = f"{os.path.dirname(join)}/bin"  # what stands before others on PATH
        self._step = ""  # the scheduler's name for what the launcher runs
        self._elsewhere: dict[int, tuple[str, int]] = {}  # ranks on other hosts: host, pid
        self._asked_launcher = False  # to end
        self._helpers: set[int] = set()  # commands of ours that reach other hosts
        self._asked = False  # by a signal, to end
        self._stays = False  # the job outlives this world

    def run(self) -> None:
        """Launch, and serve until the world has ended; then the job may wait for another."""
        # A script that is killed alone would leave us to a scheduler that follows descent.
        self._prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        self._obey({**self._told, "op": "launch", "dir": "", "join": ""})
        super().run()
        if self._stays:
            lingering.start(os.path.dirname(self._join), self._environ)

    def _obey(self, op: Op) -> None:
        if op["op"] == "end":
            self._stays = bool(op.get("stay"))
        super()._obey(op)

    def _lose_link(self) -> None:
        self._stays = self._stays or not self.ending
        super()._lose_link()

    def crash(self, error: Exception) -> None:
        """End everything at once, and so the job."""
        self._stays = False
        super().crash(error)

    def _finish(self) -> None:
        unlink(self._join)
        shutil.rmtree(self._programs, ignore_errors=True)
        linger = self._told.get("linger")
        # A launcher that cannot be killed may still hold what the next one needs.
        self._stays = bool(self._stays and linger and not self._asked and not self.given_up)
        if self._stays:
            sweep(os.environ.get(MARK))
            seconds = lingering.begin(os.path.dirname(self._join), self._told["linger"], job_end())
            self.send(ev="lingers", seconds=seconds)
        if self.launch.get("how") == "mpirun" and self.launcher is not None:
            # prterun's own folder (seen with 5.0.11), which stays when it had to be killed.
            shutil.rmtree(f"{tempfile.gettempdir()}/ompi.{self.launcher}", ignore_errors=True)
        super()._finish()
        if self._asked:
            os._exit(ASKED)

    def _take_signals(self) -> None:
        super()._take_signals()
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, *_: object) -> None:
        self._asked = True

    # The link is one of TLS

    def _set_blocking(self, blocking: bool) -> None:
        self._secure.settimeout(1.0 if blocking else 0.0)

    def _receive(self) -> bytes:
        return self._secure.recv(CHUNK)

    def _transmit(self, data: bytes) -> int:
        return self._secure.send(data)

    # The ranks are a launcher's

    def _start_ranks(self) -> None:
        self._start_launcher()

    def _start_launcher(self) -> None:
        env = {}
        srun = shutil.which("srun")
        if self.launch["how"] == "mpirun" and srun and "SLURM_JOB_ID" in os.environ:
            env["PATH"] = lasting_srun.put_first(self._programs, srun)
        self.launcher = self._fork(None, env, -1, signal.SIGTERM, None)

    def _note(self, op: Op) -> None:
        rank, pid = op["rank"], op["os_pid"]
        self._step = op.get("step") or self._step
        status = stat_of(pid) if op["host"] == socket.gethostname() else None
        if status is None:
            self._elsewhere[rank] = (op["host"], pid)
        else:
            self.pids[rank], self.births[rank] = pid, status.birth
        self.living.add(rank)

    def _find_ranks(self) -> None:
        """Find none: finding ranks is not this process's task."""

    def _say(self, output: Output, text: str) -> None:
        label, told, number = self.launch["label"], self.launch["ends"], output.number
        deaths: list[tuple[int, int]] = []
        for rank, said in launcher_output.split_labels(label, text):
            part = said
            if rank is None and number == 2:
                part, ends = launcher_output.parse_ends(said, told, mpi=self.launch["mpi"])
                deaths += ends
            elif number == 2:
                part, ends = launcher_output.parse_told(said)
                deaths += ends
            if rank is None:  # the launcher's own words belong into the job's log too
                os.write(number, part.encode())
            self._send_output(rank, number, part)
        for rank, status in deaths:
            self._lose(rank, status)
        if number == 2 and names_abort(text):
            self._name_late_aborts()

    def _name_late_aborts(self) -> None:
        """Tell of the ranks whose ends came before what says that they called MPI_Abort.

        The two take different ways here from another host (PRRTE 3: its daemon's stderr, and a
        message to mpirun), so that either may be the first.
        """
        for rank in sorted(self._lost):
            if blamed(self._last_words, rank, None)[:1] == [rank]:
                self._send_exit(rank, None)

    def _bury_launcher(self, status: int) -> None:
        if self.launch["how"] == "mpirun" and self.living and not self.ending:
            why = "mpirun ended, as Open MPI's does when it loses a host of its world"
            self.send(ev="lost", ranks=sorted(self.living), why=why)
        super()._bury_launcher(status)

    # Signals

    def _signal_all(self, number: int) -> None:
        """Kill all ranks at once, wherever they are. pid 1, or its end, has told them to leave.

        What is on this host is killed here too: a launcher that has to be killed itself leaves its
        ranks behind, and a scheduler that follows descent alone does not find them.
        """
        end = self.launch.get("end")
        if number != signal.SIGKILL:
            if not end:  # told early, mpirun ends what is on other hosts and removes its files
                self._end_launcher(signal.SIGTERM)
            return
        running = self.launcher is not None and self.launcher_status is None
        known = self._step or not any("{step}" in word for word in end or ())
        if running and self.living and known and end:
            self._help(end, step=self._step)
        for rank in sorted(self.living & self.pids.keys()):
            super()._signal(rank, number)

    def _end_launcher(self, number: int) -> None:
        """End mpirun, by one SIGTERM only: at a second it leaves at once, and its files stay."""
        if number != signal.SIGTERM or not self._asked_launcher:
            super()._end_launcher(number)
        self._asked_launcher = True

    def _signal(self, rank: int, number: int) -> None:
        if rank not in self._elsewhere:
            super()._signal(rank, number)
        elif rank in self.living:
            host, pid = self._elsewhere[rank]
            self._help(self.launch.get("kill") or [], host=host, pid=pid, signal=number)

    def _help(self, argv: list[str], **values: object) -> None:
        pid = launcher_output.spawn(argv, **values) if argv else None
        if pid is not None:
            self._helpers.add(pid)

    def _reap(self) -> None:
        self._helpers -= {pid for pid in self._helpers if os.waitpid(pid, os.WNOHANG)[0]}
        super()._reap()


def keep(join: str, argv: list[str], *, lingers: bool = False) -> NoReturn:
    """Keep the world that a join file describes; `argv` starts its ranks.

    Args:
        lingers: Whether to wait for the next driver first, which brings the join file.
    """
    environ = dict(os.environ)
    folder = os.path.dirname(join)
    if lingers:
        told, secure = lingering.wait(folder, lambda claim: _reach(claim, join, _CALLING_BACK))
    else:
        with open(join) as file:
            told = json.load(file)
        try:
            secure = _reach(told, join, _REACHING)
        except OSError as exc:
            _do_without_driver(told, join, exc, environ)
    serve(JobKeeper(secure, {**told, "argv": argv}, join, environ))


def _do_without_driver(told: Op, join: str, why: OSError, environ: dict[str, str]) -> NoReturn:
    """End, or wait for the next driver: the one that submitted the job is gone."""
    unlink(join)  # nobody will: who made it has ended, or can be reached from nowhere
    if not told.get("linger"):
        sys.exit(f"hpcdist: process 1 does not answer, so this job ends: {why}")
    print(f"hpcdist: process 1 does not answer, so this job waits for another: {why}", flush=True)
    lingering.begin(os.path.dirname(join), told["linger"], job_end())
    lingering.start(os.path.dirname(join), environ)


def _reach(told: Op, join: str, patience: float) -> tls.Secure:
    _config.learn(*told.get("tables", ()))
    tls.adopt(told["tls"])
    targets = [(host, port) for host, port in told["addresses"]]
    secure = doors.reach(targets, tls.dial, patience, os.path.dirname(join))
    run = os.path.basename(os.path.realpath(os.path.dirname(join)))
    hello = {"kind": "keeper", "world": told["world"], "run": run, "ends": job_end()}
    greeting.dial(secure, bytes.fromhex(told["cookie"]), {**greeting.about(), **hello}, _GREETING)
    return secure
