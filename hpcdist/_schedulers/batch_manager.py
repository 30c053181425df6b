"""Managers whose workers are jobs of a batch scheduler: from a plan to jobs, and to their ends.

What is a scheduler's own is in `scheduler`; `job_watch` watches over the jobs of one launch.
"""

from __future__ import annotations

import os
import shlex
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcdist._contract.kept_managers import JobManager, LaunchView, Plan, WorldView
from hpcdist._contract.managers import Settings, default_addprocs_params
from hpcdist._managers.ssh_link import words
from hpcdist._managers.ssh_machines import parse
from hpcdist._public import public_in
from hpcdist._runtime.node import here
from hpcdist._schedulers import job, options, plan, verdict
from hpcdist._schedulers.again import keep_spec
from hpcdist._schedulers.job import JobId, JobSpec, write_script
from hpcdist._schedulers.job_watch import (
    OF_FAILURES,
    Following,
    exit_verdict,
    final_verdict,
    give_up,
)
from hpcdist._schedulers.login_host import host_of
from hpcdist._schedulers.plan import PLACEHOLDER, BatchPlan, Via, plan_of
from hpcdist._schedulers.render import render
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._schedulers.submission import submit
from hpcdist._schedulers.verdict import JobState, Verdict


@dataclass(frozen=True)
class Submission:
    """A program that has been submitted."""

    job: JobId
    folder: str
    name: str


