"""The jobs of one launch, from their submission to their ends, and what ended them.

Everything here runs on background threads of the launch, which also keeps the clock. While a job
is queued the scheduler is asked every five seconds at most, for all jobs at once; once all are up,
less than once a minute, for when they end, which somebody may have changed. All launches of this
process together ask a scheduler once in five seconds at most. The exit file that a script leaves in
our own folder costs nothing to see.
"""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from hpcdist import _log
from hpcdist._contract.kept_managers import LaunchView, WorldView
from hpcdist._errors import LaunchError
from hpcdist._keeper.installed_mpi import MpiNotFound
from hpcdist._keeper.processes import ASKED
from hpcdist._monitor.output import say
from hpcdist._runtime.node import Node, Service
from hpcdist._schedulers import commands
from hpcdist._schedulers.calling import Caller
from hpcdist._schedulers.job import FOLDER, JobId
from hpcdist._schedulers.launchers import WorldLauncher
from hpcdist._schedulers.login_host import host_of
from hpcdist._schedulers.plan import BatchPlan, Group
from hpcdist._schedulers.render import render
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.submission import submit
from hpcdist._schedulers.takeover import Takeover, identity, lingering_jobs
from hpcdist._schedulers.verdict import JobState, Verdict, merge
from hpcdist._wire.member import JobEnd

TICK, REST = 0.5, 5.0  # how often the exit files are looked at; and how often, if there are none
FIRST_POLL, POLL_EVERY, POLL_AT_MOST_EVERY = 2.0, 5.0, 60.0
POLL_RUNNING_EVERY = 50.0  # a changed time limit is noticed within a minute
# A job that is not listed: how many polls before those who remember ended jobs are asked, and
# before it is given up.
MISSES, LOST = 2, 4
# After a loss: when to ask for the verdict. A job that ends is listed as ending for up to KillWait
# (30 s by default), and accounting lags behind by seconds.
PATIENCE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
STEADY = 4  # a job that still runs after so many questions is not ending
# What kills a job may reach its launcher first: then the script fails as if by itself. Grid Engine
# tells of a job a second after its end at the earliest.
OF_FAILURES = 5
TAIL = 20
# Once a launch is over: how long the answer to a submission is waited for, and how long any other
# command may take.
ANSWER, IMPATIENT = 3.0, 10.0
SUBMITTING = "submitting the job"
PURSUE_EVERY = 60.0  # seconds between attempts to end a job whose first node does not answer


