"""`JobExecutor`: functions as jobs, with no driver that has to stay."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from hpcdist._hints import suggesting
from hpcdist._jobs import envelopes
from hpcdist._jobs.envelopes import CALL, FUNCTION, OPTIONS, PATH
from hpcdist._jobs.job_futures import JobFuture
from hpcdist._jobs.recipes import recipe
from hpcdist._public import public
from hpcdist._schedulers import job
from hpcdist._schedulers.batch_manager import BatchManager
from hpcdist._schedulers.job import FOLDER, JobSpec
from hpcdist._schedulers.plan import BatchPlan

P = ParamSpec("P")
T = TypeVar("T")


@public
class JobExecutor:
    """Runs functions as jobs of a scheduler.

    In the job the function runs on rank 0 of a world of the manager's `n` ranks. The others are its
    workers, so it may call `pmap` or `spmd`. The program that has submitted it need not stay.

    Args:
        manager: Of which scheduler, and how many ranks each job has.
        name: Of the jobs: the first is called so, the next `name-2`. By default each has the
            function's name and a number of its own.
        retries: How often a job is submitted again after TIMEOUT, PREEMPTED or NODE_FAIL, by the
            program that waits for it, or looks at it next.
        options: Those of the scheduler, as for `addprocs`.

    Raises:
        ValueError, TypeError: As `addprocs` does.

    Example:
        >>> import hpcdist
        >>> executor = hpcdist.JobExecutor(hpcdist.SlurmManager(8), partition="debug", t="5:00")
        >>> executor
        JobExecutor(SlurmManager(8), partition='debug', t='5:00')
    """

    def __init__(
        self,
        manager: BatchManager,
        /,
        *,
        name: str | None = None,
        retries: int = 0,
        **options: object,
    ) -> None:
        if not isinstance(manager, BatchManager):
            raise TypeError(f"a SlurmManager or the like is needed for jobs, not {manager!r}")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries is a number of 0 or more, not {retries!r}")
        if name is not None and (not isinstance(name, str) or not job.NAME.fullmatch(name)):
            raise ValueError(f"the name of a job has letters, digits, - and _, not {name!r}")
        manager.program_plan(options)
        self._manager = manager
        self._name = name
        self._retries = retries
        self._options = options
        self._count = 0

    def __repr__(self) -> str:
        given = {"name": self._name, "retries": self._retries or None}
        shown = {name: value for name, value in given.items() if value is not None}
        words = [f"{name}={value!r}" for name, value in {**shown, **self._options}.items()]
        return f"JobExecutor({', '.join([repr(self._manager), *words])})"

    def __enter__(self) -> JobExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the jobs to themselves."""

    def submit(self, f: Callable[P, T], /, *args: P.args, **kw: P.kwargs) -> JobFuture[T]:
        """Submit a call of a function as a job.

        Raises:
            FileExistsError: There is a job of this name.
            SubmitError: The scheduler has refused it, in these words.
        """
        plan = self._manager.program_plan(self._options)
        name = self._new_name(f)
        spec = self._spec(plan, name)

        def fill(folder: str) -> None:
            self._write_function(folder, f, plan)
            envelopes.write(folder, CALL, (args, kw))

        self._submit(plan, spec, f, fill)
        return JobFuture(name, plan.folder(name))

    @suggesting
    def map(
        self,
        f: Callable[..., T],
        /,
        *collections: Iterable[Any],
        max_running: int | None = None,
    ) -> list[JobFuture[T]]:
        """Submit a call of a function for each item, as one job array where there are such.

        Args:
            f: The function.
            collections: Its arguments, as for `map`: with several, the shortest ends it.
            max_running: How many of the jobs may run at once.

        Raises:
            ValueError: `max_running` is asked of a scheduler without job arrays.
        """
        if not collections:
            raise TypeError("a map needs at least one collection")
        if max_running is not None and max_running < 1:
            raise ValueError(f"max_running is 1 or more, not {max_running}")
        items = [*zip(*collections, strict=False)]
        scheduler = self._manager.scheduler
        longest = scheduler.array_limit()
        if max_running is not None and len(items) > longest:
            raise ValueError(
                f"max_running holds within one job array, which has {longest} jobs at most with "
                f"{scheduler.name}, and these are {len(items)} items"
            )
        if longest == 1:
            return [self.submit(f, *item) for item in items]
        parts = [items[k : k + longest] for k in range(0, len(items), longest)]
        return [
            future
            for part in parts
            for future in (
                self._map_part(f, part, max_running)
                if len(part) >= scheduler.shortest_array
                else [self.submit(f, *item) for item in part]
            )
        ]

    def _map_part(
        self, f: Callable[..., T], items: list[tuple[Any, ...]], max_running: int | None
    ) -> list[JobFuture[T]]:
        plan = self._manager.program_plan(self._options)
        name = self._new_name(f)
        spec = self._spec(plan, name, len(items), max_running)

        def fill(folder: str) -> None:
            self._write_function(folder, f, plan)
            os.mkdir(os.path.join(folder, "tasks"), 0o700)
            for k, item in enumerate(items):
                os.mkdir(own := os.path.join(folder, "tasks", str(k)), 0o700)
                envelopes.write(own, CALL, (item, {}))

        self._submit(plan, spec, f, fill)
        folder = plan.folder(name)
        return [JobFuture(f"{name}.{k}", folder, k) for k in range(len(items))]

    def _new_name(self, f: object) -> str:
        self._count += 1
        if self._name is None:
            called = re.sub(r"\W+", "", getattr(f, "__name__", "") or type(f).__name__, flags=re.A)
            return job.new_name().replace("hpcdist", called or "job")
        name = self._name if self._count == 1 else f"{self._name}-{self._count}"
        if os.path.lexists(os.path.join(job.jobs_folder(), name)):
            self._count -= 1
            raise FileExistsError(
                f"there is a job called {name!r}: take another name, or forget it: "
                f"hpcdist.job({name!r}).forget()"
            )
        return name

    def _spec(
        self, plan: BatchPlan, name: str, tasks: int = 0, max_running: int | None = None
    ) -> JobSpec:
        folder = plan.folder(name)
        command = self._command(folder)
        return plan.program(name, folder, command, tasks=tasks, max_running=max_running)

    def _command(self, folder: str) -> list[str]:
        return ["-m", "hpcdist._jobs.run_call", FOLDER, os.path.join(folder, FUNCTION)]

    def _write_function(self, folder: str, f: object, plan: BatchPlan) -> None:
        path = [os.path.abspath(part) for part in sys.path if isinstance(part, str)]
        envelopes.write(folder, FUNCTION, f)
        envelopes.write(folder, PATH, path)
        envelopes.write(folder, OPTIONS, {**self._options, "dir": plan.settings.dir})

    def _submit(
        self, plan: BatchPlan, spec: JobSpec, f: object, fill: Callable[[str], None]
    ) -> None:
        facts: dict[str, object] = {
            "kind": "call",
            "what": f"{spec.name}: {getattr(f, '__name__', None) or type(f).__name__}()",
            **recipe(self._manager),
            "tasks": spec.tasks,
            "retries": self._retries,
            "command": self._command(spec.folder),
        }
        self._manager.submit_run(plan, spec, facts, fill)
