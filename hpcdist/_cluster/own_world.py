"""A world whose workers a manager of the user's own starts."""

from __future__ import annotations

import socket
import subprocess
from typing import Any

from hpcdist._cluster.pending_workers import Arrival, kill
from hpcdist._cluster.world import World
from hpcdist._contract.managers import ClusterManager, WorkerConfig
from hpcdist._contract.phases import Phase
from hpcdist._keeper.processes import describe_status
from hpcdist._wire import greeting
from hpcdist._worker.streams import Streams

_LOOK_EVERY = 0.25


class OwnWorld(World):
    """The workers that `launch` of a manager of the user's own speaks of."""

    def start_own(self) -> None:
        """Let a manager of the user's own start its workers."""
        params = {**vars(self.settings), **self.settings.extra, "join": self.join_file}
        params.pop("extra")
        self.command = " ".join(self.manager.worker_command(params))
        self._node.turns.background(lambda: self._run_manager(params))

    def _run_manager(self, params: dict[str, Any]) -> None:
        self.reach(Phase.LAUNCHING)
        try:
            for config in self.arrivals.coming(self.manager.launch(params) or ()):
                self._expect(config)
        except Exception as exc:
            self._fail(exc)
            return
        finally:
            self.arrivals.finish()
        self.expected = len(self.arrivals.all)
        self.reach(Phase.AWAITING)
        if not self.expected:
            self._fail("the manager launched no worker")
        self._check()

    def _expect(self, config: WorkerConfig) -> None:
        if not isinstance(config, WorkerConfig):
            raise TypeError(f"launch() yields WorkerConfigs, not {config!r}")
        if isinstance(config.process, subprocess.Popen) and not self.arrivals.all:
            self._node.progress.call_later(_LOOK_EVERY, self._look_at_processes)
        for _ in range(config.count):
            entry = self.arrivals.add(self._roster.reserve(1), config)
            if entry.taken:  # the launch was given up meanwhile
                kill(self.manager, entry)
            elif type(self.manager).connect is not ClusterManager.connect:
                self._node.turns.background(lambda entry=entry: self._connect(entry))  # type: ignore[misc]

    def _connect(self, entry: Arrival) -> None:
        """Reach a worker by the manager's own transport, if it has one."""
        sock = None
        try:
            pair = self.manager.connect(entry.pid, entry.config)
            if pair is None:
                return
            entry.taken = True
            self._seen.add(entry.pid)
            sock = self._node.service(Streams).attach(*pair)
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
                self._fail(f"a worker's process ended early: {describe_status(status)}")
                return
        self._node.progress.call_later(_LOOK_EVERY, self._look_at_processes)
