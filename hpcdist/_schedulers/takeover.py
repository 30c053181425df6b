"""Jobs that linger, and how a launch gets one of them in place of a job of its own.

The job's keeper decides who gets it: see `hpcdist._keeper.lingering`, and docs/design.md.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcdist import _version
from hpcdist._contract.kept_managers import WorldView
from hpcdist._keeper.lingering import STATE, claim_path, read_state, write_private
from hpcdist._keeper.processes import unlink
from hpcdist._numbers import clock
from hpcdist._schedulers import job
from hpcdist._schedulers.job import JobId
from hpcdist._schedulers.launchers import WorldLauncher
from hpcdist._schedulers.plan import BatchPlan

_LOOK_EVERY = 0.02
_PATIENCE = 20.0  # seconds: file servers may take some to show what is new, and doors, too
_GRACE = 2.0  # between the removal of a claim and the keeper's greeting, if it was accepted
_FOLLOWS = ("size", "started by")  # from other options, as a rule
# What may differ: it is the business of the driver, and not of the job.
_DRIVERS_OWN = frozenset({"linger", "keep", "queue_timeout", "job_dir", "profile", "interface"})


@dataclass(frozen=True)
class LingeringJob:
    """A job that waits for a driver.

    Attributes:
        folder: Its run's folder.
        together: The folders of all tasks of its job array, or its own.
        asked: Its options, as `identity` writes them.
        ends: When it ends at the latest, in Unix time, if that is known.
        waits_until: Until when it waits.
    """

    job: JobId
    folder: str
    together: tuple[str, ...]
    asked: Mapping[str, Any]
    ends: float | None
    waits_until: float


def lingering_jobs(scheduler: str) -> list[LingeringJob]:
    """Return the jobs of a scheduler that linger, the one that ends last first."""
    folders = {}
    for path in glob.glob(os.path.join(glob.escape(job.jobs_folder()), "*", STATE)):
        folder = os.path.realpath(os.path.dirname(path))
        state = read_state(folder)
        ended = os.path.exists(os.path.join(folder, "exit"))
        if state is not None and state["until"] > time.time() and not ended:
            folders[folder] = state
    if not folders:
        return []
    found = []
    for facts in job.read_manifests():
        together = _folders(facts) if facts.get("scheduler") == scheduler else ()
        for number, folder in zip(facts["jobs"], together, strict=False):
            if folder in folders:
                told = folders[folder]
                some = (told["asked"], told["ends"], told["until"])
                found.append(LingeringJob(number, folder, together, *some))
    return sorted(found, key=lambda each: -(each.ends or each.waits_until))


def _folders(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the folders of the jobs of a run."""
    base = str(facts.get("folder", ""))
    if not facts.get("array"):
        return (os.path.realpath(base),)
    tasks = [os.path.join(base, "tasks", str(task)) for task in range(len(facts["jobs"]))]
    return tuple(map(os.path.realpath, tasks))


def identity(plan: BatchPlan, size: int, launcher: WorldLauncher) -> dict[str, str]:
    """Return what has to be equal in a job that this launch may take over: names, and texts."""
    settings, asked = plan.settings, plan.asked
    own = {name: value for name, value in vars(asked.own).items() if name not in _DRIVERS_OWN}
    common = {
        "n": plan.n,
        "size": size,
        "python": list(settings.python),
        "exeflags": settings.exeflags,
        "env": settings.env,
        "isolation": settings.isolation,
        "enable_threaded_blas": settings.enable_threaded_blas,
        "started by": list(launcher.argv),
        "hpcdist": _version.VERSION,
    }
    theirs = {name: value for name, (_, value) in asked.options.items()}
    told = {**theirs, **own, **common}
    return {name: _text(value) for name, value in told.items() if value not in (None, False, ())}


def _text(value: object) -> str:
    """Write a value so that `t=5` and `t="5"` are one.

    >>> _text(5), _text("5"), _text(("a", "b"))
    ('5', '5', "['a', 'b']")
    """
    return str(list(value)) if isinstance(value, tuple) else str(value)


def differences(there: Mapping[str, Any], here: Mapping[str, str]) -> list[str]:
    """Say in which options a lingering job differs from a launch.

    >>> differences({"time": "5", "n": "8"}, {"time": "10", "n": "8", "exclusive": "True"})
    ["time is '5' there and '10' here", "exclusive is not set there and 'True' here"]
    """
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    names = [name for name in names if name not in _FOLLOWS] or names
    return [
        f"{name} is {_shown(there, name)} there and {_shown(here, name)} here" for name in names
    ]


def _shown(options: Mapping[str, Any], name: str) -> str:
    return repr(options[name]) if name in options else "not set"


class Takeover:
    """Gives worlds of a launch the jobs that linger.

    Args:
        scheduler: The name of the scheduler.
        wanted: Tells whether the launch still wants jobs.
        find_end: Asks when a job ends, in Unix time.
        say: Tells the user.
    """

    def __init__(
        self,
        scheduler: str,
        wanted: Callable[[], bool],
        find_end: Callable[[JobId], float | None],
        say: Callable[[str], None],
    ) -> None:
        self._scheduler = scheduler
        self._wanted = wanted
        self._find_end = find_end
        self._say = say
        self._passed: set[str] = set()  # folders of those that are not to be had

    def take(self, world: WorldView, mine: Mapping[str, str]) -> LingeringJob | None:
        """Get a lingering job for a world whose join file is complete; None: there is none.

        Args:
            mine: What the launch is: see `identity`.
        """
        for found in lingering_jobs(self._scheduler):
            if found.folder in self._passed or not self._wanted():
                continue
            self._passed.add(found.folder)
            differing = differences(found.asked, mine)
            if differing:
                self._say(
                    f"job {found.job} lingers, and was not taken over: {'; '.join(differing)}"
                )
            elif self._claim(world, found):
                self._welcome(found)
                return found
        return None

    def _welcome(self, found: LingeringJob) -> None:
        ends = self._find_end(found.job) if found.ends is None else found.ends
        left = "" if ends is None else f" ({clock(max(0.0, ends - time.time()))} left)"
        self._say(f"took over job {found.job}{left} instead of queueing")

    def _claim(self, world: WorldView, found: LingeringJob) -> bool:
        own = world.folder
        if not world.move_to(found.folder, found.job):
            return False
        path = claim_path(found.folder, os.path.basename(own))
        world.submitted_at = time.monotonic()
        try:
            write_private(path, world.join)
            why = self._await(world, path)
        except OSError as exc:  # the folder has just been removed
            why = str(exc)
        unlink(path)
        if why and world.move_to(own, None):
            if self._wanted():
                self._say(f"job {found.job} lingers, and was not taken over: {why}")
            return False
        job.forget(own)
        return True

    def _await(self, world: WorldView, path: str) -> str:
        """Wait for the keeper of a job; return why it does not come, or nothing."""
        deadline = time.monotonic() + _PATIENCE
        refused = False
        while not world.up:
            now = time.monotonic()
            if not refused and not os.path.exists(path):
                refused, deadline = True, now + _GRACE
            if world.closed or not self._wanted():
                return "it is not wanted any more"
            if now > deadline:
                return "another driver has got it" if refused else "it does not answer"
            time.sleep(_LOOK_EVERY)
        return ""
