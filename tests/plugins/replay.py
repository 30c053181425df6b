"""Programs that answer as Flux's and HTCondor's do, by their manuals, and really run scripts here.

`install(folder)` writes flux, condor_submit, condor_q, condor_history and condor_rm there. A job is
a file `<id>.json` in the folder `REPLAY_JOBS`.

REPLAY_FAULT makes them misbehave: "garbage" (a submission prints none of its words), "down" (they
reach nobody), "pending" (jobs never start).
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PROGRAMS = ("flux", "condor_submit", "condor_q", "condor_history", "condor_rm")
_INTERVAL = 3.0  # between the signals to a job that is to end
_FIRST = 17


def install(folder: Path, *programs: str) -> None:
    """Write programs into a folder, for a PATH."""
    for name in programs:
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        program.chmod(0o755)


def _place() -> Path:
    return Path(os.environ["REPLAY_JOBS"])


def _fault() -> str:
    return os.environ.get("REPLAY_FAULT", "")


def _save(job: dict[str, Any]) -> None:
    path = _place() / f"{job['id']}.json"
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(job))
    new.replace(path)


def _load(number: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((_place() / f"{number}.json").read_text())
    except OSError:
        return None
    return found


def _all() -> list[dict[str, Any]]:
    numbers = sorted(int(path.stem) for path in _place().glob("*.json"))
    return [job for number in numbers if (job := _load(str(number))) is not None]


def _start(**facts: Any) -> int:
    """Note down a job and start its daemon, unless jobs are to wait; return its number."""
    number = max((job["id"] for job in _all()), default=_FIRST - 1) + 1
    _save({"id": number, "state": "waiting", "code": None, "signal": None, "why": "", **facts})
    if _fault() != "pending":
        _daemon("run", str(number))
    return number


def _daemon(*args: str) -> None:
    with open(os.devnull, "r+b") as null:
        subprocess.Popen(
            [sys.executable, __file__, *args],
            stdin=null,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )


def run(args: list[str]) -> int:
    """Be the daemon of one job: run it, and end it when it is time."""
    job = _load(args[0])
    assert job is not None
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(job["output"] or os.devnull, "ab"))
        process = stack.enter_context(
            subprocess.Popen(
                [job["script"]],
                env=os.environ | job["env"],
                cwd=job["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        )
        job |= {"state": "running", "began": time.time()}
        _save(job)
        asked, why, end = _place() / f"{args[0]}.kill", "", job["limit"]
        end = None if end is None else time.monotonic() + end
        while process.poll() is None:
            time.sleep(0.05)
            late = end is not None and time.monotonic() > end
            if asked.exists() or late:
                why = "late" if late else "killed"
                _end(process)
        code = process.returncode
    ended = {"state": "ended", "why": why, "code": max(code, 0), "signal": max(-code, 0)}
    _save(job | ended)
    return 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_INTERVAL)
            return


def _kill(job: dict[str, Any]) -> bool:
    """End a job; False: it has ended."""
    if job["state"] == "ended":
        return False
    (_place() / f"{job['id']}.kill").touch()
    if job["state"] == "waiting":
        _save(job | {"state": "ended", "why": "killed"})
    return True


# Flux. Its ids are numbers in base 58 after an f, or an ƒ where the locale has that letter.


def _f58(number: int) -> str:
    return f"f{number}x"


def _of_f58(word: str) -> dict[str, Any] | None:
    match = re.fullmatch(r"[fƒ]([0-9]+)x", word)
    return _load(match[1]) if match else None


def flux(args: list[str]) -> int:
    """Run a subcommand of flux."""
    if _fault() == "down":
        print("flux: ERROR: broker is unreachable", file=sys.stderr)
        return 1
    commands: dict[str, Callable[[list[str]], int]] = {
        "batch": _flux_batch,
        "jobs": _flux_jobs,
        "cancel": _flux_cancel,
        "run": _flux_run,
        "resource": _flux_resource,
    }
    return commands[args[0]](args[1:])


def _flux_batch(args: list[str]) -> int:
    """Take a script whose directives stand together at its head (flux-batch(1), RFC 36)."""
    (script,) = args
    assert os.environ["LC_ALL"] == "C"
    options: dict[str, str] = {}
    lines = Path(script).read_text().splitlines()[1:]
    head = next(at for at, line in enumerate(lines) if line and not line.startswith("#flux:"))
    assert not any(line.startswith("#flux:") for line in lines[head:])
    for line in lines[:head]:
        for word in shlex.split(line.removeprefix("#flux:"), comments=True):
            name, _, value = word.removeprefix("--").partition("=")
            options[name] = value
    if options.get("queue", "debug") != "debug":
        print(f"flux-batch: ERROR: [Errno 22] Invalid queue '{options['queue']}'", file=sys.stderr)
        return 1
    copy = _place() / f"{os.getpid()}.sh"  # "a file that is copied at the time of submission"
    shutil.copy(script, copy)
    limit = options.get("time-limit")
    number = _start(
        name=options["job-name"],
        script=str(copy),
        output=options["output"],
        cwd=options["cwd"],
        env={"FLUX_JOB_ID": "f", "FLUX_JOB_CC": "1", "FLUX_URI": "local:///child"},
        limit=None if limit is None else float(limit.removesuffix("m")) * 60,
    )
    print("???" if _fault() == "garbage" else _f58(number))
    return 0


def _flux_jobs(args: list[str]) -> int:
    form = args[args.index("-no") + 1]
    asked = args[args.index("-no") + 2 :]
    unknown = [word for word in asked if _of_f58(word) is None]
    jobs = [job for word in asked if (job := _of_f58(word)) is not None] if asked else _all()
    for job in jobs:
        print(re.sub(r"\{(.*?)\}", lambda field, job=job: _flux_field(job, field[1]), form))
    for word in unknown:
        print(f"flux-jobs: ERROR: JobID {word} unknown", file=sys.stderr)
    return 1 if unknown else 0


def _flux_field(job: dict[str, Any], name: str) -> str:
    waits, ended = job["state"] == "waiting", job["state"] == "ended"
    bad = "FAILED" if job["code"] or job["signal"] else "COMPLETED"
    last = {"killed": "CANCELED", "late": "TIMEOUT"}.get(job["why"], bad)
    code = str(job["code"] or -(job["signal"] or 0)) if job["code"] is not None else "-128"
    notes = {"killed": "", "late": "resource allocation expired"}
    return {
        "id.f58": _f58(job["id"]),
        "name": job["name"],
        "status": last if ended else "SCHED" if waits else "RUN",
        "returncode": code if ended else "",
        "nodelist": "" if waits else socket.gethostname(),
        "t_run!D": _flux_time(job, 0.0),
        "expiration!D": _flux_time(job, job["limit"]),
        "sched.t_estimate!D": "2030-01-07T13:31:00" if waits else "",
        "sched.reason_pending": "insufficient resources" if waits else "",
        "exception.note": notes.get(job["why"], ""),
    }[name]


def _flux_time(job: dict[str, Any], later: float | None) -> str:
    if "began" not in job or later is None:
        return ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(job["began"] + later))


def _flux_cancel(args: list[str]) -> int:
    status = 0
    for word in args:
        job = _of_f58(word)
        if job is None or not _kill(job):
            what = "unknown job id" if job is None else "job is inactive"
            print(f"flux-cancel: ERROR: {word}: {what}", file=sys.stderr)
            status = 1
    return status


def _flux_resource(args: list[str]) -> int:
    print("     STATE NNODES   NCORES    NGPUS NODELIST")
    print(f"      free      1        2        0 {socket.gethostname()}")
    return 0


def _flux_run(args: list[str]) -> int:
    """Start ranks by this environment's mpiexec, which serves PMI to them as Flux does."""
    count = args[0].removeprefix("-n")
    assert os.environ["FLUX_URI"] == "local:///child", "a launcher has to see its own job"
    at = next(number for number, word in enumerate(args) if not word.startswith("-"))
    label = "label" if "--label-io" in args[:at] else "plain"
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    here = [sys.executable, __file__, "rank", label, *args[at:]]
    many = ["--oversubscribe"] if "-opmi=pmix" in args else []
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    os.execve(mpiexec, [mpiexec, *many, "-n", count, *here], env)


