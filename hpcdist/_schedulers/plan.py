"""A launch in jobs as it was planned: its options, read and checked once, and what follows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hpcdist._contract.adapting import Adapt
from hpcdist._contract.kept_managers import LaunchView, Plan
from hpcdist._contract.managers import Settings
from hpcdist._keeper import installed_mpi
from hpcdist._keeper.installed_mpi import Mpi
from hpcdist._keeper.keeper_link import checkout
from hpcdist._managers.ssh_machines import Machine
from hpcdist._schedulers import job
from hpcdist._schedulers.job import FOLDER, JobSpec
from hpcdist._schedulers.launchers import WorldLauncher, telling
from hpcdist._schedulers.options import Asked, contradiction
from hpcdist._schedulers.render import render
from hpcdist._schedulers.scheduler import Scheduler
from hpcdist._worker import gpus

PLACEHOLDER = "hpcdist-run"  # the run's name in a script that is only shown
_LOOPBACK = "lo"  # there a port of the login host leads to; nobody else need reach this one


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


@dataclass(frozen=True)
class Via:
    """The login host on which jobs are submitted, and the `ssh` that leads there."""

    machine: Machine
    ssh: tuple[str, ...] = ("ssh",)


@dataclass(frozen=True)
class There:
    """What that host has.

    Attributes:
        host: Its name.
        jobs: The folder that knows of all runs of its user.
        package: Where hpcdist lies; None: where its interpreter finds it.
        mpi: What the workers' interpreter loads there; None: nothing it could use.
        no_mpi: Why.
    """

    host: str
    jobs: str
    package: str | None
    mpi: Mpi | None
    no_mpi: str = ""


@dataclass(frozen=True, kw_only=True)
class BatchPlan(Plan):
    """The plan of a launch in jobs.

    Attributes:
        scheduler: Whose jobs they will be.
        n: How many workers there are to be, or ranks of a program.
        asked: The options, ours and the scheduler's.
        via: Where they are submitted; None: here.
        there: What is known of that host, once it has been reached.
    """

    scheduler: Scheduler
    n: int
    asked: Asked
    via: Via | None = None
    there: There | None = None

    @property
    def groups(self) -> list[Group]:
        """The jobs and job arrays, in the order of their worlds."""
        sizes = [size for size in self.sizes if size is not None]
        return groups(sizes, self.scheduler.array_limit() if len(sizes) > 1 else 1)

    def folder(self, name: str = PLACEHOLDER) -> str:
        """Return where the folder of a run lies, or would."""
        usual = job.jobs_folder() if self.there is None else self.there.jobs
        return os.path.join(self.asked.own.job_dir or usual, name)

    def launcher(self, n: int, *, watched: bool = True) -> WorldLauncher:
        """Choose how to start a world, asking for the MPI in use only where it matters.

        Args:
            watched: Whether a keeper reads the launcher's output.
        """
        own, isolation = self.asked.own, self.settings.isolation
        blind = not self.scheduler.always_mpiexec and (
            isolation == "process" or (own.mpi is not None and own.launcher != "mpiexec")
        )
        found = None if blind else self._mpi()
        made = self.scheduler.launcher(n, self.asked, isolation, found, watched=watched)
        return telling(made) if watched else made

    def _mpi(self) -> Mpi:
        if self.there is None:
            return installed_mpi.find_mpi(self.settings.python)
        if self.there.mpi is None:
            raise RuntimeError(f"on {self.there.host}: {self.there.no_mpi}")
        return self.there.mpi

    def program(
        self,
        name: str,
        folder: str,
        command: Sequence[str],
        *,
        tasks: int = 0,
        max_running: int | None = None,
    ) -> JobSpec:
        """Return the job in which a program runs on all ranks, or an array of such jobs.

        Args:
            tasks: How many the array has; 0: it is none.
            max_running: How many of them may run at once.
        """
        launcher = self.launcher(self.n, watched=False)
        argv = (*launcher.argv, *interpreter(self.settings), *command)
        env = {**launcher.env, "HPCDIST_RUN": FOLDER, **self.settings.env}
        group = Group(self.n, tasks, ())
        spec = self._spec(name, folder, argv, env, group, max_running)
        return replace(spec, remote=launcher.remote)

    def workers(self, launcher: WorldLauncher, name: str, folder: str, group: Group) -> JobSpec:
        """Return the job whose keeper starts a world, or an array of such jobs."""
        python = interpreter(self.settings)
        keeping = interpreter(self.settings, self.settings.keeper)
        join = f"{FOLDER}/join"
        # -P: the current directory is the user's, and may hold a `socket.py`.
        keeper = (*keeping, "-P", "-m", "hpcdist", "keeper", "--join", join, "--")
        worker = (*launcher.argv, *python, "-m", "hpcdist", "worker", "--join", join)
        env = {**launcher.env, **self.settings.variables}
        spec = self._spec(name, folder, (*keeper, *worker), env, group)
        return replace(spec, remote=launcher.remote)

    def example(self) -> JobSpec:
        """Return the first job, under a made-up name; nothing is made."""
        first = next(iter(self.groups), Group(self.n, 0, ()))  # adapt=(0, hi) begins with none
        return self.workers(self.launcher(first.size), PLACEHOLDER, self.folder(), first)

    def driver(self, name: str, command: Sequence[str], *, again: bool) -> JobSpec:
        """Return the job of a program that is rank 0; nothing is made.

        Args:
            again: Whether its script submits it again when its time is up.
        """
        spec = self.program(name, self.folder(name), command)
        if not again:
            return spec
        python = interpreter(self.settings, self.settings.keeper)
        return replace(spec, again=(*python, "-P", "-m", "hpcdist", "again", FOLDER))

    def check_template(self) -> None:
        """Render a script without its command, only to see that it can be."""
        render(self._spec(PLACEHOLDER, FOLDER, (), {}))

    def _spec(
        self,
        name: str,
        folder: str,
        command: tuple[str, ...],
        env: Mapping[str, str],
        group: Group | None = None,
        max_running: int | None = None,
    ) -> JobSpec:
        scheduler, own = self.scheduler, self.asked.own
        tasks = 0 if group is None else group.tasks
        here = checkout() if self.there is None else self.there.package
        draft = JobSpec(
            name=name,
            prefix=scheduler.prefix,
            directives=(),
            folder=folder,
            cwd=self.settings.dir,
            command=command,
            template=own.template or scheduler.template,
            template_folders=scheduler.template_folders(),
            options=self.asked,
            size=self.n if group is None else group.size,
            tasks=tasks,
            walltime=None if self.walltime is None else int(self.walltime),
            max_running=max_running,
            task=scheduler.task_variable if tasks else "",
            first_task=scheduler.first_task,
            env=(*env.items(), *_left(scheduler), *([(gpus.ASKED, "auto")] if own.gpus else [])),
            path=() if here is None else (here,),
            modules=own.modules,
            setup=own.setup,
            own_log=scheduler.own_log(self.asked),
            # Sites define `module` in what a login shell reads.
            shell="/bin/bash -l" if own.modules else "/bin/bash",
        )
        defaults = scheduler.defaults(draft, self.settings)
        complete = self.asked.over(defaults, forced=scheduler.forced(self.asked))
        return replace(draft, options=complete, directives=scheduler.directives(complete))


def make(
    scheduler: Scheduler, n: int, settings: Settings, owner: str, via: Via | None = None
) -> BatchPlan:
    """Read and check the options of a launch; nothing is made and nothing is asked.

    Args:
        owner: The manager, as messages name it.
        via: Where jobs are submitted; None: here.

    Raises:
        TypeError, ValueError: As the public API says.
    """
    asked = scheduler.read(settings.extra)
    _check(scheduler, asked, settings, n, owner)
    sizes = _sizes(scheduler, asked, n, settings.adapt)
    _check_least(settings, n)
    scheduler.directives(asked)  # refuses what no line can hold
    interface = asked.own.interface
    walltime = scheduler.walltime(asked)
    if settings.renew and walltime is None:
        raise ValueError(
            "renew=True needs to know for how long a job may run, to submit the next one in time: "
            f"give {scheduler.time_option}="
        )
    linger = asked.own.linger
    if linger is not None and walltime is not None and linger > walltime:
        raise ValueError(
            f"linger={linger:g} is longer than the walltime: the jobs may run for {walltime:g} s"
        )
    if via is not None:
        if linger is not None:
            raise ValueError(f"linger= is for drivers on the login host, not {owner}")
        interface = _LOOPBACK
    elif scheduler.in_allocation(asked):
        linger = None  # the next driver finds the allocation without it
    return BatchPlan(
        settings,
        sizes,
        interface,
        walltime,
        linger,
        n,
        scheduler=scheduler,
        n=n,
        asked=asked,
        via=via,
    )


def plan_of(launch: LaunchView) -> BatchPlan:
    """Return the plan of a launch in jobs."""
    assert isinstance(launch.plan, BatchPlan)
    return launch.plan


def _check(scheduler: Scheduler, asked: Asked, settings: Settings, n: int, owner: str) -> None:
    """Refuse options that contradict what is not theirs to say."""
    if asked.own.mpi is not None and not scheduler.has_flavours:
        advice = f"with {scheduler.name} the MPI's own mpiexec starts ranks"
        raise contradiction(owner, f"mpi={asked.own.mpi!r}", advice)
    if asked.own.srun_args:
        _check_srun(scheduler, asked, owner)
    for name, (ours, advice) in scheduler.impossible.items():
        if asked.value(name) is not None:
            raise contradiction(ours, asked.spelling(name), advice)
    size, where = asked.value(scheduler.size_option), asked.value(scheduler.dir_option)
    if size is not None and str(size) != str(n):
        advice = "the manager's number says how many workers there are"
        raise contradiction(owner, asked.spelling(scheduler.size_option), advice)
    if where is not None and os.path.abspath(str(where)) != settings.dir:
        advice = "dir= says where workers run"
        raise contradiction(f"dir={settings.dir!r}", asked.spelling(scheduler.dir_option), advice)
    scheduler.check(asked, settings, n)


def _check_srun(scheduler: Scheduler, asked: Asked, owner: str) -> None:
    ours = f"srun_args={list(asked.own.srun_args)!r}"
    if "srun" not in scheduler.launchers:
        raise contradiction(owner, ours, f"with {scheduler.name} no srun starts the ranks")
    if asked.own.launcher == "mpiexec":
        raise contradiction("launcher='mpiexec'", ours, "they are arguments of srun")


def _check_least(settings: Settings, n: int) -> None:
    """Refuse to wait for more workers than there may ever be."""
    least, adapt = settings.min_workers, settings.adapt
    if adapt is not None and least is not None and least > adapt.hi * n:
        raise ValueError(
            f"min_workers={least} is more than adapt=({adapt.lo}, {adapt.hi}) allows: at most "
            f"{adapt.hi} jobs of {n}"
        )


def _sizes(scheduler: Scheduler, asked: Asked, n: int, adapt: Adapt | None) -> tuple[int, ...]:
    """Return how many workers each job has that is started at once."""
    split = asked.own.split
    if adapt is not None and split is not None:
        advice = "with adapt= the manager's number is the size of one job"
        raise contradiction(f"adapt=({adapt.lo}, {adapt.hi})", f"split={split!r}", advice)
    if adapt is not None:
        return (n,) * min(adapt.lo, adapt.max_queued)
    if split is None:
        return (n,)
    each = scheduler.per_node(asked) if split == "node" else int(split)
    if each is None:
        option = scheduler.per_node_option
        advice = f"give {option}=" if option else f"with {scheduler.name} give a number"
        raise ValueError(f"split='node' needs to know how many workers a node has: {advice}")
    full, rest = divmod(n, each)
    return (each,) * full + ((rest,) if rest else ())


def _left(scheduler: Scheduler) -> Iterable[tuple[str, str]]:
    """Yield the variable by which a job says what it leaves in the environment."""
    if scheduler.scrubbed:
        yield installed_mpi.LEFT_BY_JOB, " ".join(scheduler.scrubbed)


def interpreter(settings: Settings, command: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the command that is the workers' interpreter, or another, as a script has it."""
    *before, python = command or settings.python
    full = os.path.abspath(python) if os.sep in python and not before else python
    return (*before, full, *settings.exeflags)
