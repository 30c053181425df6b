"""What all batch managers share: from keywords to scripts and jobs.

A scheduler's module adds its tables, its commands and its parsers: see the methods that raise
NotImplementedError here. `following` watches over the jobs of one launch.
"""

from __future__ import annotations

import os
import shlex
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hpcdist import _log
from hpcdist._managers import launching
from hpcdist._managers.base import JobManager, Settings, default_addprocs_params
from hpcdist._managers.batch import job, options, verdict
from hpcdist._managers.batch.commands import CommandFailed, CommandLate, CommandMissing, SubmitError
from hpcdist._managers.batch.following import (
    Following,
    Group,
    exit_verdict,
    final_verdict,
    groups,
)
from hpcdist._managers.batch.job import FOLDER, JobId, JobSpec, write_script
from hpcdist._managers.batch.launchers import WorldLauncher, mpiexec, separate
from hpcdist._managers.batch.options import Asked
from hpcdist._managers.batch.render import render
from hpcdist._managers.batch.verdict import JobState, Verdict

_PLACEHOLDER = "hpcdist-run"  # the run's name in a script that is only shown


class UnknownJob(ValueError):
    """The scheduler does not know a job.

    Attributes:
        jobs: The ids.
    """

    def __init__(self, jobs: Sequence[str]) -> None:
        super().__init__(f"the scheduler knows no job {', '.join(jobs)}")
        self.jobs = tuple(jobs)


@dataclass(frozen=True)
class Submission:
    """A program that has been submitted."""

    job: JobId
    folder: str
    name: str


