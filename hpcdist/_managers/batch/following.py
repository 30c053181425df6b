"""The jobs of one launch, from their submission until they are up, and what ended them.

Everything here runs on background threads of the launch, which also keeps the clock. While a job
is queued the scheduler is asked at most every five seconds, for all jobs at once; never once their
keepers have dialled in. The exit file that a script leaves in our own folder costs nothing to see.
"""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hpcdist import _log
from hpcdist._managers.batch import commands, job
from hpcdist._managers.batch.job import FOLDER, JobId, write_script
from hpcdist._managers.batch.options import Asked
from hpcdist._managers.batch.render import render
from hpcdist._managers.batch.verdict import JobState, Verdict, merge
from hpcdist._managers.launching import MpiNotFound

if TYPE_CHECKING:
    from hpcdist._managers.batch.base import BatchManager

LOOK_EVERY = 0.5  # at the exit files
TICK = 0.5
FIRST_POLL, POLL_EVERY, POLL_AT_MOST_EVERY = 2.0, 5.0, 60.0
# A job that is not listed: how many polls before those who remember ended jobs are asked, and
# before it is given up.
MISSES, LOST = 2, 4
# After a loss: when to ask for the verdict. A job that ends is listed as ending for up to KillWait
# (30 s by default), and accounting lags behind by seconds.
PATIENCE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
STEADY = 4  # a job that still runs after so many questions is not ending
TAIL = 20


@dataclass(frozen=True)
class Group:
    """Worlds of one size that are submitted together.

    Attributes:
        size: How many workers each has.
        tasks: How many tasks the job array has; 0: it is a single job.
        worlds: Their numbers.
    """

    size: int
    tasks: int
    worlds: tuple[int, ...]


def groups(sizes: Sequence[int], longest: int) -> list[Group]:
    """Put worlds of one size together, in arrays of at most `longest` tasks.

    >>> groups([4, 4, 2], 1000)
    [Group(size=4, tasks=2, worlds=(0, 1)), Group(size=2, tasks=0, worlds=(2,))]
    """
    found: list[tuple[int, list[int]]] = []
    for number, size in enumerate(sizes):
        if found and found[-1][0] == size and len(found[-1][1]) < longest:
            found[-1][1].append(number)
        else:
            found.append((size, [number]))
    return [Group(size, len(them) if len(them) > 1 else 0, tuple(them)) for size, them in found]


