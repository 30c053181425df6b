"""The keeper of a batch job: `hpcdist keeper --join FILE -- srun ... hpcdist worker --join FILE`.

It is the command of the job script, on the job's first node. It dials pid 1 itself, its ranks are a
launcher's on any of the job's hosts, and with its own end the script ends, and so the job.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from typing import Any, NoReturn

from hpcdist._managers import steps
from hpcdist._managers.keeper import PR_SET_PDEATHSIG, Keeper, serve
from hpcdist._managers.processes import CHUNK, Op, Output, stat_of, unlink
from hpcdist._transport import network, tls
from hpcdist._wire import greeting

_REACHING = 20.0
_GREETING = 10.0


class JobKeeper(Keeper):
    """The keeper of one job.

    Args:
        secure: The link to pid 1.
        launch: What to launch: the join file's contents, and the launcher's `argv`.
        join: The join file. It goes with process 1, which may have been killed.
    """

    def __init__(self, secure: tls.Secure, launch: Op, join: str) -> None:
        super().__init__(secure.fileno())
        self._secure = secure
        self._told = launch
        self._join = join
        self._step = ""  # the scheduler's name for what the launcher runs
        self._elsewhere: dict[int, tuple[str, int]] = {}  # ranks on other hosts: host, pid
        self._asked_launcher = False  # to end
        self._helpers: set[int] = set()  # commands of ours that reach other hosts

    def run(self) -> None:
        """Launch, and serve until the world has ended."""
        # A script that is killed alone would leave us to a scheduler that follows descent.
        self._prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        self._obey({**self._told, "op": "launch", "dir": "", "join": ""})
        super().run()

    def _finish(self) -> None:
        unlink(self._join)
        if self.launch.get("how") == "mpirun" and self.launcher is not None:
            # prterun's own folder (seen with 5.0.11), which stays when it had to be killed.
            shutil.rmtree(f"{tempfile.gettempdir()}/ompi.{self.launcher}", ignore_errors=True)
        super()._finish()

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
        self.launcher = self._fork(None, {}, -1, signal.SIGTERM, None)

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
        """They are not this process's to find."""

    def _say(self, output: Output, text: str) -> None:
        how, number = self.launch["how"], output.number
        deaths: list[tuple[int, int]] = []
        for rank, said in steps.split_labels(how, text):
            part = said
            if rank is None and number == 2:
                part, ends = steps.parse_ends(how, said)
                deaths += ends
            elif number == 2:
                part, ends = steps.parse_told(said)
                deaths += ends
            if rank is None:  # the launcher's own words belong into the job's log too
                os.write(number, part.encode())
            self._tell_output(rank, number, part)
        for rank, status in deaths:
            self._lose(rank, status)

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
        if running and self.living and self._step and end:
            self._help(end, step=self._step)
        for rank in sorted(self.living & self.pids.keys()):
            super()._signal(rank, number)

    def _end_launcher(self, number: int) -> None:
        """Told a second time within seconds, mpirun leaves at once, and its files stay."""
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
        pid = steps.spawn(argv, **values) if argv else None
        if pid is not None:
            self._helpers.add(pid)

    def _reap(self) -> None:
        self._helpers -= {pid for pid in self._helpers if os.waitpid(pid, os.WNOHANG)[0]}
        super()._reap()


def keep(join: str, argv: list[str]) -> NoReturn:
    """Keep the world that a join file describes; `argv` starts its ranks."""
    with open(join) as file:
        told: dict[str, Any] = json.load(file)
    try:
        secure = _reach(told)
    except OSError as exc:
        unlink(join)  # nobody will: who made it has ended, or can be reached from nowhere
        sys.exit(f"hpcdist: process 1 does not answer, so this job ends: {exc}")
    serve(JobKeeper(secure, {**told, "argv": argv}, join))


def _reach(told: Op) -> tls.Secure:
    tls.adopt(told["tls"])
    targets = [(host, port) for host, port in told["addresses"]]
    secure = network.dial(targets, tls.dial, _REACHING)
    hello = {**greeting.about(), "kind": "keeper", "world": told["world"]}
    greeting.dial(secure, bytes.fromhex(told["cookie"]), hello, _GREETING)
    return secure
