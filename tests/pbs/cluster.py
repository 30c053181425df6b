"""Hosts for the tests' PBS: the machines of `tests/slurm`, without Slurm, and `server` on top."""

import re
from collections.abc import Callable
from pathlib import Path

from tests.helpers import eventually
from tests.pbs.server import PbsJob, Server
from tests.slurm.cluster import Job, Slurm

PROGRAMS = ("ip", "unshare", "nsenter", "setpriv")


class Pbs(Slurm):
    """A login node and the nodes `n1` and `n2`, with a PBS that runs jobs there.

    Attributes:
        server: The PBS; tests ask it, and make it refuse.
    """

    server: Server

    def __init__(self, put_off: Callable[[float], None] = lambda seconds: None) -> None:
        super().__init__(nodes=2, put_off=put_off)
        self._settings["HPC_SLURM"] = "0"

    def up(self) -> None:
        """Boot the machines, and start the server."""
        super().up()
        hosts = self._state / "etc" / "hosts"
        hosts.write_text(re.sub(r"(n\d)$", r"\1 \1.cluster", hosts.read_text(), flags=re.MULTILINE))
        self.server = Server(self._state, self.nodes, self._enter)

    def down(self) -> None:
        """End everything."""
        if hasattr(self, "server"):
            self.server.close()
        super().down()

    def jobs(self) -> list[Job]:
        """Return all jobs that have not ended."""
        return [
            Job(job.ident, job.state, job.comment, "+".join(job.slots), job.options.get("N", ""))
            for job in self.server.listed()
        ]

    def job(self, ident: str, timeout: float = 30) -> PbsJob:
        """Wait for the end of a job; return what is known of it."""
        job = self.server.jobs[ident]
        eventually(lambda: job.done, timeout, f"job {ident} has not ended")
        return job

    def tidy(self) -> None:
        """After a test: see that nothing is left, and be as at the beginning."""
        try:
            super().tidy()
        finally:
            self.server.reset()

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", "-t", self._pid1(host), "-m", "-u", "-i", "-n", "-p", "--"]

    def _environment(self, root: bool) -> dict[str, str]:
        found = super()._environment(root)
        return found | {"PATH": f"{Path(__file__).with_name('bin')}:{found['PATH']}"}