class Pace(Service):
    """How often this process asks its schedulers, whatever the number of its launches."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._lock = node.machine.lock()  # guards the one below
        self._free_at: dict[str, float] = {}  # by scheduler

    def take(self, scheduler: str) -> bool:
        """Take a turn to ask a scheduler, if there is one just now."""
        now = self.node.machine.now()
        with self._lock:
            if now < self._free_at.get(scheduler, 0.0):
                return False
            self._free_at[scheduler] = now + POLL_EVERY * 0.9
        return True


class Following:
    """Submits the jobs of a launch and watches over them.

    Args:
        launch: The launch, with its worlds prepared.
        plan: What it was to be.
    """

    def __init__(self, launch: LaunchView, plan: BatchPlan) -> None:
        self._launch = launch
        self._plan = plan
        self._scheduler = plan.scheduler
        self._phase = "choosing a launcher"
        self._submitted: float | None = None
        self._pace = launch.node.service(Pace)
        self.host = host_of(launch.node, plan)
        self._caller = Caller(launch, self.host)
        self._due = 0.0
        self._asked_running = 0.0  # when it was last asked for jobs that run
        self._known_to_run: set[JobId] = set()  # those that it was asked for since they are up
        self._pause = POLL_EVERY
        self._misses: dict[JobId, int] = {}
        self._begun: float | None = None
        self._submitting = threading.Lock()  # held while a submission is in flight
        self._cancelling = threading.Lock()  # held while jobs are cancelled
        self._cancelled: set[JobId] = set()
        self._together: list[Sequence[str]] = []  # folders of worlds whose jobs share a script
        self._forgotten: set[str] = set()
        self._log: str | None = None  # of the commands; adapt=(0, hi) begins without a folder
        if launch.worlds:
            self._log = os.path.join(launch.worlds[0].folder, "commands.jsonl")
        self._takeover = Takeover(
            self._scheduler.name,
            lambda: launch.goes_on,
            self._end_of,
            lambda text: say(f"hpcdist: {text}"),
        )

    def begin(self) -> None:
        """Start to submit and to watch."""
        self._launch.background(self._submit_all)
        self._launch.every(self._go_round)

    # Submitting

    def _submit_all(self) -> None:
        self._begun = time.monotonic()
        try:
            with self.host.commands():
                self._reach()
                for group in self._plan.groups:
                    if not self._submit_group(group):
                        return
        except (MpiNotFound, LaunchError, RuntimeError, ValueError, OSError) as exc:
            if not self._launch.pending and self._phase == SUBMITTING:
                _log.log(
                    "warning", f"{exc}. If the job comes after all, it ends as soon as it starts"
                )
            said = isinstance(exc, MpiNotFound | LaunchError)
            self._launch.fail(exc if said else str(exc), phase=self._phase)
            return
        self._phase = "waiting for the job to start"
        self._launch.changed()
        self._submitted = time.monotonic()
        self._due = self._submitted + FIRST_POLL

    def _reach(self) -> None:
        with self._submitting:
            self._plan = self.host.reach(self._plan)

    def _submit_group(self, group: Group) -> bool:
        """Submit the job, or the job array, of some worlds; False: nobody waits any more."""
        with self._submitting:
            if not self._launch.pending:
                return False
            worlds = [self._launch.worlds[number] for number in group.worlds]
            worlds = self._take_over(group, worlds)
            if worlds and self._launch.pending:
                tasks = len(worlds) if len(worlds) > 1 else 0
                self._submit_worlds(replace(group, tasks=tasks), worlds)
        return True

    def _take_over(self, group: Group, worlds: list[WorldView]) -> list[WorldView]:
        """Take over jobs that linger; return the worlds that have got none."""
        if not self.host.takes_over or self._plan.scheduler.in_allocation(self._plan.asked):
            return worlds
        if not lingering_jobs(self._scheduler.name):
            return worlds
        launcher = self._plan.launcher(group.size)
        mine = identity(self._plan, group.size, launcher)
        left = []
        for world in worlds:
            self._describe(world, launcher, group)
            if (taken := self._takeover.take(world, mine)) is not None:
                self._together.append(taken.together)
                self._log = os.path.join(world.folder, "commands.jsonl")
            else:
                left.append(world)
        return left

    def _end_of(self, number: JobId) -> float | None:
        found = self._scheduler.poll([number], self._log).get(number)
        return None if found is None or found.end is None else found.end.timestamp()

    def _submit_worlds(self, group: Group, worlds: list[WorldView]) -> None:
        folder = self.host.folder(worlds[0])
        name = os.path.basename(folder)
        launcher = self._plan.launcher(group.size)
        spec = self._plan.workers(launcher, name, folder, group)
        self._together.append([world.folder for world in worlds])
        for world in worlds:
            world.command = _shown(spec.command, self.host.folder(world))
            self._describe(world, launcher, group)
        script = self.host.bring(worlds, render(spec))
        facts: dict[str, Any] = {
            "name": name,
            "scheduler": self._scheduler.name,
            "kind": "workers",
            "n": group.size * len(worlds),
            "what": f"{group.size * len(worlds)} workers",
            "command": _shown(spec.command, folder),
        }
        self.host.tell(worlds[0], facts | {"jobs": []})
        self._phase = SUBMITTING
        made = submit(self._scheduler, spec, script, self._log)
        for index, world in enumerate(worlds):
            world.submitted_at = time.monotonic()
            world.job = self._scheduler.task(made, index) if group.tasks else made
        jobs = [[world.job, world.job.cluster] for world in worlds]
        self.host.tell(worlds[0], facts | {"jobs": jobs, "array": made if group.tasks else ""})

    def _describe(self, world: WorldView, launcher: WorldLauncher, group: Group) -> None:
        """Tell in the join file of a world how it is started, and how long its job is to linger."""
        seconds = self._plan.linger
        mine = identity(self._plan, group.size, launcher)
        world.ranks_may_leave = launcher.apart
        world.save_join(
            how=launcher.how,
            label=launcher.label,
            ends=launcher.ends,
            rank_variable=launcher.rank_variable,
            step_variables=launcher.step_variables,
            doors=True,
            mpi=launcher.mpi,
            together=launcher.mpi and not launcher.apart,
            end=launcher.end,
            kill=launcher.kill,
            linger=None if seconds is None else {"seconds": seconds, "asked": mine},
            **self.host.welcome(world),
        )

    def submit_one(self, world: WorldView) -> None:
        """Submit the job of one world more, which replaces what the launch loses."""
        if self._log != os.path.join(world.folder, "commands.jsonl"):
            self._log = os.path.join(world.folder, "commands.jsonl")  # the first folder may go
        with self.host.commands(), self._submitting:
            if world.closed:
                return
            self._plan = self.host.reach(self._plan)
            group = Group(world.expected or 0, 0, ())
            if self._take_over(group, [world]):
                self._submit_worlds(group, [world])
        self._phase = "waiting for the job to start"
        self._due = time.monotonic() + FIRST_POLL

    # Watching

    def _go_round(self) -> float:
        """See how the jobs are; return in how many seconds to do so again."""
        with self.host.commands():
            return self._look_at_jobs()

    def _look_at_jobs(self) -> float:
        waiting = self._waiting()
        for world in waiting:
            if exit_verdict(world.folder) is not None:
                world.verdict = final_verdict(self._scheduler, world, PATIENCE[:STEADY], self._log)
                self._ended(world)
        self._caller.go_round()
        self._check_queue_timeout()
        self._poll_when_due(waiting)
        return TICK if waiting or self._launch.pending else REST

    def _waiting(self) -> list[Any]:
        """Return the worlds whose jobs are submitted and not up."""
        if self._submitted is None:
            return []
        to_come = [w for w in self._launch.worlds if self._launch.pending or w.renews]
        waiting = [w for w in to_come if w.job is not None and not w.up]
        return [world for world in waiting if not world.closed]

    def _running(self) -> list[Any]:
        """Return the worlds whose jobs are up."""
        return [w for w in self._launch.worlds if w.job is not None and w.up and not w.closed]

    def _check_queue_timeout(self) -> None:
        limit, now = self._plan.asked.own.queue_timeout, time.monotonic()
        if limit is None or self._begun is None:
            return
        if self._submitted is None:
            if now - self._begun >= limit:
                text = f"the job could not be submitted within queue_timeout={limit:g} s"
                self._launch.fail(text, phase=self._phase)
            return
        late = [world for world in self._waiting() if now - world.submitted_at >= limit]
        self._ask_at_last([world for world in late if world.verdict is None])
        for world in late:
            if world.verdict is None or world.verdict.state.waiting:
                reason = world.verdict.reason if world.verdict is not None else ""
                said = f": {reason}" if reason else ""
                self._fail(
                    f"job {world.job} did not start within queue_timeout={limit:g} s{said}", world
                )

    def _ask_at_last(self, worlds: list[Any]) -> None:
        """Ask for jobs that are to be given up and have never been asked for.

        Other launches of this process have had the turns: see `Pace`.
        """
        try:
            if worlds:
                self._poll(worlds, [])
        except (commands.CommandFailed, commands.CommandLate) as exc:  # says nothing of the jobs
            self._launch.reason = str(exc)

    def _poll_when_due(self, waiting: list[Any]) -> None:
        now = time.monotonic()
        due = bool(waiting) and now >= self._due
        running = self._running()
        new = [world for world in running if world.job not in self._known_to_run]
        if not (due or new or (running and now >= self._asked_running + POLL_RUNNING_EVERY)):
            return
        if not self._pace.take(self._scheduler.name):
            return
        self._asked_running = now
        self._known_to_run.update(world.job for world in running)
        try:
            self._poll([world for world in waiting if due], running)
            self._pause = POLL_EVERY
        except (commands.CommandFailed, commands.CommandLate) as exc:  # says nothing of the jobs
            self._pause = min(self._pause * 2, POLL_AT_MOST_EVERY)
            self._launch.reason = str(exc)
        self._due = time.monotonic() + self._pause

    def _poll(self, worlds: list[Any], running: list[Any]) -> None:
        found = self._scheduler.poll([world.job for world in (*worlds, *running)], self._log)
        for world in running:
            if world.job in found:
                world.verdict = merge(world.verdict, found[world.job])
                self._note_end(world, found[world.job])
        if not worlds:
            return
        for world in worlds:
            if world.job in found:
                self._misses[world.job] = 0
                world.verdict = merge(world.verdict, found[world.job])
            else:
                self._miss(world)
        self._publish(worlds)
        for world in worlds:
            if world.up or world.closed or not (self._launch.pending or world.renews):
                continue
            if world.verdict is not None and world.verdict.state.terminal:
                world.verdict = final_verdict(self._scheduler, world, (0.0,), self._log)
                self._ended(world)
            elif world.verdict is not None and self._scheduler.hopeless(world.verdict):
                self._fail(f"job {world.job} can never start: {world.verdict.reason}", world)

    def _note_end(self, world: WorldView, said: Verdict) -> None:
        """Note when a job that runs is to end, if the scheduler or its options say so."""
        if said.state is not JobState.RUNNING:
            return
        limit, at = self._plan.walltime, None
        if said.end is not None:
            at = said.end.timestamp()
            if said.start is not None:
                limit = at - said.start.timestamp()
        elif said.start is not None and limit is not None:
            at = said.start.timestamp() + limit
        if at is not None:
            world.set_end(JobEnd(at, limit))

    def _miss(self, world: WorldView) -> None:
        misses = self._misses[world.job] = self._misses.get(world.job, 0) + 1
        if misses < MISSES:
            return
        world.verdict = final_verdict(self._scheduler, world, (0.0,), self._log)
        if misses >= LOST and (world.verdict is None or not world.verdict.state.terminal):
            self._fail(
                f"the scheduler no longer lists job {world.job}, and no record says how it ended",
                world,
            )

    def _publish(self, worlds: list[Any]) -> None:
        told = [world.verdict for world in worlds if not world.up and world.verdict is not None]
        queued = [verdict for verdict in told if verdict.state.waiting]
        self._launch.reason = queued[0].reason if queued else None
        starts = [verdict.start for verdict in queued if verdict.start is not None]
        self._launch.estimated_start = max(starts) if starts else None
        if worlds and not queued:
            self._phase = "waiting for the workers to register"

    def _ended(self, world: WorldView) -> None:
        said = world.verdict.describe() if world.verdict is not None else "no record says how"
        self._fail(f"job {world.job} ended before its workers had registered: {said}", world)

    def _fail(self, text: str, world: WorldView) -> None:
        if not (self._launch.pending or world.renews) or world.closed or world.up:
            return
        self._launch.fail(text, phase=self._phase, tail=self.tail(world), world=world)
        if self._launch.pending:  # others suffice
            self.cancel()

    def tail(self, world: WorldView, n: int = TAIL) -> list[str]:
        """Return the last lines of what a job has printed."""
        lines: list[str] = []
        cwd, folder = self._plan.settings.dir, self.host.folder(world)
        for path in self._scheduler.log_files(self._plan.asked, cwd, folder, world.job):
            lines += self.host.tail(path, n)
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
            total = sum(world.expected or 0 for world in worlds)
            pids = len(self._launch.pids)
            return f"{what} running{waiting}: {pids} of {total} workers have registered"
        reason = f": {self._launch.reason}" if self._launch.reason else ""
        return f"{what} queued{reason}{_clock(self._launch.estimated_start)}"

    # The end

    def cancel(self) -> None:
        """End what may be left of the closed worlds' jobs."""
        with self.host.commands(), self._cancelling:  # a second caller finds it done
            self._await_submission()
            left = [world.job for world in self._launch.worlds if self._may_live(world)]
            self._cancelled.update(left)
            self._submitting.release()
            if not self._launch.goes_on:
                self._launch.leash.cut()  # questions whose answers nobody needs any more
            if left:
                try:
                    self._scheduler.cancel(left, self._log)
                except (RuntimeError, OSError) as exc:
                    _log.log("warning", f"jobs {', '.join(left)} could not be cancelled: {exc}")

    def _await_submission(self) -> None:
        """Hold `_submitting`. What is being submitted gets its number first.

        Where it has none after a while, and the launch is over, the command is ended, and the job
        is looked for by its name (see `submission`).
        """
        leash = self._launch.leash
        if not self._launch.goes_on:
            leash.limit = IMPATIENT
        while not self._submitting.acquire(timeout=ANSWER):
            if not self._launch.goes_on:
                leash.cut()
                self.host.cut()

    def _may_live(self, world: WorldView) -> bool:
        if not world.closed or world.stays or world.job is None or world.job in self._cancelled:
            return False
        if exit_verdict(world.folder) is not None:
            return False
        return world.verdict is None or not world.verdict.state.terminal

    def forget(self, world: WorldView) -> list[str]:
        """Take note that a world has ended; return the folders that nobody needs any more.

        The tasks of a job array share the folder of the first of them.
        """
        self._forgotten.add(world.folder)
        for folders in self._together:
            if world.folder in folders:
                if not self._forgotten.issuperset(folders):
                    return []
                self._together.remove(folders)
                self._forgotten.difference_update(folders)
                return list(folders)
        return [world.folder]