class BatchManager(JobManager):
    """Workers in jobs of a batch scheduler.

    Args:
        n: How many.
    """

    scheduler: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    template: ClassVar[str] = ""
    aliases: ClassVar[Mapping[str, str]] = {}
    task_variable: ClassVar[str] = ""  # numbers the tasks of a job array; "": no arrays
    longest_array: ClassVar[int] = 1
    # Of managers that other packages bring along: the command by which the command line knows that
    # the scheduler is here, and the options that take no value.
    program: ClassVar[str] = ""
    bare: ClassVar[frozenset[str]] = frozenset()
    # Worlds are started by the MPI's launcher, also where the ranks are to be no MPI world.
    always_mpiexec: ClassVar[bool] = True
    # How it starts something on another host of the job; (): it knows by itself.
    remote: ClassVar[tuple[str, ...]] = ()
    # The script lists the job's hosts: Open MPI's launcher does not find them, MPICH's does.
    lists_hosts: ClassVar[bool] = False

    def __init__(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"the number of workers is an int of 1 or more, not {n!r}")
        self.n = n
        self._followed: weakref.WeakKeyDictionary[Any, Following] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n})"

    # What a scheduler's module provides

    def defaults(
        self, asked: Asked, settings: Settings, size: int, folder: str, *, tasks: int, name: str
    ) -> dict[str, Any]:
        """Return the options that a job of `size` workers has unless its user says otherwise.

        Args:
            tasks: How many tasks the job array has; 0: it is none.
        """
        raise NotImplementedError

    def forced(self, asked: Asked) -> Iterable[str]:
        """Return the options in which the defaults go before what was asked for."""
        return () if asked.own.split is None else ("ntasks",)

    def own_log(self, asked: Asked) -> bool:
        """Whether the script itself writes its output into the folder's log."""
        return False

    def check(self, asked: Asked, settings: Settings) -> None:
        """Refuse, with a ValueError that names both, options that contradict each other."""
        raise NotImplementedError

    def quote(self, value: str) -> str:
        """Write a value as a directive wants it."""
        raise NotImplementedError

    def long(self, name: str) -> tuple[str, str]:
        """Write a long option: what it begins with, and what stands before its value."""
        return options.gnu_style(name)

    def directives(self, asked: Asked) -> tuple[str, ...]:
        """Write the options as they stand in a script."""
        return options.directives(asked, self.quote, long=self.long)

    def per_node(self, asked: Asked) -> int | None:
        """Return how many workers the options put on a node."""
        raise NotImplementedError

    def launcher(
        self,
        n: int,
        asked: Asked,
        isolation: str,
        found: launching.Mpi | None,
        offered: frozenset[str],
        *,
        watched: bool = True,
    ) -> WorldLauncher:
        """Choose how to start a world of `n` ranks in a job; here, by the MPI's own launcher.

        Args:
            found: The MPI that the workers' interpreter loads.
            offered: The MPI flavours of the scheduler's own launcher.
            watched: Whether a keeper reads the launcher's output, which then tells the ranks apart.
        """
        assert found is not None  # see `always_mpiexec`
        remote = () if asked.own.launcher == "mpiexec" else self.remote
        made = mpiexec(n, found, watched=watched, remote=remote)
        if self.lists_hosts and n > 1 and found.family == "openmpi":
            program, *rest = made.argv
            made = replace(made, argv=(program, "--hostfile", f"{FOLDER}/hosts", *rest))
        return separate(made) if isolation == "process" else made

    def flavours(self) -> frozenset[str]:
        """Ask for the MPI flavours of the scheduler's own launcher; what is usual where it cannot
        be asked."""
        return frozenset()

    def hand_in(self, script: str, asked: Asked, log: str | None) -> JobId:
        """Submit a script, once.

        Raises:
            SubmitError: It was refused, in these words.
            CommandLate, ValueError: It may have been taken or not; what was printed is in there.
        """
        raise NotImplementedError

    def find(self, script: str, asked: Asked, log: str | None) -> JobId | None:
        """Look for the job of a script whose submission gave no answer."""
        raise NotImplementedError

    def task(self, array: JobId, index: int) -> JobId:
        """Return the id of a task of a job array."""
        raise NotImplementedError

    def poll(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask for the states of jobs, all at once. A job that is not listed is missing.

        Raises:
            CommandFailed, CommandLate: There was no answer, which says nothing about the jobs.
        """
        raise NotImplementedError

    def post_mortem(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask those who remember jobs that have ended. Never raises for want of an answer."""
        raise NotImplementedError

    def cancel(self, jobs: Sequence[JobId], log: str | None = None) -> None:
        """Cancel jobs; those that have ended already are none of its business."""
        raise NotImplementedError

    def hopeless(self, verdict: Verdict) -> bool:
        """Tell whether a job waits for what can never come."""
        raise NotImplementedError

    def log_files(self, asked: Asked, cwd: str, folder: str, job: JobId | None) -> list[str]:
        """Return where the job's output goes, as far as that can be told."""
        raise NotImplementedError

    # Before anything is made

    def default_addprocs_params(self) -> dict[str, Any]:
        """Return what `addprocs` uses where its caller says nothing: files of settings count."""
        return default_addprocs_params() | options.common(self.scheduler)

    def asked(self, settings: Settings) -> Asked:
        """Read and check the options of a launch; nothing is made and nothing is asked.

        Raises:
            TypeError, ValueError: As the public API says.
        """
        asked = options.read(settings.extra, self.scheduler, aliases=self.aliases)
        self.check(asked, settings)
        self._sizes(asked)
        self.directives(asked)  # refuses what no line can hold
        return asked

    def prepare(self, settings: Settings) -> None:
        """Check all options, and the template, before anything is made."""
        asked = self.asked(settings)
        render(self._spec(settings, asked, _PLACEHOLDER, FOLDER, self._sizes(asked)[0], 0, (), ()))

    def sizes(self, settings: Settings) -> list[int]:
        """Return how many workers each job has."""
        return self._sizes(self.asked(settings))

    def _sizes(self, asked: Asked) -> list[int]:
        split = asked.own.split
        if split is None:
            return [self.n]
        each = self.per_node(asked) if split == "node" else int(split)
        if each is None:
            raise ValueError(
                "split='node' needs to know how many workers a node has: give ntasks_per_node="
            )
        full, rest = divmod(self.n, each)
        return [each] * full + ([rest] if rest else [])

    def interface(self, settings: Settings) -> str | None:
        """Return by which interface of this host the jobs are to reach it; None: by any."""
        return self.asked(settings).own.interface

    def make_folder(self, settings: Settings) -> str:
        """Make the folder of one world."""
        return job.run_folder(self.asked(settings).own.job_dir, job.new_name())

    # Scripts

    def job_script(self, **params: Any) -> str:
        """Return the script that `addprocs` with these parameters would submit.

        Nothing is started and nothing is made. The name of the run's folder is made up.

        Example:
            >>> import hpcdist
            >>> script = hpcdist.SlurmManager(2).job_script(partition="debug", mpi="pmi2")
            >>> "#SBATCH --partition=debug" in script
            True
        """
        settings = self.settings_of(params)
        asked = self.asked(settings)
        first = groups(self._sizes(asked), self.longest_array)[0]
        folder = os.path.join(asked.own.job_dir or job.jobs_folder(), _PLACEHOLDER)
        launcher = self.choose_launcher(first.size, asked, settings)
        return render(self.workers_spec(settings, asked, launcher, _PLACEHOLDER, folder, first))

    def program_script(self, command: Sequence[str], **params: Any) -> str:
        """Return the script that `submit_program` would submit."""
        settings = self.settings_of(params)
        asked = self._program_asked(settings)
        folder = os.path.join(asked.own.job_dir or job.jobs_folder(), _PLACEHOLDER)
        return render(self._program_spec(settings, asked, _PLACEHOLDER, folder, command))

    def submit_program(self, command: Sequence[str], **params: Any) -> Submission:
        """Submit a Python program that runs on all `n` ranks: rank 0 is the driver.

        Args:
            command: The program's file and its arguments.
            params: As for `addprocs`.

        Raises:
            SubmitError: In the scheduler's words.
        """
        settings = self.settings_of(params)
        asked = self._program_asked(settings)
        name = job.new_name()
        draft = os.path.join(asked.own.job_dir or job.jobs_folder(), name)
        text = render(self._program_spec(settings, asked, name, draft, command))
        folder = job.run_folder(asked.own.job_dir, name)
        script = write_script(folder, text)
        facts: dict[str, Any] = {"name": name, "scheduler": self.scheduler, "n": self.n}
        facts |= {"what": shlex.join(command), "kind": "program", "jobs": []}
        job.write_manifest(folder, facts)
        try:
            made = self.submit(script, asked, os.path.join(folder, "commands.jsonl"))
        except BaseException:
            job.forget(folder)
            raise
        logs = self.log_files(asked, settings.dir, folder, made)
        job.write_manifest(folder, facts | {"jobs": [[made, made.cluster]], "logs": logs})
        return Submission(made, folder, name)

    def _program_asked(self, settings: Settings) -> Asked:
        asked = self.asked(settings)
        if asked.own.split is not None:
            raise ValueError("split= is for workers: a program is one job")
        return asked

    def _program_spec(
        self, settings: Settings, asked: Asked, name: str, folder: str, command: Sequence[str]
    ) -> JobSpec:
        launcher = self.choose_launcher(self.n, asked, settings, watched=False)
        argv = (*launcher.argv, *_interpreter(settings), *command)
        env = {**launcher.env, **settings.env}
        spec = self._spec(settings, asked, name, folder, self.n, 0, argv, env.items())
        return replace(spec, remote=launcher.remote)

    def workers_spec(
        self,
        settings: Settings,
        asked: Asked,
        launcher: WorldLauncher,
        name: str,
        folder: str,
        group: Group,
    ) -> JobSpec:
        """Return the job whose keeper starts a world, or an array of such jobs."""
        python = _interpreter(settings)
        join = f"{FOLDER}/join"
        # -P: the current directory is the user's, and may hold a `socket.py`.
        keeper = (*python, "-P", "-m", "hpcdist", "keeper", "--join", join, "--")
        worker = (*launcher.argv, *python, "-m", "hpcdist", "worker", "--join", join)
        env = {**launcher.env, **settings.variables}
        argv = (*keeper, *worker)
        size, tasks = group.size, group.tasks
        spec = self._spec(settings, asked, name, folder, size, tasks, argv, env.items())
        return replace(spec, remote=launcher.remote)

    def _spec(
        self,
        settings: Settings,
        asked: Asked,
        name: str,
        folder: str,
        size: int,
        tasks: int,
        command: tuple[str, ...],
        env: Iterable[tuple[str, str]],
    ) -> JobSpec:
        defaults = self.defaults(asked, settings, size, folder, tasks=tasks, name=name)
        complete = asked.over(defaults, forced=self.forced(asked))
        return JobSpec(
            name=name,
            prefix=self.prefix,
            directives=self.directives(complete),
            folder=folder,
            cwd=settings.dir,
            command=command,
            template=asked.own.template or self.template,
            task=self.task_variable if tasks else "",
            env=tuple(env),
            path=_package_path(),
            modules=asked.own.modules,
            setup=asked.own.setup,
            own_log=self.own_log(asked),
            # Sites define `module` in what a login shell reads.
            shell="/bin/bash -l" if asked.own.modules else "/bin/bash",
        )

    def choose_launcher(
        self, n: int, asked: Asked, settings: Settings, *, watched: bool = True
    ) -> WorldLauncher:
        """Choose how to start a world, asking for the MPI in use only where it matters."""
        own = asked.own
        blind = not self.always_mpiexec and (
            settings.isolation == "process" or (own.mpi is not None and own.launcher != "mpiexec")
        )
        found = None if blind else launching.find_mpi(settings.python)
        offered = frozenset[str]() if blind else self.flavours()
        return self.launcher(n, asked, settings.isolation, found, offered, watched=watched)

    def settings_of(self, params: Mapping[str, Any]) -> Settings:
        """Return the settings of a launch with these parameters."""
        return Settings.of(self.default_addprocs_params(), params)

    def submit(self, script: str, asked: Asked, log: str | None) -> JobId:
        """Submit a script; where the answer gets lost, look for the job before giving up.

        Raises:
            SubmitError: In the scheduler's words.
        """
        try:
            return self.hand_in(script, asked, log)
        except (CommandLate, ValueError) as exc:
            try:
                found = self.find(script, asked, log)
            except (CommandFailed, CommandLate, CommandMissing) as then:
                raise SubmitError(f"{exc}; and then: {then}") from exc
            if found is None:
                raise SubmitError(f"{exc}; no job of {script} is listed") from exc
            return found
        except CommandMissing as exc:
            raise SubmitError(str(exc)) from exc

    # A launch

    def start(self, launch: Any) -> None:
        """Submit the jobs of a launch, in the background, and watch over them until they are up."""
        following = Following(self, launch, self.asked(launch.settings))
        self._followed[launch] = following
        following.begin()

    def cancel_jobs(self, launch: Any) -> None:
        """End what may be left of the jobs of a launch's closed worlds. May take a while.

        One that is being submitted gets its number first.
        """
        following = self._followed.get(launch)
        if following is not None:
            following.cancel()

    def forget_folder(self, world: Any) -> None:
        """Remove the folder of a world that has ended, unless it is to be kept."""
        if self.asked(world.launch.settings).own.keep:
            return
        following = self._followed.get(world.launch)
        for folder in [world.folder] if following is None else following.forget(world):
            job.forget(folder)

    def note(self, launch: Any) -> str:
        """Say in one line how far a launch is."""
        following = self._followed.get(launch)
        return following.note() if following is not None else "nothing submitted yet"

    def end_of(self, world: Any) -> str | None:
        """Ask what became of the job of a world whose keeper is lost. This may take seconds.

        A job that goes on is cancelled: on a first node without power nobody ends it, and the other
        nodes would be kept, with --no-kill, until its time is up.

        Returns:
            The scheduler's verdict; None where it tells nothing: a keeper that loses process 1 ends
            its script in good order.
        """
        if world.job is None:
            return None
        found = final_verdict(self, world)
        if found is not None and found.state.terminal:
            return None if found.state is JobState.DONE else found.tell()
        try:
            self.cancel([world.job])
        except (RuntimeError, OSError) as exc:
            _log.log("warning", f"job {world.job} could not be cancelled: {exc}")
            return "nobody tells how"
        return "its first node does not answer, so it was cancelled"

    # Jobs by their ids

    def state_of(self, job: JobId, folder: str | None = None) -> Verdict | None:
        """Return what is known of a job; None: nobody knows it.

        Args:
            folder: Its run's folder, which knows how the script ended.
        """
        found = self.poll([job]).get(job)
        if found is None or found.state.terminal:
            found = verdict.merge(found, self.post_mortem([job]).get(job))
        if folder is not None and (found is None or found.state is JobState.UNKNOWN):
            found = verdict.merge(found, exit_verdict(folder))
        return found

    def cancel_known(self, jobs: Sequence[JobId]) -> dict[JobId, Verdict]:
        """Cancel jobs by their ids; return what was known of each before.

        Raises:
            UnknownJob: Some are unknown to the scheduler; then none is cancelled.
        """
        known = {job: found for job in jobs if (found := self.state_of(job)) is not None}
        unknown = [job for job in jobs if job not in known]
        if unknown:
            raise UnknownJob(unknown)
        living = [job for job, found in known.items() if not found.state.terminal]
        if living:
            self.cancel(living)
        return known


def _interpreter(settings: Settings) -> tuple[str, ...]:
    python = settings.python
    return (os.path.abspath(python) if os.sep in python else python, *settings.exeflags)


def _package_path() -> tuple[str, ...]:
    """Return what a job needs on its path to find this very hpcdist; nothing if it is installed."""
    here = os.path.abspath(__file__)
    for _ in range(4):
        here = os.path.dirname(here)
    return () if os.path.basename(here) in ("site-packages", "dist-packages") else (here,)
