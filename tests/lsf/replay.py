"""Programs that answer as LSF's do, by its reference, and really run job scripts on this host.

`install(folder)` writes bsub, bjobs, bkill, lsid, bqueues and blaunch there. A job is a file
`<id>.json` in the folder `REPLAY_LSF`.

REPLAY_LSF_FAULT makes them misbehave: "garbage" (bsub takes the job, and prints none of its words),
"old" (bjobs knows no JSON), "down" (bjobs does not reach LSF), "pending" (jobs never start).
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("bsub", "bjobs", "bkill", "lsid", "bqueues", "blaunch")
_TERM_OWNER = "TERM_OWNER: job killed by owner"
_TERM_RUNLIMIT = "TERM_RUNLIMIT: job killed after reaching LSF run time limit"
_INTERVAL = 3.0  # JOB_TERMINATE_INTERVAL, between the signals of bkill


def install(folder: Path) -> None:
    """Write the programs into a folder, for a PATH."""
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        program.chmod(0o755)


def _place() -> Path:
    return Path(os.environ["REPLAY_LSF"])


def _fault() -> str:
    return os.environ.get("REPLAY_LSF_FAULT", "")


def _save(job: dict[str, Any]) -> None:
    path = _place() / f"{job['id']}.json"
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(job))
    new.replace(path)


def _load(ident: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((_place() / f"{ident}.json").read_text())
    except OSError:
        return None
    return found


def bsub(args: list[str]) -> int:
    """Take a script from standard input."""
    if args == ["-V"]:
        print("IBM Spectrum LSF Standard 10.1.0.13, Apr 15 2022", file=sys.stderr)
        return 0
    text = sys.stdin.read()
    options: dict[str, str] = {}
    for line in re.findall(r"^#BSUB (.*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        options[words[0]] = words[1] if len(words) > 1 else ""
    queue = options.get("-q", "normal")
    if queue != "normal":
        print(f"{queue}: No such queue. Job not submitted.", file=sys.stderr)
        return 255
    ident = 1
    while (_place() / f"{ident}.json").exists():
        ident += 1
    job = {"id": ident, "stat": "PEND", "description": options.get("-Jd", ""), "reason": ""}
    job |= {"slots": int(options.get("-n", "1")), "limit": options.get("-W", ""), "code": ""}
    _save(job)
    (_place() / f"{ident}.sh").write_text(text)
    if _fault() != "pending":
        with open(os.devnull, "r+b") as null:
            subprocess.Popen(
                [sys.executable, __file__, "run", str(ident)],
                stdin=null,
                stdout=null,
                stderr=null,
                cwd=options.get("-cwd"),
                start_new_session=True,
            )
    where = f"queue <{queue}>" if "-q" in options else "default queue <normal>"
    print("???" if _fault() == "garbage" else f"Job <{ident}> is submitted to {where}.")
    return 0


def run(args: list[str]) -> int:
    """Be the daemon of one job: run it, and kill it when it is time."""
    job = _load(args[0])
    assert job is not None
    env = os.environ | {"LSB_JOBID": args[0], "LSB_DJOB_NUMPROC": str(job["slots"])}
    env["LSB_MCPU_HOSTS"] = f"{socket.gethostname()} {job['slots']}"
    end = time.monotonic() + 60 * float(job["limit"]) if job["limit"] else None
    script = str(_place() / f"{args[0]}.sh")
    with subprocess.Popen(["/bin/bash", script], env=env, start_new_session=True) as process:
        _save(job | {"stat": "RUN"})
        asked, reason = _place() / f"{args[0]}.kill", ""
        while process.poll() is None:
            time.sleep(0.05)
            late = end is not None and time.monotonic() > end
            if asked.exists() or late:
                reason = _TERM_RUNLIMIT if late else _TERM_OWNER
                _end(process)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    _save(job | {"stat": "EXIT" if code else "DONE", "code": str(code or ""), "reason": reason})
    return 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_INTERVAL)
            return


def bjobs(args: list[str]) -> int:
    """List jobs."""
    if _fault() == "down":
        print("LSF is down. Please wait ...", file=sys.stderr)
        return 255
    if "-json" in args and _fault() == "old":
        print("bjobs: Illegal option -- json\nUsage: bjobs [options]", file=sys.stderr)
        return 255
    form = args[args.index("-o") + 1]
    fields, _, delimiter = form.partition(" delimiter=")
    known = sorted((path.stem for path in _place().glob("*.json")), key=int)
    rows = []
    for ident in args[args.index("-o") + 2 :] or known:
        job = _load(ident)
        error = {"JOBID": ident, "ERROR": f"Job <{ident}> is not found"}
        rows.append(error if job is None else _row(job, fields.split()))
    if "-json" in args:
        print(json.dumps({"COMMAND": "bjobs", "JOBS": len(rows), "RECORDS": rows}, indent=2))
        return 0
    for row in rows:
        if "ERROR" in row:
            print(row["ERROR"], file=sys.stderr)
        else:
            print(delimiter.strip("'").join(row[name.upper()] or "-" for name in fields.split()))
    return 255 if any("ERROR" in row for row in rows) else 0


def _row(job: dict[str, Any], fields: list[str]) -> dict[str, str]:
    waits = "New job is waiting for scheduling" if job["stat"] == "PEND" else ""
    row = {
        "jobid": str(job["id"]),
        "stat": job["stat"],
        "exit_code": job["code"],
        "exit_reason": job["reason"],
        "pend_reason": waits,
        "exec_host": "" if waits else f"{job['slots']}*{socket.gethostname()}",
        "job_description": job["description"],
        "start_time": "" if waits else time.strftime("%b %d %H:%M"),
        "finish_time": time.strftime("%b %d %H:%M L") if job["code"] else "",
    }
    return {name.upper(): row[name] for name in fields}


def bkill(args: list[str]) -> int:
    """Ask the jobs' daemons to end them."""
    status = 0
    for ident in args:
        job = _load(ident)
        if job is None:
            print(f"Job <{ident}>: No matching job found", file=sys.stderr)
            status = 255
        elif job["stat"] in ("DONE", "EXIT"):
            print(f"Job <{ident}>: Job has already finished", file=sys.stderr)
            status = 255
        else:
            (_place() / f"{ident}.kill").touch()
            if job["stat"] == "PEND":
                _save(job | {"stat": "EXIT", "reason": _TERM_OWNER, "code": "130"})
            print(f"Job <{ident}> is being terminated")
    return status


def lsid(args: list[str]) -> int:
    """Name the cluster."""
    print("IBM Spectrum LSF Standard 10.1.0.13, Apr 15 2022\n\nMy cluster name is replay")
    print(f"My master name is {socket.gethostname()}")
    return 0


def bqueues(args: list[str]) -> int:
    """List the queues."""
    print("QUEUE_NAME      PRIO STATUS          MAX JL/U JL/P JL/H NJOBS  PEND   RUN  SUSP")
    print("normal           30  Open:Active       -    -    -    -     0     0     0     0")
    return 0


def blaunch(args: list[str]) -> int:
    """Run a command on this host, if it is the one that is meant."""
    assert args[0] == socket.gethostname(), args
    return subprocess.run(args[1:], check=False).returncode


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