def final_verdict(
    scheduler: Scheduler,
    world: WorldView,
    patience: Sequence[float] | None = None,
    log: str | None = None,
    *,
    questions: int = 1,
) -> Verdict | None:
    """Ask, again and again, how a job ended; return what is known at the end.

    Args:
        world: Its `job`, `folder` and `verdict` count.
        patience: Pauses before each question; by default until a job that is ending has ended.
        log: Where the questions are written.
        questions: How many, without an answer, before a script that failed by itself is believed.
    """
    known: Verdict | None = world.verdict
    last = exit_verdict(world.folder)
    for number, pause in enumerate(PATIENCE if patience is None else patience):
        steady = known is not None and known.word == "RUNNING" and last is None
        if number >= STEADY and steady:
            break  # the job lives on without the workers
        time.sleep(pause)
        answer: Verdict | None = None
        try:
            answer = scheduler.post_mortem([world.job], log).get(world.job)
        except (RuntimeError, OSError):  # no answer; the exit file remains
            pass
        known = merge(known, answer)
        last = last or exit_verdict(world.folder)
        if known is not None and known.state.terminal:
            break
        if answer is None and last is not None and _suffices(last, number + 1, questions):
            break
    return merge(known, last)


def _suffices(last: Verdict, asked: int, of_failures: int) -> bool:
    """Tell whether the exit file says enough where the scheduler says nothing.

    Of a script that was asked to end, only the scheduler knows why. One that failed by itself says
    how. One that ended in good order may have been left without workers by a time limit: Slurm
    signals the ranks first, and a keeper is sometimes gone before the script gets its signal.
    """
    if last.signal:
        return False
    return asked >= (of_failures if last.state is JobState.FAILED else STEADY)


