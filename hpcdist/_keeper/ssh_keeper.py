"""The keeper at the other end of an ssh connection, which is its link to process 1.

It speaks first: what lies before its first words was printed by the login shell. Then it is the
keeper of any other world, but for what it has to find out on this host, whose files may be its own.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
from typing import Any, NoReturn

from hpcdist._keeper import folders
from hpcdist._keeper.installed_mpi import MpiNotFound, find_mpi
from hpcdist._keeper.keeper import Keeper, serve
from hpcdist._keeper.processes import Op, unlink
from hpcdist._wire import greeting

PREAMBLE = b"\0hpcdist keeper\0"


class SSHKeeper(Keeper):
    """The keeper of one host's world.

    Args:
        incoming: The ops of process 1.
        outgoing: The way to process 1; ssh servers may make it a pipe of its own.
        folder: The world's folder on this host.
    """

    def __init__(self, incoming: int, outgoing: int, folder: str) -> None:
        super().__init__(incoming)
        self._out = outgoing
        self._folder = folder

    def run(self) -> None:
        """Say what there is on this host, and serve."""
        os.set_blocking(self._out, False)
        self._watched[self._out] = self._flush
        self._epoll.register(self._out, 0)
        self._outgoing += PREAMBLE
        self.send(ev="hello", **_about(self._folder))
        super().run()

    def _finish(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        super()._finish()

    # The link has two ends

    def _set_blocking(self, blocking: bool) -> None:
        super()._set_blocking(blocking)
        os.set_blocking(self._out, blocking)

    def _transmit(self, data: bytes) -> int:
        return os.write(self._out, data)

    def _flush(self) -> None:
        super()._flush()
        if self._out in self._watched:
            self._epoll.modify(self._out, select.EPOLLOUT if self._outgoing else 0)

    def _lose_link(self) -> None:
        self._close(self._out)
        super()._lose_link()

    # The launch

    def _obey(self, op: Op) -> None:
        if op["op"] == "launch" and not self.launch:
            self._prepare(op)
        if op["op"] == "pmi" and self.pmi is not None:
            self._answer_pmi(self.pmi.meet(op["values"]))
        super()._obey(op)

    def _answer_pmi(self, replies: list[tuple[int, bytes]]) -> None:
        super()._answer_pmi(replies)
        news = self.pmi.news() if self.pmi is not None else None
        if news is not None:
            self.send(ev="pmi", values=news)

    def _prepare(self, op: Op) -> None:
        """Find the folder to work in, and write the join file, which only this host has."""
        if op.pop("home_will_do") and not os.path.isdir(op["cwd"]):
            op["cwd"] = os.getcwd()  # the home, as a rule: where the server has put us
        told = op.pop("told") | {"cwd": op["cwd"]}
        fd = os.open(op["join"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(told, file)

    def _reap(self) -> None:
        """Reap ranks; the world ends with the last, even where process 1 is out of reach."""
        super()._reap()
        started = bool(self.pids) or self.launcher is not None
        if started and self._all_gone() and not self.ending:
            self.end(grace=0.0)

    def _register(self, rank: int) -> None:
        super()._register(rank)
        if len(self._registered) == self.launch["size"]:
            unlink(self.launch["join"])


def _about(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        mpi = find_mpi(sys.executable)
        found = {"mpi": [mpi.family, mpi.version, mpi.mpiexec], "network": mpi.network}
    except MpiNotFound as exc:
        found = {"no_mpi": str(exc)}
    return {
        **greeting.about(),
        "executable": sys.executable,
        "cores": len(os.sched_getaffinity(0)),
        "folder": folder,
        **found,
    }


def main() -> NoReturn:
    """Keep a world. Standard input and output are moved away, so that no child can inherit them."""
    incoming, outgoing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    serve(SSHKeeper(incoming, outgoing, folders.private()))