class Following:
    """Submits the jobs of a launch and watches over them.

    Args:
        manager: Whose jobs they are.
        launch: The launch, with its worlds prepared.
        asked: Its options, read.
    """

    def __init__(self, manager: BatchManager, launch: Any, asked: Asked) -> None:
        self._manager = manager
        self._launch = launch
        self._asked = asked
        self._phase = "choosing a launcher"
        self._submitted: float | None = None
        self._due = 0.0
        self._pause = POLL_EVERY
        self._misses: dict[JobId, int] = {}
        self._submitting = threading.Lock()  # held while a submission is in flight
        self._cancelled: set[JobId] = set()
        self._together: list[list[Any]] = []  # worlds whose jobs share a script
        self._forgotten: set[str] = set()
        self._log = os.path.join(launch.worlds[0].folder, "commands.jsonl")

    def begin(self) -> None:
        """Start to submit and to watch."""
        self._launch.background(self._submit_all)
        self._launch.every(LOOK_EVERY, self._look)
        self._launch.every(TICK, self._poll_when_due)

    # Submitting

    def _submit_all(self) -> None:
        sizes = [world.expected for world in self._launch.worlds]
        try:
            for group in groups(sizes, self._manager.longest_array):
                with self._submitting:
                    if not self._launch.pending:
                        return
                    self._submit(group)
        except (MpiNotFound, RuntimeError, ValueError, OSError) as exc:
            self._launch.fail(exc if isinstance(exc, MpiNotFound) else str(exc), phase=self._phase)
            return
        self._phase = "waiting for the job to start"
        self._submitted = time.monotonic()
        self._due = self._submitted + FIRST_POLL

    def _submit(self, group: Group) -> None:
        worlds = [self._launch.worlds[number] for number in group.worlds]
        folder = worlds[0].folder
        name = os.path.basename(folder)
        settings = self._launch.settings
        launcher = self._manager.choose_launcher(group.size, self._asked, settings)
        spec = self._manager.workers_spec(settings, self._asked, launcher, name, folder, group)
        self._together.append(worlds)
        if group.tasks:
            _number_tasks(folder, [world.folder for world in worlds])
        script = write_script(folder, render(spec))
        for world in worlds:
            world.script = script
            world.command = _shown(spec.command, world.folder)
            world.ranks_may_leave = launcher.apart
            world.save_join(
                how=launcher.how,
                mpi=launcher.mpi,
                together=launcher.mpi and not launcher.apart,
                end=launcher.end,
                kill=launcher.kill,
            )
        facts: dict[str, Any] = {
            "name": name,
            "scheduler": self._manager.scheduler,
            "kind": "workers",
            "n": group.size * len(worlds),
            "what": f"{group.size * len(worlds)} workers",
            "command": _shown(spec.command, folder),
        }
        job.write_manifest(folder, facts | {"jobs": []})
        self._phase = "submitting the job"
        made = self._manager.submit(script, self._asked, self._log)
        for index, world in enumerate(worlds):
            world.job = self._manager.task(made, index) if group.tasks else made
        jobs = [[world.job, world.job.cluster] for world in worlds]
        job.write_manifest(folder, facts | {"jobs": jobs})

    # Watching

    def _waiting(self) -> list[Any]:
        """Return the worlds whose jobs are submitted and not up."""
        if not self._launch.pending or self._submitted is None:
            return []
        waiting = [w for w in self._launch.worlds if w.job is not None and not w.up]
        return [world for world in waiting if not world.closed]

    def _look(self) -> None:
        for world in self._waiting():
            if exit_verdict(world.folder) is not None:
                world.verdict = final_verdict(self._manager, world, PATIENCE[:STEADY], self._log)
                self._ended(world)
        self._check_queue_timeout()

    def _check_queue_timeout(self) -> None:
        limit = self._asked.own.queue_timeout
        if limit is None or self._submitted is None:
            return
        if time.monotonic() - self._submitted < limit:
            return
        for world in self._waiting():
            if world.verdict is None or world.verdict.state.waiting:
                reason = world.verdict.reason if world.verdict is not None else ""
                said = f": {reason}" if reason else ""
                self._fail(
                    f"job {world.job} did not start within queue_timeout={limit:g} s{said}", world
                )

    def _poll_when_due(self) -> None:
        worlds = self._waiting()
        if not worlds or time.monotonic() < self._due:
            return
        try:
            self._poll(worlds)
            self._pause = POLL_EVERY
        except (commands.CommandFailed, commands.CommandLate) as exc:  # says nothing of the jobs
            self._pause = min(self._pause * 2, POLL_AT_MOST_EVERY)
            self._launch.reason = str(exc)
        self._due = time.monotonic() + self._pause

    def _poll(self, worlds: list[Any]) -> None:
        found = self._manager.poll([world.job for world in worlds], self._log)
        for world in worlds:
            if world.job in found:
                self._misses[world.job] = 0
                world.verdict = merge(world.verdict, found[world.job])
            else:
                self._miss(world)
        self._tell(worlds)
        for world in worlds:
            if world.up or world.closed or not self._launch.pending:
                continue
            if world.verdict is not None and world.verdict.state.terminal:
                world.verdict = final_verdict(self._manager, world, (0.0,), self._log)
                self._ended(world)
            elif world.verdict is not None and self._manager.hopeless(world.verdict):
                self._fail(f"job {world.job} can never start: {world.verdict.reason}", world)

    def _miss(self, world: Any) -> None:
        misses = self._misses[world.job] = self._misses.get(world.job, 0) + 1
        if misses < MISSES:
            return
        world.verdict = final_verdict(self._manager, world, (0.0,), self._log)
        if misses >= LOST and (world.verdict is None or not world.verdict.state.terminal):
            self._fail(
                f"the scheduler no longer lists job {world.job}, and nobody tells how it ended",
                world,
            )

    def _tell(self, worlds: list[Any]) -> None:
        told = [world.verdict for world in worlds if not world.up and world.verdict is not None]
        queued = [verdict for verdict in told if verdict.state.waiting]
        self._launch.reason = queued[0].reason if queued else None
        starts = [verdict.start for verdict in queued if verdict.start is not None]
        self._launch.estimated_start = max(starts) if starts else None
        if worlds and not queued:
            self._phase = "waiting for the workers to register"

    def _ended(self, world: Any) -> None:
        said = world.verdict.tell() if world.verdict is not None else "nobody tells how"
        self._fail(f"job {world.job} ended before its workers had registered: {said}", world)

    def _fail(self, text: str, world: Any) -> None:
        if not self._launch.pending or world.closed or world.up:
            return
        self._launch.fail(text, phase=self._phase, tail=self.tail(world), world=world)
        if self._launch.pending:  # others suffice
            self.cancel()

    def tail(self, world: Any, n: int = TAIL) -> list[str]:
        """Return the last lines of what a job has printed."""
        lines: list[str] = []
        cwd = self._launch.settings.dir
        for path in self._manager.log_files(self._asked, cwd, world.folder, world.job):
            lines += last_lines(path, n)
        return lines[-n:]

    def note(self) -> str:
        """Say in one line how far the launch is."""
        worlds = self._launch.worlds
        jobs = [world.job for world in worlds if world.job is not None]
        if not jobs:
            return self._phase
        what = f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {jobs[0]} … {jobs[-1]}"
        queued = [w for w in worlds if not w.up and (w.verdict is None or w.verdict.state.waiting)]
        if len(queued) < len(worlds):
            waiting = f" ({len(queued)} of {len(worlds)} queued)" if queued else ""
            total = sum(world.expected for world in worlds)
            pids = len(self._launch.pids)
            return f"{what} running{waiting}: {pids} of {total} workers have registered"
        reason = f": {self._launch.reason}" if self._launch.reason else ""
        return f"{what} queued{reason}{_clock(self._launch.estimated_start)}"

    # The end

    def cancel(self) -> None:
        """End what may be left of the closed worlds' jobs."""
        with self._submitting:  # what is being submitted gets its number, and is cancelled
            left = [world.job for world in self._launch.worlds if self._may_live(world)]
            self._cancelled.update(left)
        if left:
            try:
                self._manager.cancel(left, self._log)
            except (RuntimeError, OSError) as exc:
                _log.log("warning", f"jobs {', '.join(left)} could not be cancelled: {exc}")

    def _may_live(self, world: Any) -> bool:
        if not world.closed or world.job is None or world.job in self._cancelled:
            return False
        if exit_verdict(world.folder) is not None:
            return False
        return world.verdict is None or not world.verdict.state.terminal

    def forget(self, world: Any) -> list[str]:
        """Take note that a world has ended; return the folders that nobody needs any more.

        The tasks of a job array share the folder of the first of them.
        """
        self._forgotten.add(world.folder)
        for worlds in self._together:
            folders = [other.folder for other in worlds]
            if world.folder in folders:
                return folders if self._forgotten.issuperset(folders) else []
        return [world.folder]