def rank(args: list[str]) -> int:
    """Be what Flux's shell is to one rank: name it, and its lines."""
    number = os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
    env = os.environ | {"FLUX_TASK_RANK": number}
    if args[0] == "plain":
        os.execvpe(args[1], args[1:], env)
    with subprocess.Popen(
        args[1:], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, close_fds=False
    ) as process:
        pumps = [
            threading.Thread(target=_label, args=(number, pipe, fd))
            for pipe, fd in ((process.stdout, 1), (process.stderr, 2))
        ]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
    code = process.returncode
    return code if code >= 0 else 128 - code


def _label(number: str, pipe: IO[bytes], fd: int) -> None:
    for line in pipe:
        os.write(fd, f"{number}: ".encode() + line)


# HTCondor


def condor_submit(args: list[str]) -> int:
    """Take a description, and run its executable."""
    if _fault() == "down":
        print("ERROR: Can't find address of local schedd", file=sys.stderr)
        return 1
    assert args[0] == "-terse"
    text = Path(args[1]).read_text()
    told = dict(re.findall(r"^(\S+) = (.*)$", text, re.MULTILINE))
    assert text.endswith("\nqueue\n"), text
    assert told["universe"] == "vanilla"
    if told.get("accounting_group", "physics") != "physics":
        print("ERROR: Invalid accounting group", file=sys.stderr)
        return 1
    number = _start(
        name=told["batch_name"],
        script=told["executable"],
        output=told.get("output"),
        cwd=told["initialdir"],
        env={"_CONDOR_SCRATCH_DIR": "/tmp"},
        limit=float(told["allowed_job_duration"]) if "allowed_job_duration" in told else None,
    )
    print("???" if _fault() == "garbage" else f"{number}.0 - {number}.0")
    return 0


