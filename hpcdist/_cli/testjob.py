"""The test job of `hpcdist doctor --run`: do workers find there what they need?"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from hpcdist._cli.schedulers import print_line
from hpcdist._cli.wait_for_job import Follower, NeverStarts
from hpcdist._keeper.folders import last_lines
from hpcdist._schedulers import job
from hpcdist._schedulers.batch_manager import BatchManager, Submission
from hpcdist._schedulers.findings import Finding, bad, doubt, good
from hpcdist._schedulers.verdict import Verdict
from hpcdist._transport import doors, network

_ANSWER = "answer.json"
_TAIL = 20
_LOOK_EVERY = 0.5
_VISITING = 5.0


class Doorbell:
    """Listens as process 1 would, and says a word to each that dials.

    Args:
        interface: See `network.listen`.
    """

    def __init__(self, interface: str | None) -> None:
        self.word = secrets.token_hex(8)
        self._listeners = network.listen(interface)
        self.targets = network.name(self._listeners)
        self.folder = ""  # of the test job, whose ranks may be waiting at doors
        self._visited: set[str] = set()
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._stop.close()
        self._thread.join()
        for listener in [*self._listeners, self._stopped]:
            listener.close()

    def _answer(self) -> None:
        while True:
            ready, _, _ = select.select([*self._listeners, self._stopped], [], [], _LOOK_EVERY)
            if self._stopped in ready:
                return
            self._visit()
            for listener in ready:
                # A visitor that has gone again misses nothing.
                with contextlib.suppress(OSError), listener.accept()[0] as visitor:
                    visitor.settimeout(1)
                    visitor.sendall(self.word.encode() + b"\n")

    def _visit(self) -> None:
        """Dial those who wait at a door for that, as they cannot dial us."""
        for path, targets in doors.doors(self.folder).items() if self.folder else ():
            if path not in self._visited:
                self._visited.add(path)
                # That side tells what it has heard.
                with contextlib.suppress(OSError):
                    network.dial(targets, self._say, _VISITING)

    def _say(self, visited: socket.socket, timeout: float) -> bool:
        visited.settimeout(timeout)
        with visited:
            visited.sendall(self.word.encode() + b"\n")
        return True


def check(
    manager: BatchManager,
    params: Mapping[str, object],
    here: Mapping[str, object],
    interface: str | None,
) -> Iterator[Finding]:
    """Run the job; find out whether it saw what it must.

    Args:
        manager: For as many ranks as there shall be.
        params: The job's options.
        here: What the interpreter has on this machine.
    """
    bell = Doorbell(interface)
    try:
        command = ["-P", "-m", "hpcdist._cli.probe", f"{job.FOLDER}/{_ANSWER}"]
        command += [bell.targets, bell.word]
        run = manager.submit_program(command, called=None, resubmit=0, **params)
        bell.folder = run.folder
        print_line(
            f"  test job {run.job}: one moment, or as long as it is queued (Ctrl-C cancels it)"
        )
        try:
            yield from _outcome(manager, run, here)
        finally:
            if not params.get("keep"):
                job.forget(run.folder)
    finally:
        bell.close()


def _outcome(
    manager: BatchManager, run: Submission, here: Mapping[str, object]
) -> Iterator[Finding]:
    try:
        verdict = Follower(manager.scheduler, run, lambda line: print_line(f"  {line}")).wait()
    except NeverStarts as exc:
        manager.scheduler.cancel([run.job])
        yield bad(f"the test job can never start: {exc}", "choose other options for the job")
        return
    except BaseException:
        manager.scheduler.cancel([run.job])
        raise
    answer = _read(os.path.join(run.folder, _ANSWER))
    log = "\n".join(last_lines(os.path.join(run.folder, "log"), _TAIL))
    if answer is None:
        yield _nothing(verdict, log)
        return
    yield from judge(answer, here, manager.n, log)


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path) as file:
            answer: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return None
    return answer


def _nothing(verdict: Verdict | None, log: str) -> Finding:
    said = "no record says how it ended" if verdict is None else verdict.describe()
    return bad(
        f"the test job did not come as far as our code: {said}",
        "see its last lines; interpreter, package and HPCDIST_DIR must be visible on compute nodes"
        if log
        else "it left no output: is HPCDIST_DIR on a file system that compute nodes share?",
        log,
    )


def judge(
    answer: Mapping[str, Any], here: Mapping[str, object], ranks: int, log: str = ""
) -> Iterator[Finding]:
    """Compare what the job saw with what is here."""
    host = answer["host"]
    names = ("python", "hpcdist", "mpi4py", "library")
    other = [name for name in names if answer.get(name) != here.get(name)]
    if other:
        seen = "\n".join(f"{n}: {answer.get(n)} there, {here.get(n)} here" for n in other)
        fix = "use the same environment: --python, --module, --setup"
        yield bad(f"{host} has other versions than this machine", fix, seen)
    else:
        yield good(f"{host} has the interpreter, hpcdist and MPI of this machine")
    yield from _reached(answer["reach"], answer.get("door"), host)
    yield _world(answer, ranks, log)


def _reached(reach: Mapping[str, str], door: str | None, host: str) -> Iterator[Finding]:
    failed = {where: why for where, why in reach.items() if why}
    if not failed:
        yield good(f"{host} reaches this machine at {', '.join(reach)}")
        return
    more = "\n".join(f"{where}: {why}" for where, why in failed.items())
    if len(failed) < len(reach):
        reached = ", ".join(where for where in reach if where not in failed)
        fix = "none is needed; interface= saves workers the attempt"
        yield doubt(f"{host} reaches this machine at {reached}, and not everywhere", fix, more)
        return
    if door == "":
        text = f"{host} cannot reach this machine, which reaches {host}: process 1 dials workers"
        yield doubt(text, "none is needed; another --interface may save some seconds", more)
        return
    fix = "is there a firewall? another --interface? else run the driver in a job (hpcdist submit)"
    yield bad(f"{host} cannot reach this machine, nor this machine {host}", fix, more)


def _world(answer: Mapping[str, Any], ranks: int, log: str) -> Finding:
    size = answer.get("size")
    if size == ranks:
        hosts = ", ".join(dict.fromkeys(answer.get("hosts", ())))
        return good(f"MPI starts there: {ranks} ranks are one world, on {hosts}")
    if size is None:
        return bad("MPI does not start there", "see the log, and the line on MPI flavours", log)
    return bad(
        f"{ranks} ranks were started, and MPI makes worlds of {size}",
        "the launcher does not fit the library: choose --mpi or --launcher=mpiexec",
        log,
    )
