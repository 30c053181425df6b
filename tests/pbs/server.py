"""A PBS for tests: it answers as a real OpenPBS 23.06 was seen to, and really runs the jobs.

Only what hpcdist uses is there, with the traps that were recorded: scripts run in a login shell in
the user's home with a bare environment, tasks of other hosts have no environment either and print
into the job's own output, nothing is said of a finished job without `-x`, one unknown id spoils
only the exit status, and what can never run is accepted and waits.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

VERSION = "23.06.06"
CPUS = 8  # of each node
_TERM_TO_KILL = 3.0
_UID = 20001
_LETTERS = "AceCJjklmMNopqPrRSuvW"  # options of qsub with a value


@dataclass
class PbsJob:
    """A job, from its submission on."""

    ident: str
    options: dict[str, str]
    resources: dict[str, str]
    cwd: str
    argument: str
    state: str = "Q"
    substate: int = 10
    comment: str = ""
    status: int | None = None
    slots: list[str] = field(default_factory=list)
    started: str = ""
    deleted: bool = False
    output: IO[bytes] | None = None
    index: str = ""  # within a job array

    @property
    def done(self) -> bool:
        """Whether it is history."""
        return self.state == "F"


class Refused(Exception):
    """A command fails, in these words."""

    def __init__(self, rc: int, text: str, out: str = "") -> None:
        super().__init__(text)
        self.answer = {"rc": rc, "out": out, "err": text + "\n"}


class Server:
    """The server, its scheduler, and the execution daemon of every node.

    Attributes:
        domain: What the names of nodes end with where PBS writes them down for a job.
        unreachable: A node that does not answer others.
        history: Whether it remembers jobs that have ended.
        closed: Why no job starts now; "": they do.
        faulty: What is put into its JSON, where a job's variables would be.
        version: What `qstat --version` says.
        calls: All commands that were given.
    """

    def __init__(self, state: Path, nodes: tuple[str, ...], enter: Callable[[str], list[str]]):
        self.history = True
        self.closed = self.faulty = self.unreachable = self.domain = ""
        self.version = f"pbs_version = {VERSION}\n"
        self.calls: list[list[str]] = []
        self.jobs: dict[str, PbsJob] = {}
        self._state, self._nodes, self._enter = state, nodes, enter
        self._next = 0
        self._tasks = itertools.count(1)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        (state / "jobs").mkdir(exist_ok=True)
        (state / "etc" / "profile.d").mkdir(parents=True, exist_ok=True)
        folder = Path(__file__).with_name("bin")
        (state / "etc" / "profile.d" / "pbs.sh").write_text(f"export PATH={folder}:$PATH\n")
        (state / "etc" / "pbs.socket").write_text(f"{state}/pbs.sock\n")

        class Handler(socketserver.StreamRequestHandler):
            def handle(handler) -> None:
                told = json.loads(handler.rfile.readline())
                with contextlib.suppress(BrokenPipeError):  # a pbs_tmrsh may be killed
                    handler.wfile.write(json.dumps(self._answer(told)).encode() + b"\n")

        self._door = socketserver.ThreadingUnixStreamServer(str(state / "pbs.sock"), Handler)
        self._door.daemon_threads = True
        os.chmod(state / "pbs.sock", 0o777)
        self._serving = threading.Thread(target=self._door.serve_forever, args=(0.05,))
        self._serving.start()

    def close(self) -> None:
        """End all jobs, and serve no more."""
        for job in list(self.jobs.values()):
            self._end(job)
        for thread in self._threads:
            thread.join(30)
        self._door.shutdown()
        self._door.server_close()
        self._serving.join()

    def reset(self) -> None:
        """Be as at the beginning, for the next test."""
        for job in list(self.jobs.values()):
            self._end(job)
        self.history = True
        self.closed = self.faulty = self.unreachable = self.domain = ""
        self.version = f"pbs_version = {VERSION}\n"
        self.calls.clear()

    def open(self) -> None:
        """Let jobs start again."""
        self.closed = ""
        for job in list(self.jobs.values()):
            self._schedule(job)

    def exceed_walltime(self, ident: str) -> None:
        """Find that a job's time is up."""
        self.jobs[ident].status = -29
        self._terminate(self.jobs[ident])

    def listed(self) -> list[PbsJob]:
        """Return the jobs that have not ended."""
        return [job for job in self.jobs.values() if not job.done]

    # Commands

    def _answer(self, told: dict[str, Any]) -> dict[str, Any]:
        self.calls.append([told["command"], *told["args"]])
        out, err, rc = "", "", 0
        try:
            answer = getattr(self, "_" + told["command"])(told, told["args"])
            return {"out": out, "err": err, "rc": rc} | answer
        except Refused as exc:
            return exc.answer

    def _qsub(self, told: dict[str, Any], args: list[str]) -> dict[str, Any]:
        script = Path(str(self._state / "home") + args[-1].removeprefix("/home"))
        if not script.is_file():
            raise Refused(1, "qsub: script file:: No such file or directory")
        text = script.read_text()
        words = list(args[:-1])
        for line in text.splitlines():
            if line.startswith("#PBS "):
                words += shlex.split(line.removeprefix("#PBS "))
            elif line.strip() and not line.startswith("#"):
                break
        options, resources = _parse(words)
        _check(options, resources)
        indices = _indices(options)
        with self._lock:
            number = self._next
            self._next += 1
            made = [
                PbsJob(
                    f"{number}{index and f'[{index}]'}.head",
                    *(options, resources, told["cwd"], args[-1]),
                    index=index,
                )
                for index in indices
            ]
            self.jobs |= {job.ident: job for job in made}
        for job in made:
            (self._state / "jobs" / f"{job.ident}.SC").write_text(text)
            (self._state / "jobs" / f"{job.ident}.SC").chmod(0o755)
            self._schedule(job)
        return {"out": _whole(made[0]) + "\n"}

    def _qstat(self, told: dict[str, Any], args: list[str]) -> dict[str, Any]:
        if args == ["--version"]:
            return {"out": self.version}
        if "-B" in args:
            facts = {"server_state": "Active"} | (
                {"job_history_enable": "True"} if self.history else {}
            )
            return {"out": json.dumps({"Server": {"head": facts}})}
        if "-Q" in args:
            limits: dict[str, Any] = {"resources_max": {"walltime": "24:00:00"}}
            facts = limits | {"enabled": "True", "started": "True"}
            return {"out": json.dumps({"Queue": {"workq": facts}})}
        if "-x" in args and not self.history:
            raise Refused(15140 % 256, "qstat: PBS is not configured to maintain job history")
        found, errors, rc = {}, "", 0
        for name in [word for word in args if word[0].isdigit()]:
            job, shown = self._named(name), {}
            if job is not None and "[]" in name:
                shown = {"job_state": "B", "array": "True"}
            elif job is not None and job.done and job.index and self._goes_on(job):
                shown = {"job_state": "X"}  # until its array has ended
            if job is None or (job.done and not self.history):
                errors, rc = errors + f"qstat: Unknown Job Id {name}\n", 153
            elif job.done and "-x" not in args and not shown:
                errors += f"qstat: {name} Job has finished, use -x or -H to obtain historical "
                errors, rc = errors + "job information\n", 35
            else:
                found[name if "[]" in name else job.ident] = _shown(job) | shown
        whole = {"timestamp": 1, "pbs_version": VERSION, "pbs_server": "head", "Jobs": found}
        text = json.dumps(whole, indent=4)
        if self.faulty:
            text = text.replace('"Variable_List": {', '"Variable_List": {\n' + self.faulty)
        return {"out": text + "\n" if found else "", "err": errors, "rc": rc}

    def _qselect(self, told: dict[str, Any], args: list[str]) -> dict[str, Any]:
        idents = dict.fromkeys(_whole(job) for job in self.listed())
        return {"out": "".join(f"{ident}\n" for ident in idents)}

    def _named(self, name: str) -> PbsJob | None:
        """Return a job by its id; any task of a job array for that."""
        full = name if "." in name else f"{name}.head"
        if "[]" in full:
            return next((job for job in self.jobs.values() if _whole(job) == full), None)
        return self.jobs.get(full)

    def _goes_on(self, task: PbsJob) -> bool:
        return any(_whole(job) == _whole(task) for job in self.listed())

    def _qdel(self, told: dict[str, Any], args: list[str]) -> dict[str, Any]:
        errors, rc = "", 0
        for name in args:
            job = self.jobs.get(name if "." in name else f"{name}.head")
            if job is None:
                errors, rc = errors + f"qdel: Unknown Job Id {name}\n", 153
            elif job.done:
                errors, rc = errors + f"qdel: Job has finished {name}\n", 35
            else:
                self._end(job)
        return {"err": errors, "rc": rc}

    def _pbs_tmrsh(self, told: dict[str, Any], args: list[str]) -> dict[str, Any]:
        job = self.jobs.get(told["env"].get("PBS_JOBID", ""))
        if job is None or "PBS_NODEFILE" not in told["env"]:
            raise Refused(255, "pbs_tmrsh: not executing under PBS")
        if args[0].startswith("-") and args[0] != "-n":
            raise Refused(255, "usage: pbs_tmrsh [-n][-l username] host [-n][-l username] command")
        host, *command = args
        if not host.endswith(self.domain) or host.removesuffix(self.domain) not in job.slots:
            raise Refused(255, f'pbs_tmrsh: host "{host}" is not a node in job <{job.ident}>')
        if host == self.unreachable:
            raise Refused(255, f'pbs_tmrsh: tm_spawn: host "{host}" err TM_ESYSTEM')
        task = next(self._tasks)
        process = self._start(
            job, task, host.removesuffix(self.domain), command, subprocess.DEVNULL
        )
        status = process.wait()
        # With a task's process its session ends.
        self._signal(job, signal.SIGKILL, task)
        return {"rc": status if status >= 0 else 128 - status}

    def _pbsdsh(self, told: dict[str, Any], args: list[str]) -> dict[str, Any]:
        raise Refused(1, "pbsdsh: its tasks have no environment, use pbs_tmrsh")

    # Jobs

    def _schedule(self, job: PbsJob) -> None:
        with self._lock:
            if job.state != "Q":
                return
            if "h" in job.options:
                job.state = "H"
                return
            never, slots = _place(job.resources, self._nodes)
            job.comment = never or self.closed
            if job.comment:
                return
            job.slots, job.state, job.substate = slots, "R", 42
            job.started = time.ctime()
            job.comment = "Job run at Sat Nov 21 at 12:00 on (n1:ncpus=4)"
        thread = threading.Thread(target=self._run, args=(job,))
        self._threads.append(thread)
        thread.start()

    def _run(self, job: PbsJob) -> None:
        script = self._state / "jobs" / f"{job.ident}.SC"
        spool = self._state / "jobs" / f"{job.ident}.OU"
        nodefile = self._state / "jobs" / job.ident
        nodefile.write_text("".join(f"{host}{self.domain}\n" for host in job.slots))
        target = self._output_path(job)
        direct = "d" in job.options.get("k", "") and target.parent.is_dir()
        tmp = f"/tmp/pbs.{job.ident}"
        self._on_hosts(job, "install", "-d", "-o", str(_UID), "-m", "700", tmp)
        with (target if direct else spool).open("ab") as output:
            os.chmod(output.name, 0o600)
            os.chown(output.name, _UID, _UID)
            job.output = output
            # The shell reads the name of the script, as a login shell.
            task = next(self._tasks)
            process = self._start(
                job, task, job.slots[0], ["/bin/bash", "-l"], subprocess.PIPE, str(nodefile)
            )
            assert process.stdin is not None
            process.stdin.write(f"{script}\n".encode())
            process.stdin.close()
            status = process.wait()
            job.state, job.substate = "E", 51
            self._signal(job, signal.SIGKILL)
        self._on_hosts(job, "rm", "-rf", tmp)
        if not direct and target.parent.is_dir():
            target.write_bytes(spool.read_bytes())
            os.chown(target, _UID, _UID)
        if job.status is None:
            job.status = status if status >= 0 else 256 - status
        job.substate = 91 if job.deleted else 92 if job.status == 0 else 93
        ends = {91: "terminated by hpcuser@login", 92: "finished", 93: "failed"}
        if job.status == -29:
            ends[93] = "exceeded resource walltime"
        job.comment += f" and {ends[job.substate]}"
        job.state = "F"

    def _end(self, job: PbsJob) -> None:
        with self._lock:
            if job.state in ("Q", "H"):
                job.state, job.substate = "F", 91
                job.comment = "Job terminated by hpcuser@login"
                return
            if job.done or job.deleted:
                return
            job.deleted = True
        thread = threading.Thread(target=self._terminate, args=(job,))
        self._threads.append(thread)
        thread.start()

    def _terminate(self, job: PbsJob) -> None:
        """SIGTERM to every process of the job on all hosts; later SIGKILL."""
        self._signal(job, signal.SIGTERM)
        end = time.monotonic() + _TERM_TO_KILL
        while time.monotonic() < end and job.state == "R":
            time.sleep(0.05)
        self._signal(job, signal.SIGKILL)

    def _signal(self, job: PbsJob, number: int, task: int = 0) -> None:
        marks = [f"PBS_JOBID={job.ident}"] + ([f"PBS_TASKNUM={task}"] if task else [])
        for name in os.listdir("/proc"):
            try:
                if os.stat(f"/proc/{name}").st_uid != _UID or not name.isdigit():
                    continue
                words = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                if all(mark.encode() in words for mark in marks):
                    os.kill(int(name), number)
            except OSError:
                continue

    def _start(
        self,
        job: PbsJob,
        task: int,
        host: str,
        command: list[str],
        stdin: int,
        nodefile: str = "",
    ) -> subprocess.Popen[bytes]:
        """Start a process of a job on a host, in the user's home, with no environment but PBS's."""
        env = {
            "HOME": "/home/hpcuser",
            "USER": "hpcuser",
            "SHELL": "/bin/bash",
            "PATH": "/bin:/usr/bin",
            "PBS_ENVIRONMENT": "PBS_BATCH",
            "PBS_JOBID": job.ident,
            "PBS_TASKNUM": str(task),
            "TMPDIR": f"/tmp/pbs.{job.ident}",
            "PBS_O_WORKDIR": job.cwd,
            "NCPUS": "1",
        }
        env |= {"PBS_ARRAY_INDEX": job.index} if job.index else {}
        env |= {"PBS_NODEFILE": nodefile} if nodefile else {}
        go = ["env", "-i", *(f"{key}={value}" for key, value in env.items())]
        who = ["setpriv", f"--reuid={_UID}", f"--regid={_UID}", "--clear-groups"]
        return subprocess.Popen(
            [*self._enter(host), *who, "sh", "-c", 'cd && exec "$@"', "sh", *go, *command],
            stdin=stdin,
            stdout=job.output,
            stderr=job.output,
            env={"HOME": "/home/hpcuser", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
            start_new_session=True,
        )

    def _on_hosts(self, job: PbsJob, *command: str) -> None:
        for host in dict.fromkeys(job.slots):
            subprocess.run([*self._enter(host), *command], check=False)

    def _output_path(self, job: PbsJob) -> Path:
        number = job.ident.partition(".")[0]
        given = job.options.get("o", f"{job.options.get('N', 'STDIN')}.o{number}")
        given = given.replace("^array_index^", job.index)
        inside = os.path.join(job.cwd, given).removeprefix("/home")
        return Path(str(self._state / "home") + inside)


def _whole(job: PbsJob) -> str:
    """Return the id of a job, or of the array whose task it is."""
    return re.sub(r"\[\d+\]", "[]", job.ident)


def _indices(options: dict[str, str]) -> list[str]:
    """Return the numbers of the tasks of a job array; of a single job, one empty text."""
    if "J" not in options:
        return [""]
    first, last = map(int, options["J"].partition("%")[0].split("-"))
    if first >= last:
        raise Refused(2, "qsub: illegal -J value")
    if options.get("r") == "n":
        raise Refused(15175 % 256, "qsub: cannot submit non-rerunable Array Job")
    return [str(index) for index in range(first, last + 1)]


def _parse(words: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    options, resources = {}, {}
    while words:
        word = words.pop(0)
        if not re.fullmatch(r"-\w", word) or word[1] not in _LETTERS + "fhIVXz":
            raise Refused(2, "usage: qsub [-a date_time] [-A account_string] ...")
        value = words.pop(0) if word[1] in _LETTERS else ""
        if word == "-l":
            name, _, amount = value.partition("=")
            resources[name] = amount
        else:
            options[word[1]] = value
    return options, resources


def _check(options: dict[str, str], resources: dict[str, str]) -> None:
    if options.get("q", "workq") != "workq":
        raise Refused(170, "qsub: Unknown queue")
    for name, value in resources.items():
        if name not in ("select", "place", "walltime", "ncpus", "mem"):
            raise Refused(187, f"qsub: Unknown resource Resource_List.{name}")
        if name == "walltime" and not re.fullmatch(r"[\d:]+", value):
            raise Refused(166, "qsub: Illegal attribute or resource value Resource_List.walltime")
        if name in ("mem", "ncpus") and "select" in resources:
            text = '"-lresource=" cannot be used with "select" or "place", resource is:'
            raise Refused(15150 % 256, f"qsub: {text} {name}")


def _place(resources: dict[str, str], nodes: tuple[str, ...]) -> tuple[str, list[str]]:
    """Find nodes; return why there can be none, and the lines of the node file."""
    free = dict.fromkeys(nodes, CPUS)
    slots: list[str] = []
    apart = "scatter" in resources.get("place", "")
    for part in resources.get("select", f"1:ncpus={resources.get('ncpus', 1)}").split("+"):
        count, _, rest = part.partition(":")
        asked = dict(word.split("=") for word in rest.split(":"))
        cpus = int(asked.get("ncpus", 1))
        for _ in range(int(count)):
            fitting = [node for node, left in free.items() if left >= cpus]
            fitting = [node for node in fitting if not (apart and node in slots)]
            if not fitting:
                if apart and len(set(slots)) == len(nodes):
                    return "Can Never Run: Not enough total nodes available", []
                return "Can Never Run: Insufficient amount of resource: ncpus", []
            free[fitting[0]] -= cpus
            slots += [fitting[0]] * int(asked.get("mpiprocs", 1))
    return "", slots


def _shown(job: PbsJob) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "Job_Name": job.options.get("N", "STDIN"),
        "Job_Owner": "hpcuser@login",
        "job_state": job.state,
        "queue": "workq",
        "substate": job.substate,
        "Variable_List": {"PBS_O_WORKDIR": job.cwd, "BAR": 100000},
        "Submit_arguments": job.argument,
    }
    if job.slots:
        hosts = dict.fromkeys(job.slots)
        facts["exec_host"] = "+".join(f"{host}/0*{job.slots.count(host)}" for host in hosts)
        facts["stime"] = job.started
    if job.comment:
        facts["comment"] = job.comment
    if job.done and job.status is not None:
        facts["Exit_status"] = 256 + 15 if job.deleted else job.status
    return facts