def _condor_ad(job: dict[str, Any]) -> dict[str, Any]:
    removed = job["why"] == "killed"
    held = job["why"] == "late"
    status = {"waiting": 1, "running": 2}.get(job["state"], 3 if removed else 5 if held else 4)
    ad: dict[str, Any] = {"ClusterId": job["id"], "ProcId": 0, "JobStatus": status}
    if removed:
        ad["RemoveReason"] = "via condor_rm (by user test)"
    if held:
        ad["HoldReason"] = "The job exceeded allowed job duration"
    if "began" in job:
        ad["JobCurrentStartDate"] = int(job["began"])
    if status == 2:
        ad["RemoteHost"] = f"slot1@{socket.gethostname()}"
    if status == 4:
        ad |= {"ExitSignal": job["signal"]} if job["signal"] else {"ExitCode": job["code"]}
    return ad


def _condor_list(args: list[str], *, ended: bool) -> int:
    if _fault() == "down":
        print("-- Failed to fetch ads from: <127.0.0.1:9618>", file=sys.stderr)
        return 1
    assert args[-3:-1] == ["-json", "-attributes"], args
    which = args[:-3]
    jobs = [job for job in _all() if (job["state"] == "ended" and job["why"] != "late") == ended]
    if which[:1] == ["-constraint"]:
        jobs = [job for job in jobs if f'Cmd == "{job["script"]}"' == which[1]]
    else:
        jobs = [job for job in jobs if f"{job['id']}.0" in which]
    names = args[-1].split(",")
    ads = [{name: ad[name] for name in names if name in ad} for ad in map(_condor_ad, jobs)]
    print(json.dumps(ads) if ads else "")  # nothing at all where there is no job
    return 0


def condor_q(args: list[str]) -> int:
    """List jobs that have not left the queue."""
    return _condor_list(args, ended=False)


def condor_history(args: list[str]) -> int:
    """List jobs that have."""
    return _condor_list(args, ended=True)


def condor_rm(args: list[str]) -> int:
    """Remove jobs."""
    status = 0
    for word in args:
        job = _load(word.partition(".")[0])
        if job is None or not _kill(job):
            print(f"Job {word} not found", file=sys.stderr)
            status = 1
        else:
            print(f"Job {word} marked for removal")
    return status


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