@public_in("managers")
class BatchManager(JobManager):
    """Workers in jobs of a batch scheduler. Keywords of `addprocs` are the scheduler's options.

    Args:
        scheduler: Whose jobs.
        n: How many workers, in one job unless `split` says otherwise.
        via: The login host, as "[user@]host[:port]", where this process is not on one.
        ssh: The program that leads there, with what always follows it.

    Example:
        >>> from hpcdist import SlurmManager
        >>> from hpcdist.managers import BatchManager
        >>> isinstance(SlurmManager(8), BatchManager)
        True
    """

    can_renew = True
    can_adapt = True

    def __init__(
        self,
        scheduler: Scheduler,
        n: int,
        *,
        via: str | None = None,
        ssh: str | Sequence[str] = "ssh",
    ) -> None:
        if not isinstance(scheduler, Scheduler) or not scheduler.name:
            raise TypeError(f"the scheduler is a Scheduler that has a name, not {scheduler!r}")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"the number of workers is an int of 1 or more, not {n!r}")
        self.scheduler = scheduler
        self.n = n
        self.via = None if via is None else Via(parse(via), words(ssh))
        self.elsewhere = self.via is not None
        self._followed: weakref.WeakKeyDictionary[Any, Following] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        via = "" if self.via is None else f", via={str(self.via.machine)!r}"
        if type(self) is BatchManager:
            return f"BatchManager({type(self.scheduler).__name__}(), {self.n}{via})"
        return f"{type(self).__name__}({self.n}{via})"

    # Before anything is made

    def default_addprocs_params(self) -> dict[str, Any]:
        """Return what `addprocs` uses where its caller says nothing: files of settings count."""
        return default_addprocs_params() | options.common(self.scheduler.name)

    def settings_of(self, params: Mapping[str, object]) -> Settings:
        """Return the settings of a launch with these parameters."""
        return Settings.of(self.default_addprocs_params(), params)

    def plan(self, settings: Settings) -> BatchPlan:
        """Read and check all options; nothing is made and nothing is asked.

        Raises:
            TypeError, ValueError: As the public API says.
        """
        return plan.make(self.scheduler, self.n, settings, repr(self), self.via)

    def prepare(self, settings: Settings) -> BatchPlan:
        """Check all options, and the template, before anything is made."""
        made = self.plan(settings)
        made.check_template()
        return made

    def make_folder(self, plan: Plan) -> str:
        """Make the folder of one world."""
        assert isinstance(plan, BatchPlan)
        return job.run_folder(None if plan.via else plan.asked.own.job_dir, job.new_name())

    # Scripts

    def job_script(self, **params: object) -> str:
        """Return the script that `addprocs` with these parameters would submit.

        Nothing is started and nothing is made. The name of the run's folder is made up.

        Example:
            >>> import hpcdist
            >>> script = hpcdist.SlurmManager(2).job_script(partition="debug", mpi="pmi2")
            >>> "#SBATCH --partition=debug" in script
            True
        """
        made = self.plan(self.settings_of(params))
        host = host_of(here.node, made)
        with host.commands():
            return render(host.reach(made).example())

    def program_script(
        self,
        command: Sequence[str],
        /,
        *,
        called: str | None = None,
        resubmit: int = 0,
        **params: object,
    ) -> str:
        """Return the script that `submit_program` would submit."""
        plan = self.program_plan(params)
        name = PLACEHOLDER if called is None else job.free_name(called)
        return render(plan.driver(name, command, again=resubmit > 0))

    def submit_program(
        self,
        command: Sequence[str],
        /,
        *,
        called: str | None = None,
        resubmit: int = 0,
        **params: object,
    ) -> Submission:
        """Submit a Python program that runs on all `n` ranks: rank 0 is the driver.

        Args:
            command: The program's file and its arguments.
            called: The run's name; None: a new one.
            resubmit: How often it is submitted again, after TIMEOUT or PREEMPTED.
            params: As for `addprocs`.

        Raises:
            FileExistsError: There is a run of this name.
            SubmitError: In the scheduler's words.
        """
        plan = self.program_plan(params)
        name = job.new_name() if called is None else job.free_name(called)
        spec = plan.driver(name, command, again=resubmit > 0)
        facts: dict[str, object] = {"kind": "program", "what": shlex.join(command)}
        if not resubmit:
            return self.submit_run(plan, spec, facts)
        facts["resubmit"] = resubmit
        return self.submit_run(plan, spec, facts, lambda folder: keep_spec(folder, spec))

    def submit_run(
        self,
        plan: BatchPlan,
        spec: JobSpec,
        facts: Mapping[str, object],
        fill: Callable[[str], None] = lambda folder: None,
    ) -> Submission:
        """Submit a job, or a job array, of programs, with a folder that tells of it.

        Args:
            facts: What the manifest tells beside what is known of every run.
            fill: Puts into the folder what the job needs.

        Raises:
            FileExistsError: There is a run of this name.
            SubmitError: In the scheduler's words.
        """
        text = render(spec)
        folder = job.run_folder(plan.asked.own.job_dir, spec.name)
        try:
            fill(folder)
            script = write_script(folder, text)
            told: dict[str, Any] = {"name": spec.name, "scheduler": self.scheduler.name}
            told |= {"n": spec.size * max(1, spec.tasks), "jobs": [], **facts}
            job.write_manifest(folder, told)
            made = submit(self.scheduler, spec, script, os.path.join(folder, "commands.jsonl"))
        except BaseException:
            job.forget(folder)
            raise
        tasks = [self.scheduler.task(made, k) for k in range(spec.tasks)] or [made]
        logs = self.scheduler.log_files(plan.asked, plan.settings.dir, folder, made)
        jobs = [[one, one.cluster] for one in tasks]
        job.write_manifest(folder, told | {"jobs": jobs, "logs": logs})
        return Submission(made, folder, spec.name)

    def program_plan(self, params: Mapping[str, object]) -> BatchPlan:
        """Read and check the options of a program, which is one job."""
        if self.via is not None:
            raise ValueError(f"{self!r} is for workers: a program is submitted on the login host")
        made = self.plan(self.settings_of(params))
        if made.asked.own.split is not None:
            raise ValueError("split= is for workers: a program is one job")
        if made.asked.own.linger is not None:
            raise ValueError("linger= is for workers: a program has its driver in its job")
        return made

    # A launch

    def start(self, launch: LaunchView) -> None:
        """Submit the jobs of a launch, in the background, and watch over them until they are up."""
        following = Following(launch, plan_of(launch))
        self._followed[launch] = following
        following.begin()

    def start_world(self, launch: LaunchView, world: WorldView) -> None:
        """Submit the job of one world, which replaces what the launch has lost or is to lose."""
        self._followed[launch].submit_one(world)

    def cancel_jobs(self, launch: LaunchView) -> None:
        """End what may be left of the jobs of a launch's closed worlds. May take a while.

        One that is being submitted gets its number first.
        """
        following = self._followed.get(launch)
        if following is not None:
            following.cancel()

    def forget_folder(self, world: WorldView) -> None:
        """Remove the folder of a world that has ended, unless it is to be kept."""
        if plan_of(world.launch).asked.own.keep:
            return
        following = self._followed.get(world.launch)
        folders = [world.folder] if following is None else following.forget(world)
        if following is not None:
            following.host.forget(folders)
        for folder in folders:
            job.forget(folder)

    def log_of(self, world: WorldView, n: int) -> list[str]:
        """Return the last lines of what the job of a world has written."""
        following = self._followed.get(world.launch)
        return following.tail(world, n) if following is not None else []

    def note(self, launch: LaunchView) -> str:
        """Say in one line how far a launch is."""
        following = self._followed.get(launch)
        return following.note() if following is not None else "nothing submitted yet"

    def end_of(self, world: WorldView) -> str | None:
        """Ask what became of the job of a world whose keeper is lost. This may take seconds.

        A job that goes on is cancelled: on a first node without power nobody ends it, and the other
        nodes would be kept, with --no-kill, until its time is up.

        Returns:
            The scheduler's verdict; None where it tells nothing: a keeper that loses process 1 ends
            its script in good order.
        """
        following = self._followed.get(world.launch)
        if world.job is None or following is None:
            return None
        with following.host.commands():
            return self._ask_for_end(world)

    def _ask_for_end(self, world: WorldView) -> str | None:
        found = final_verdict(self.scheduler, world, questions=OF_FAILURES)
        if found is not None and found.state.terminal:
            if found.state is JobState.DONE:
                return None
            world.verdict = found  # the launch's history shows it
            return found.describe()
        return give_up(self.scheduler, world)

    # Jobs by their ids

    def state_of(self, job: JobId, folder: str | None = None) -> Verdict | None:
        """Return what the scheduler knows of a job; None: nothing.

        Args:
            folder: Its run's folder, which knows how the script ended.
        """
        found = self.scheduler.poll([job]).get(job)
        if found is None or found.state.terminal:
            found = verdict.merge(found, self.scheduler.post_mortem([job]).get(job))
        if folder is not None and (found is None or found.state is JobState.UNKNOWN):
            found = verdict.merge(found, exit_verdict(folder))
        return found
