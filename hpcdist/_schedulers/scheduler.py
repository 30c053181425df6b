"""What a batch scheduler is: its words, its options and its commands. The contract for others.

A scheduler knows nothing of launches and workers; `BatchManager` does, and knows schedulers by this
class alone. Whatever has a default here need not be written.
"""

from __future__ import annotations

import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from hpcdist import _config
from hpcdist._contract.managers import Settings
from hpcdist._keeper.installed_mpi import Mpi
from hpcdist._public import public_in
from hpcdist._schedulers import options
from hpcdist._schedulers.commands import CommandFailed, CommandLate, CommandMissing
from hpcdist._schedulers.findings import Finding, Trial
from hpcdist._schedulers.job import FOLDER, JobId, JobSpec
from hpcdist._schedulers.launchers import WorldLauncher, mpiexec, separate
from hpcdist._schedulers.options import Asked
from hpcdist._schedulers.verdict import Verdict


@public_in("managers")
class Scheduler(ABC):
    """A batch scheduler: subclass it, say its words, and write the abstract methods.

    Everywhere `log` is a file that `run(..., log=log)` writes each command and its answer into.

    Example:
        >>> from hpcdist.managers import Scheduler
        >>> sorted(Scheduler.__abstractmethods__)
        ['cancel', 'defaults', 'find', 'hand_in', 'poll']
    """

    # Its name: of its table in the files of settings, for `--scheduler`, in the runs' folders.
    name: ClassVar[str] = ""
    # The command by which the command line knows that it is here.
    program: ClassVar[str] = ""

    # Options. What a directive's line begins with; "": the script has none.
    prefix: ClassVar[str] = ""
    # Short names of options, and the long ones they stand for.
    aliases: ClassVar[Mapping[str, str]] = {}
    # Options that take no value, as they are written on the command line.
    bare: ClassVar[frozenset[str]] = frozenset()
    # The options that say how many workers a job has, how many a node, and where it runs; "": none.
    size_option: ClassVar[str] = "ntasks"
    per_node_option: ClassVar[str] = "ntasks_per_node"
    dir_option: ClassVar[str] = ""
    # Options no launch can live with: what they contradict, and the advice.
    impossible: ClassVar[Mapping[str, tuple[str, str]]] = {}
    # The option that says for how long a job may run.
    time_option: ClassVar[str] = "time"
    # Options that limit a job to a minute, or whatever is the least: for `hpcdist doctor --run`.
    a_minute: ClassVar[Mapping[str, str]] = {}

    # The script. A template by name: looked for beside the class that says it and in `templates`
    # there, after the places where users and sites have theirs.
    template: ClassVar[str] = "base.sh.j2"
    # The variable that numbers the tasks of a job array; "": there are no arrays.
    task_variable: ClassVar[str] = ""
    first_task: ClassVar[int] = 0  # its number
    shortest_array: ClassVar[int] = 1
    longest_array: ClassVar[int] = 1

    # How worlds are started. What `launcher=` may say, beside "auto".
    launchers: ClassVar[tuple[str, ...]] = ("mpiexec",)
    # Whether its own launcher has MPI flavours, which `mpi=` chooses from.
    has_flavours: ClassVar[bool] = False
    # Worlds are started by the MPI's launcher, also where the ranks are to be no MPI world.
    always_mpiexec: ClassVar[bool] = True
    # What starts a command on another host of the job, for the MPI's launcher: `{host}`, and
    # `{command}`, a text for a shell; (): that knows by itself.
    remote: ClassVar[tuple[str, ...]] = ()
    # The script lists the job's hosts: Open MPI's launcher does not find them, MPICH's does.
    lists_hosts: ClassVar[bool] = False
    # What variables begin with that a job leaves to all that runs in it, and that commands and
    # launches in there must not see.
    scrubbed: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        given = cls.__dict__.get("scheduler")
        if isinstance(given, str):  # as the manager of a site's flavour called its name before
            cls.name = given
        _config.learn(*filter(None, [cls.name]))

    # Options

    def read(self, given: Mapping[str, object]) -> Asked:
        """Read the options of a launch: all its parameters but those that every manager takes.

        Raises:
            TypeError, ValueError: They cannot be.
        """
        return options.read(given, self.name, aliases=self.aliases, launchers=self.launchers)

    @abstractmethod
    def defaults(self, job: JobSpec, settings: Settings) -> Mapping[str, Any]:
        """Return the options that a job has unless its user says otherwise.

        Args:
            job: Its `name`, `size`, `tasks` (0: no job array), `folder`, `cwd`, and in `options`
                what was asked for.
            settings: What else was asked of the launch.
        """

    def forced(self, asked: Asked) -> Iterable[str]:
        """Return the options in which the defaults go before what was asked for."""
        return () if asked.own.split is None else (self.size_option,)

    def check(self, asked: Asked, settings: Settings, n: int) -> None:  # noqa: B027
        """Refuse, with a ValueError that names both, options that contradict each other.

        What contradicts `n`, `dir=` or the table `impossible` has been refused already.
        """

    def quote(self, value: str) -> str:
        """Write a value as a directive wants it; here, as a shell does."""
        return shlex.quote(value)

    def long(self, name: str) -> tuple[str, str]:
        """Write a long option: what it begins with, and what stands before its value."""
        return options.gnu_style(name)

    def directives(self, asked: Asked) -> tuple[str, ...]:
        """Write the options as they stand in a script."""
        return options.directives(asked, self.quote, long=self.long)

    def walltime(self, asked: Asked) -> float | None:
        """Return for how many seconds a job may run, if the options say so.

        With `renew=True` the next job is submitted in time, so that option is asked for.
        """
        return None

    def in_allocation(self, asked: Asked) -> bool:
        """Tell whether worlds start at once, in an allocation that this process runs in."""
        return False

    def per_node(self, asked: Asked) -> int | None:
        """Return how many workers the options put on a node; None: they do not say."""
        return asked.number(self.per_node_option)

    # The script

    def own_log(self, asked: Asked) -> bool:
        """Tell whether the script itself writes its output into the folder's log."""
        return False

    def log_files(self, asked: Asked, cwd: str, folder: str, job: JobId | None) -> list[str]:
        """Return where the job's output goes, as far as that is known."""
        return [os.path.join(folder, "log")]

    def template_folders(self) -> tuple[str, ...]:
        """Return where the templates of this class, and of those it extends, are looked for."""
        ours = __name__.partition(".")[0]
        files = [
            getattr(sys.modules.get(cls.__module__), "__file__", None)
            for cls in type(self).__mro__
            if issubclass(cls, Scheduler) and cls.__module__.partition(".")[0] != ours
        ]
        beside = dict.fromkeys(os.path.dirname(os.path.abspath(file)) for file in files if file)
        return tuple(path for home in beside for path in (home, os.path.join(home, "templates")))

    # How worlds are started

    def launcher(
        self,
        n: int,
        asked: Asked,
        isolation: str,
        found: Mpi | None,
        *,
        watched: bool = True,
    ) -> WorldLauncher:
        """Choose how to start a world of `n` ranks in a job; here, by the MPI's own launcher.

        Args:
            isolation: "process": the ranks are to be no MPI world.
            found: The MPI that the workers' interpreter loads; None only without `always_mpiexec`,
                where it makes no difference.
            watched: Whether a keeper reads the launcher's output, which then tells the ranks apart.
        """
        if found is None:
            raise ValueError(
                f"launcher={asked.own.launcher!r}, mpi={asked.own.mpi!r} with isolation="
                f"{isolation!r}: {self.name} starts such a world in its own way"
            )
        remote = () if asked.own.launcher == "mpiexec" else self.remote
        made = mpiexec(n, found, watched=watched, remote=remote)
        if self.lists_hosts and n > 1 and found.family == "openmpi":
            program, *rest = made.argv
            made = replace(made, argv=(program, "--hostfile", f"{FOLDER}/hosts", *rest))
        return separate(made) if isolation == "process" else made

    # Commands

    @abstractmethod
    def hand_in(self, job: JobSpec, script: str, log: str | None) -> JobId:
        """Submit a script, once.

        Args:
            job: What the script was rendered from; its `options` have all that the job asks for.
            script: The script's file, in the folder of the run.

        Raises:
            SubmitError: It was refused, in these words.
            CommandLate, ValueError: It may have been taken or not; what was printed is in there.
        """

    @abstractmethod
    def find(self, job: JobSpec, script: str, log: str | None) -> JobId | None:
        """Look for a job whose submission gave no answer; no other has its script, or its name."""

    def array_limit(self) -> int:
        """Return how many tasks a job array may have here; it may be asked for."""
        return self.longest_array if self.task_variable else 1

    def task(self, array: JobId, index: int) -> JobId:
        """Return the id of a task of a job array, counted from 0 whatever number it has."""
        raise NotImplementedError(f"{self.name} has a task_variable, and no task()")

    @abstractmethod
    def poll(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask for the states of jobs, all at once. A job that is not listed is missing.

        Raises:
            CommandFailed, CommandLate: There was no answer, which says nothing about the jobs.
        """

    def post_mortem(self, jobs: Sequence[JobId], log: str | None = None) -> dict[JobId, Verdict]:
        """Ask the scheduler's records of ended jobs; no answer is no error. Here, poll again."""
        try:
            return self.poll(jobs, log)
        except (CommandFailed, CommandLate, CommandMissing):
            return {}

    @abstractmethod
    def cancel(self, jobs: Sequence[JobId], log: str | None = None) -> None:
        """Cancel jobs; those that have ended already are none of its business.

        Raises:
            CommandFailed, CommandLate, CommandMissing: They may go on.
        """

    def cancel_lost(self, number: JobId) -> None:
        """Cancel a job whose first node does not answer; by force, where the scheduler has it."""
        self.cancel([number])

    def hopeless(self, verdict: Verdict) -> bool:
        """Tell whether a job waits for what can never come."""
        return False

    # The doctor

    def checks(self, trial: Trial) -> Iterable[Callable[[], Iterable[Finding]]]:
        """Return the checks of `hpcdist doctor`, in their order; a bad first one ends them.

        Args:
            trial: The job that would be tried: its script, and what would start its ranks.
        """
        return []
