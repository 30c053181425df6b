"""A real Slurm for tests: `cluster.sh` makes it, this drives it and looks after it.

The machines are namespaces of this one, each with its own host name, address, /tmp and /dev/shm:
`login`, where users work, and the nodes `n1`, `n2`, `n3`. The checkout, the virtual environment and
its Python are visible in them under their usual paths, read-only for the user. All share /home.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from tests.helpers import eventually, patient

T = TypeVar("T")

__all__ = ["PREEMPTING", "Ended", "Finished", "Job", "Running", "Slurm", "missing_programs"]

ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = Path(__file__).with_name("cluster.sh")
_USER, _UID = "hpcuser", 20001
_HOME = f"/home/{_USER}"
_PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "ip", "unshare", "nsenter", "setpriv")
_FOR_SACCT = ("slurmdbd", "mariadbd")
_ADMIN_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
# What the launchers forget in /tmp now and then: MPICH's map of the machine, Open MPI's sessions.
_LAUNCHERS_OWN = ("/tmp/hydra_hwloc_xmlfile_*", "/tmp/prted.*")
# Lines for `extra_conf`: jobs of `compute` take the place of jobs in `scavenge`, which are ended.
PREEMPTING = """PreemptType=preempt/partition_prio
PreemptMode=CANCEL
PartitionName=scavenge Nodes=ALL MaxTime=INFINITE PriorityTier=0 PreemptMode=CANCEL State=UP"""
_ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STAGE_OUT")


def missing_programs(*, sacct: bool = False) -> list[str]:
    """Return what would have to be installed here."""
    wanted = _PROGRAMS + (_FOR_SACCT if sacct else ())
    return [name for name in wanted if shutil.which(name, path=_ADMIN_PATH) is None]


@dataclass(frozen=True)
class Finished:
    """How a command on one of the machines ended."""

    rc: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Job:
    """A job as squeue lists it."""

    id: str
    state: str
    reason: str
    nodes: str
    name: str


@dataclass(frozen=True)
class Ended:
    """A job that has ended: its state, its exit code, and what it has written."""

    state: str
    rc: int
    signal: int
    out: str


@dataclass
class Running:
    """A command under way on one of the machines."""

    command: Sequence[str]
    files: Path
    process: "subprocess.Popen[bytes]"
    begin: float = field(default_factory=time.monotonic)

    @property
    def os_pid(self) -> int:
        """The number under which this machine knows the command (inside it has another)."""
        # nsenter waits for its child, which is the command: everything between is an exec.
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        (child,) = eventually(lambda: Path(children).read_text().split(), message="no child yet")
        return int(child)

    @property
    def out(self) -> str:
        """What it has written to its standard output so far."""
        return self.files.with_suffix(".out").read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it has written to its standard error so far."""
        return self.files.with_suffix(".err").read_text(errors="replace")

    def send(self, number: int) -> None:
        """Send it a signal, as a terminal or a user would."""
        os.kill(self.os_pid, number)

    def kill(self) -> None:
        """Kill it in the way nobody can handle."""
        if self.process.poll() is None:
            self.send(signal.SIGKILL)

    def end(self) -> None:
        """Kill it, if it still runs, with all of its group; reap it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # not reaped: the number is still its own
        self.process.wait(10)

    def wait(self, timeout: float = 60) -> Finished:
        """Wait for its end; a failure, with all that was written, if it does not come."""
        try:
            rc = self.process.wait(patient(timeout))
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(
                f"no end within {timeout:g} s: {' '.join(self.command)}\n"
                f"--- stdout ---\n{self.out}\n--- stderr ---\n{self.err}"
            ) from None
        return Finished(rc, self.out, self.err, time.monotonic() - self.begin)


class Slurm:
    """A cluster that is up, seen from outside.

    Attributes:
        python: The interpreter of this test run, which the cluster's user has too.
        work: Where `file` writes and commands run, as the cluster's user names it.
        expected: Patterns of files that a test may leave: relative to the user's home, or absolute
            ones of any machine's /tmp or /dev/shm.
        patience: How many seconds what a test has left has to be gone.
    """

    patience = 10.0

    def __init__(
        self,
        nodes: int = 3,
        cpus: int = 64,
        *,
        sacct: bool = False,
        extra_conf: str = "",
        put_off: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.nodes = tuple(f"n{i}" for i in range(1, nodes + 1))
        self.python = sys.executable
        self.work = f"{_HOME}/work"
        self.expected: list[str] = []
        self._put_off = put_off
        self._cpus = cpus
        self._count = 0
        self._running: list[Running] = []
        self._hurt: set[str] = set()
        # Below /tmp, whatever TMPDIR says: that one is private to the run.
        self._state = Path(tempfile.mkdtemp(prefix="hs-", dir="/tmp"))
        self._state.chmod(0o755)
        self._settings = {
            "PATH": _ADMIN_PATH,
            "HOME": "/root",
            "HPC_STATE": str(self._state),
            "HPC_SHARED": str(ROOT),
            "HPC_EXPOSE": ":".join(dict.fromkeys((sys.prefix, sys.base_prefix))),
            # Inside the cluster's own network; a number of its own makes logs easier to read.
            "HPC_SUBNET": f"10.{random.SystemRandom().randrange(64, 128)}.{os.getpid() % 250 + 1}",
            "HPC_ACCT": "1" if sacct else "0",
            "HPC_EXTRA_CONF": extra_conf,
        }
        (self._state / "io").mkdir()
        self._known: dict[str, set[str]] = {}

    # --- up and down

    def up(self) -> None:
        """Start it; it takes a second, three with sacct."""
        self._put_off(90)
        self._script("up", str(len(self.nodes)), str(self._cpus))
        for machine in ("login", *self.nodes):
            self._known[machine] = set(self._listing(machine))
        self._make_work()

    def down(self) -> None:
        """End every process in it, and remove all it has written."""
        self._put_off(60)
        self._script("down")
        self._end_commands()
        shutil.rmtree(self._state, ignore_errors=True)

    def log(self, machine: str = "login") -> str:
        """Return the log of slurmctld, or of a node's slurmd."""
        name = "slurmctld.log" if machine == "login" else f"slurmd.{machine}.log"
        return (self._state / "log" / name).read_text(errors="replace")

    # --- files of the user

    def path(self, name: str) -> Path:
        """Return where a file of the user's working folder, or of all, lies on this machine."""
        inside = Path(self.work, name)
        return self._state / "home" / inside.relative_to("/home")

    def file(self, name: str, text: str, mode: int = 0o644) -> str:
        """Write a file into the user's working folder; return its path inside the cluster."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        for made in (path, *path.parents):
            if made == self.path("."):
                break
            os.chown(made, _UID, _UID)
        return f"{self.work}/{name}"

    def read(self, name: str) -> str:
        """Return the text of a file in the user's working folder; empty while there is none."""
        path = self.path(name)
        return path.read_text(errors="replace") if path.is_file() else ""

    def own_folder(self, name: str) -> Path:
        """Return an empty folder that all machines see under the path it has here."""
        folder = self._state / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o755)
        return folder

    # --- commands

    def start(
        self,
        *command: str,
        on: str = "login",
        root: bool = False,
        env: dict[str, str] | None = None,
    ) -> Running:
        """Start a command on a machine, as the user, and return at once."""
        who = [] if root else ["setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups"]
        self._count += 1
        files = self._state / "io" / str(self._count)
        place = "/" if root else self.work
        go = ["sh", "-c", 'cd "$0" && exec "$@"', place, *command]
        with (
            files.with_suffix(".out").open("wb") as out,
            files.with_suffix(".err").open("wb") as err,
        ):
            process = subprocess.Popen(
                ["nsenter", "-t", self._pid1(on), "-m", "-u", "-i", "-n", "-p", "--", *who, *go],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**self._environment(root), **(env or {})},
                start_new_session=True,
            )
        running = Running(command, files, process)
        self._running.append(running)
        return running

    def login(
        self, *command: str, timeout: float = 60, env: dict[str, str] | None = None
    ) -> Finished:
        """Run a command as the user on the login node."""
        self._put_off(timeout + 20)
        return self.start(*command, env=env).wait(timeout)

    def driver(
        self, text: str, *args: str, timeout: float = 60, env: dict[str, str] | None = None
    ) -> Finished:
        """Run a Python program as the user on the login node."""
        return self.login(self.python, self.program(text), *args, timeout=timeout, env=env)

    def program(self, text: str) -> str:
        """Write a Python program, and return its path inside the cluster."""
        self._count += 1
        return self.file(f"driver{self._count}.py", text)

    def node(self, i: int, *command: str, timeout: float = 60) -> Finished:
        """Run a command as the user on a node, past Slurm."""
        return self.start(*command, on=f"n{i}").wait(timeout)

    def root(self, *command: str, on: str = "login", timeout: float = 60) -> Finished:
        """Run a command as root on a machine."""
        return self.start(*command, on=on, root=True).wait(timeout)

    # --- jobs

    def submit(self, script: str, *options: str, env: dict[str, str] | None = None) -> str:
        """Submit a job script (its text); return the job's number."""
        self._count += 1
        name = self.file(f"job{self._count}.sh", script)
        done = self.login("sbatch", "--parsable", *options, name, env=env)
        assert done.rc == 0, done
        return done.out.strip().partition(";")[0]

    def ended(self, job: str, timeout: float = 60) -> Ended:
        """Wait for the end of a job, and return how it was."""
        self._put_off(timeout + 20)

        def look() -> dict[str, str]:
            shown = self.root("scontrol", "show", "job", "--oneliner", job).out
            facts = dict(re.findall(r"(\w+)=(\S*)", shown))
            return {} if facts.get("JobState", "PENDING") in _ALIVE else facts

        try:
            facts = eventually(look, timeout=timeout)
        except AssertionError:
            raise AssertionError(f"job {job} has not ended: {self.jobs()}") from None
        rc, _, number = facts["ExitCode"].partition(":")
        path = facts["StdOut"].removeprefix("/home/")
        file = self._state / "home" / path
        out = file.read_text(errors="replace") if file.is_file() else ""
        return Ended(facts["JobState"], int(rc), int(number), out)

    def jobs(self) -> list[Job]:
        """Return all jobs that have not ended."""
        listed = self.root("squeue", "--noheader", "--array", "--format=%i|%T|%r|%N|%j")
        assert listed.rc == 0, listed
        return [Job(*line.split("|", 4)) for line in listed.out.splitlines()]

    # --- accidents

    def kill_node(self, i: int) -> None:
        """Take a node's power away: silence on the network, all its processes dead."""
        self._hurt.add(f"n{i}")
        self._script("kill-node", str(i))

    def cut_node(self, i: int) -> None:
        """Pull a node's cable: its processes live on, and reach nobody."""
        self._hurt.add(f"n{i}")
        self._script("cut-node", str(i))

    def heal_node(self, i: int) -> None:
        """Plug the cable in again, or boot the node; return when Slurm has it back."""
        self._put_off(80)
        self._script("heal-node", str(i))
        self._hurt.discard(f"n{i}")

    # --- what is there

    def processes(self, *machines: str) -> dict[int, str]:
        """Return the user's processes, by their number on this machine, as "machine: command"."""
        spaces = {}
        for machine in machines or ("login", *self.nodes):
            try:
                spaces[os.readlink(f"/proc/{self._pid1(machine)}/ns/pid")] = machine
            except OSError:  # a node without power
                continue
        found = {}
        for name in os.listdir("/proc"):
            try:
                place = spaces.get(os.readlink(f"/proc/{name}/ns/pid") if name.isdigit() else "")
                if place is None:
                    continue
                status = Path(f"/proc/{name}/status").read_text()
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            uid = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
            program = re.search(r"^Name:\s+(.*)$", status, re.MULTILINE)
            title = (
                b" ".join(words).decode(errors="replace").strip() or f"[{program and program[1]}]"
            )
            if (uid and uid[1] == str(_UID)) or "slurmstepd" in title:
                found[int(name)] = f"{place}: {title[:300]}"
        return found

    def files(self) -> list[str]:
        """Return what is new in /tmp and /dev/shm of all machines, and in the user's home."""
        found = []
        for machine in ("login", *self.nodes):
            new = [name for name in self._listing(machine) if name not in self._known[machine]]
            found += [f"{machine}: {name}" for name in new if not self._may_stay(name)]
        home = self._state / "home" / _USER
        for path in sorted(home.rglob("*")):
            name = path.relative_to(home)
            if name.parts[0] == "work" or path.is_dir():
                continue
            if not any(name.match(pattern) for pattern in self.expected):
                found.append(f"home: {name}")
        return found

    def drain(self, patience: float | None = None) -> None:
        """Fail unless all jobs, processes and files of the user are gone by and by."""
        patience = self.patience if patience is None else patience
        self._put_off(patience * 3 + 30)
        left = [f"job {job}" for job in _settle(self.jobs, patience)]
        if left:
            self.root("scancel", "--full", f"--user={_USER}")
            self.root("scancel", f"--user={_USER}")
            _settle(self.jobs, 20)
        running = _settle(self.processes, patience)
        left += [f"process {os_pid} on {title}" for os_pid, title in running.items()]
        for os_pid in running:
            try:
                os.kill(os_pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        left += [f"file on {name}" for name in _settle(self.files, patience)]
        self._sweep()
        assert not left, "left behind:\n" + "\n".join(left)

    def tidy(self) -> None:
        """After a test: mend what it broke, see that nothing is left, and empty the home."""
        try:
            for machine in sorted(self._hurt):
                self.heal_node(int(machine[1:]))
            self.drain()
        finally:
            self._end_commands()
            self.expected.clear()
            self._make_work()

    # --- inside

    def _end_commands(self) -> None:
        """End and reap what tests have started: the failure of one is no trouble of another's."""
        while self._running:
            self._running.pop().end()

    def _script(self, *args: str) -> None:
        files = self._state / "io" / "script"
        with files.open("w+") as out:
            done = subprocess.run(
                ["bash", str(_SCRIPT), *args],
                stdin=subprocess.DEVNULL,
                stdout=out,  # not a pipe: the daemons inherit it
                stderr=subprocess.STDOUT,
                cwd="/",
                env=self._settings,
                timeout=120,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"cluster.sh {' '.join(args)}: {files.read_text()}")

    def _pid1(self, machine: str) -> str:
        return (self._state / "pid" / machine).read_text().strip()

    def _environment(self, root: bool) -> dict[str, str]:
        path = f"{Path(self.python).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        home = "/root" if root else _HOME
        found = {"HOME": home, "PATH": path, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
        if not root:
            found |= {"USER": _USER, "LOGNAME": _USER, "SHELL": "/bin/bash"}
        try:
            metadata.distribution("hpcdist")
        except metadata.PackageNotFoundError:  # run from the checkout, without an installation
            found["PYTHONPATH"] = str(ROOT)
        return found

    def _listing(self, machine: str) -> Iterator[str]:
        try:
            top = Path(f"/proc/{self._pid1(machine)}/root")
            for folder in ("tmp", "dev/shm"):
                yield from sorted(f"/{folder}/{entry}" for entry in os.listdir(top / folder))
        except OSError:  # a node without power
            return

    def _may_stay(self, name: str) -> bool:
        patterns = (*_LAUNCHERS_OWN, *self.expected)
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def _make_work(self) -> None:
        home = self._state / "home" / _USER
        for entry in home.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        folder = home / "work"
        folder.mkdir()
        os.chown(folder, _UID, _UID)

    def _sweep(self) -> None:
        """Remove what is new in /tmp and /dev/shm, so that it is reported only once."""
        for machine in ("login", *self.nodes):
            for name in list(self._listing(machine)):
                if name not in self._known[machine]:
                    self.root("rm", "-rf", name, on=machine)


def _settle(look: Callable[[], T], patience: float) -> T:
    deadline = time.monotonic() + patience
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
