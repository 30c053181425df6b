"""A real Grid Engine for tests: the machines of tests/slurm, on which `setup.sh` starts it."""

import re
import shutil
import subprocess
import time
from pathlib import Path

from tests.slurm.cluster import Job, Slurm

_SETUP = Path(__file__).with_name("setup.sh")
_LIB = Path("/usr/lib/gridengine")
_PROGRAMS = ("qsub", "qstat", "qdel", "qacct", "qconf", "ip", "unshare", "nsenter", "setpriv")
_SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"


def missing_programs() -> list[str]:
    """Return what would have to be installed here."""
    wanted = {name: shutil.which(name, path=_SBIN) for name in _PROGRAMS}
    daemons = [name for name in ("sge_qmaster", "sge_execd") if not (_LIB / name).exists()]
    return [name for name, path in wanted.items() if path is None] + daemons


class GridEngine(Slurm):
    """A cluster that is up, seen from outside.

    Its parallel environments: "mpi" fills host by host, "spread" goes round, "loose" lets no other
    host be reached.
    """

    patience = 20.0

    def up(self) -> None:
        """Start it; it takes three seconds."""
        self._settings["HPC_SLURM"] = "0"
        super().up()
        self._put_off(150)
        with (self._state / "io" / "setup").open("w+") as out:
            done = subprocess.run(
                ["bash", str(_SETUP), str(len(self.nodes)), str(self._cpus)],
                stdin=subprocess.DEVNULL,
                stdout=out,  # not a pipe: the daemons inherit it
                stderr=subprocess.STDOUT,
                cwd="/",
                env=self._settings,
                timeout=140,
                check=False,
            )
            out.seek(0)
            assert done.returncode == 0, out.read()

    def jobs(self) -> list[Job]:
        """Return all jobs that have not ended."""
        listed = self.root("qstat", "-u", "*").out.splitlines()[2:]
        rows = [re.split(r"\s+", line.strip()) for line in listed]
        return [Job(row[0], row[4], "", row[7] if len(row) > 8 else "", row[2]) for row in rows]

    def drain(self, patience: float | None = None) -> None:
        """Fail unless all jobs, processes and files of the user are gone by and by."""
        patience = self.patience if patience is None else patience
        end = time.monotonic() + patience
        while (left := self.jobs()) and time.monotonic() < end:
            time.sleep(0.1)
        if left:
            self.root("qdel", "-f", *[job.id for job in left])
        super().drain(patience)
        assert not left, f"jobs left behind: {left}"

    def _environment(self, root: bool) -> dict[str, str]:
        found = super()._environment(root)
        return found | {
            "SGE_ROOT": str(self._state / "sge"),
            "SGE_CELL": "default",
            "SGE_QMASTER_PORT": "6444",
            "SGE_EXECD_PORT": "6445",
        }