def give_up(scheduler: Scheduler, world: WorldView) -> str:
    """End a job whose first node does not answer; return what came of it.

    Where the scheduler does not end it, it is asked again and again while this process lives.
    """
    number: JobId = world.job
    _log.log("warning", f"job {number}: its first node does not answer; cancelling it")
    try:
        scheduler.cancel_lost(number)
        said = "so it was cancelled"
    except (RuntimeError, OSError) as exc:
        _log.log("warning", f"job {number} could not be cancelled: {exc}; trying again")
        said = f"and it could not be cancelled yet: {exc}"
    _pursue(world.launch.node, scheduler, number)
    return f"its first node does not answer, {said}"


def _pursue(node: Node, scheduler: Scheduler, number: JobId) -> None:
    context = copy_context()  # which knows the host on which commands run

    def look() -> None:
        try:
            found = scheduler.poll([number]).get(number)
            if found is None or found.state.terminal:
                return
            _log.log("warning", f"job {number} is still listed as {found.word}; cancelling again")
            scheduler.cancel_lost(number)
        except (RuntimeError, OSError) as exc:
            _log.log("info", f"job {number} could not be cancelled: {exc}")
        _pursue(node, scheduler, number)

    node.progress.call_later(
        PURSUE_EVERY, lambda: node.turns.background(partial(context.run, look))
    )


def exit_verdict(folder: str) -> Verdict | None:
    """Read the exit file that a job script leaves; None: there is none.

    The file reads "code time host", and then the signal by which the script was asked to end, if
    it was: why, only the scheduler knows. The keeper may be asked before the script is, see
    `JobKeeper`.
    """
    try:
        with open(os.path.join(folder, "exit")) as file:
            code, when, host, *asked = file.read().split()
        status, end = int(code), datetime.fromtimestamp(int(when), UTC).astimezone()
    except (OSError, ValueError, OverflowError):
        return None
    state = JobState.FAILED if status else JobState.DONE
    return Verdict(
        state=state,
        word="FAILED" if status else "COMPLETED",
        end=end,
        nodes=host,
        exit_code=status,
        signal=signal.SIGTERM if asked or status == ASKED else None,
        source="exit file",
    )


def _shown(argv: Sequence[str], folder: str) -> str:
    return shlex.join(argument.replace(FOLDER, folder) for argument in argv)


def _clock(when: datetime | None) -> str:
    if when is None:
        return ""
    today = when.date() == datetime.now(when.tzinfo).date()
    return (
        f", estimated start {when:%H:%M}" if today else f", estimated start {when:%a %d %b %H:%M}"
    )
