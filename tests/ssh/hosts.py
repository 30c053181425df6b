"""Hosts with real sshd's for tests: `hosts.sh` makes them, this drives them and looks after them.

`login` is where users work, `n1` and `n2` have an sshd each, at ports 22 and 2222. Nothing is
shared but the checkout and the virtual environment: each host has its own /home and /tmp.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Job, Slurm

_SCRIPT = Path(__file__).with_name("hosts.sh")
_PROGRAMS = ("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter", "setpriv")
_ADMIN_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def missing_programs() -> list[str]:
    """Return what would have to be installed here."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_ADMIN_PATH) is None]


class Hosts(Slurm):
    """The hosts, seen from outside: as a Slurm cluster's machines, but for the scheduler."""

    def jobs(self) -> list[Job]:
        """There is no scheduler."""
        return []

    def files(self) -> list[str]:
        """Return what is new on any host, except for what ssh keeps of its own."""
        return [name for name in super().files() if not name.startswith("home: .ssh")]

    def wall(self, node: str) -> None:
        """Let a node answer what comes to its sshd's, and nothing else reach the login host."""
        login = self.root("hostname", "-I", on="login").out.split()[0]
        for number, rule in enumerate(
            (
                ["ipproto", "tcp", "sport", "22", "lookup", "main"],
                ["to", login, "prohibit"],
            )
        ):
            done = self.root("ip", "rule", "add", "priority", str(100 + number), *rule, on=node)
            if done.rc:
                pytest.skip(f"this kernel has no rules for ports: {done.err}")

    def unwall(self, node: str) -> None:
        """Let everything through again."""
        for number in (100, 101):
            self.root("ip", "rule", "del", "priority", str(number), on=node)

    def cut(self, node: str) -> None:
        """Pull a node's cable."""
        assert self.root("ip", "link", "set", f"ve-{node}", "nomaster").rc == 0

    def plug_in(self, node: str) -> None:
        """Put it back."""
        assert self.root("ip", "link", "set", f"ve-{node}", "master", "br0").rc == 0

    def _script(self, *args: str) -> None:
        files = self._state / "io" / "script"
        with files.open("w+") as out:
            done = subprocess.run(
                ["bash", str(_SCRIPT), *args],
                stdin=subprocess.DEVNULL,
                stdout=out,  # not a pipe: the sshd's inherit it
                stderr=subprocess.STDOUT,
                cwd="/",
                env=self._settings,
                timeout=120,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"hosts.sh {' '.join(args)}: {files.read_text()}")

    def _make_work(self) -> None:
        super()._make_work()
        work = self.path(".")
        at = work.parent / ".ssh"
        shutil.copytree(self._state / "dot-ssh", at)
        owner = work.stat()
        for path in (at, *at.iterdir()):
            path.chmod(0o700 if path.is_dir() else 0o600)
            os.chown(path, owner.st_uid, owner.st_gid)