def final_verdict(
    manager: BatchManager,
    world: Any,
    patience: Sequence[float] | None = None,
    log: str | None = None,
) -> Verdict | None:
    """Ask, again and again, how a job ended; return what is known at the end.

    Args:
        world: Its `job`, `folder` and `verdict` count.
        patience: Pauses before each question; by default until a job that is ending has ended.
    """
    known: Verdict | None = world.verdict
    last = exit_verdict(world.folder)
    for number, pause in enumerate(PATIENCE if patience is None else patience):
        if number >= STEADY and known is not None and known.word == "RUNNING":
            break  # the job lives on without the workers
        time.sleep(pause)
        try:
            known = merge(known, manager.post_mortem([world.job], log).get(world.job))
        except (RuntimeError, OSError):  # no answer; the exit file remains
            pass
        last = last or exit_verdict(world.folder)
        if known is not None and known.state.terminal:
            break
        if last is not None and not last.signal:
            break  # the script left by itself: the scheduler will say the same, later
    return merge(known, last)


def exit_verdict(folder: str) -> Verdict | None:
    """Read the exit file that a job script leaves; None: there is none.

    The file reads "code time host", and then the signal by which the script was asked to end, if
    it was: why, only the scheduler knows.
    """
    try:
        with open(os.path.join(folder, "exit")) as file:
            code, when, host, *asked = file.read().split()
        status, end = int(code), datetime.fromtimestamp(int(when), UTC).astimezone()
    except (OSError, ValueError):
        return None
    state = JobState.FAILED if status else JobState.DONE
    return Verdict(
        state=state,
        word="FAILED" if status else "COMPLETED",
        end=end,
        nodes=host,
        exit_code=status,
        signal=signal.SIGTERM if asked else None,
        source="exit file",
    )


def last_lines(path: str, n: int) -> list[str]:
    """Return the last lines of a file, without reading all of a long one."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - (1 << 16)))
            return list(deque(file.read().decode(errors="replace").splitlines(), maxlen=n))
    except OSError:
        return []


def _number_tasks(folder: str, folders: Sequence[str]) -> None:
    """Let a job array find its tasks' folders by their numbers."""
    os.mkdir(os.path.join(folder, "tasks"), 0o700)
    for number, target in enumerate(folders):
        os.symlink(os.path.abspath(target), os.path.join(folder, "tasks", str(number)))


def _shown(argv: Sequence[str], folder: str) -> str:
    return shlex.join(argument.replace(FOLDER, folder) for argument in argv)


def _clock(when: datetime | None) -> str:
    if when is None:
        return ""
    today = when.date() == datetime.now(when.tzinfo).date()
    return (
        f", estimated start {when:%H:%M}" if today else f", estimated start {when:%a %d %b %H:%M}"
    )
