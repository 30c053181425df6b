"""A job before and after its submission: what is to run, its id, and its folder."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcdist import _config
from hpcdist._keeper import folders
from hpcdist._public import public_in
from hpcdist._schedulers.options import Asked, Own

# Stands in a command for the run's folder, which only the running script knows in a job array.
FOLDER = "@folder@"
MANIFEST = "manifest.json"
NAME = re.compile(r"[A-Za-z0-9_][\w-]*", re.ASCII)  # a folder's, and a job's for every scheduler
_WRITING = 1.25  # seconds


@public_in("managers")
class JobId(str):
    """The number of a job, as the scheduler writes it.

    Args:
        number: The number, or whatever tells it from other jobs.
        cluster: Where there are several clusters: the one it was submitted to.

    Example:
        >>> from hpcdist.managers import JobId
        >>> job = JobId("1234_5", "big")
        >>> job == "1234_5", job.cluster
        (True, 'big')
    """

    __slots__ = ("cluster",)

    def __new__(cls, number: str, cluster: str | None = None) -> JobId:
        """Make one."""
        job = super().__new__(cls, number)
        job.cluster = cluster
        return job

    cluster: str | None  # where there are several clusters: the one it was submitted to

    def __reduce__(self) -> tuple[type[JobId], tuple[str, str | None]]:
        return JobId, (str(self), self.cluster)

    def __repr__(self) -> str:
        where = f", {self.cluster!r}" if self.cluster else ""
        return f"JobId({str(self)!r}{where})"


@public_in("managers")
@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """All that a job is: what its script is rendered from, and what it asks the scheduler for.

    Attributes:
        options: The scheduler's options, with all defaults once the job is complete.
        size: How many workers it has, or ranks; each task of them, if it is a job array.
        tasks: How many tasks the job array has; 0: it is none.
        walltime: For how many seconds it may run, if its options say so.
        max_running: How many of its tasks may run at once; None: as many as there is room for.
        prefix: What a directive's line begins with, such as "#SBATCH".
        directives: The directives as they stand in the script, without the prefix.
        folder: The run's folder.
        task: The variable that numbers the tasks of a job array; then the folder of each is
            `folder/tasks/<number>`, counted from 0.
        first_task: The number of the first of them.
        cwd: Where setup and command run.
        env: Variables that are set.
        setup: Shell lines, or whole texts; the first one that fails ends the job.
        command: The argv to run; an argument may begin with `FOLDER`.
        template: The name of a template, or a path.
        template_folders: Where else a template may lie, after the places of users and sites.
        shell: The interpreter of the script.
        own_log: Whether its output goes into the folder's log by its own doing.
        remote: What starts a command on another of the job's hosts; see `WorldLauncher`.
        again: What the script runs when it has been told to end: it may submit the job again.
    """

    name: str
    prefix: str
    directives: tuple[str, ...]
    folder: str
    cwd: str
    command: tuple[str, ...]
    template: str
    template_folders: tuple[str, ...] = ()
    options: Asked = field(default_factory=lambda: Asked(Own(), {}))
    size: int = 0
    tasks: int = 0
    walltime: int | None = None
    max_running: int | None = None
    task: str = ""
    first_task: int = 0
    env: tuple[tuple[str, str], ...] = ()
    path: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    shell: str = "/bin/bash"
    own_log: bool = False
    remote: tuple[str, ...] = ()
    again: tuple[str, ...] = ()


def new_name() -> str:
    """Return a name for a run that no other has."""
    return f"hpcdist-{secrets.token_hex(4)}"


def free_name(name: str) -> str:
    """Return a name that a user has chosen for a run, if it is one, and free.

    Raises:
        ValueError: It is none.
        FileExistsError: There is a run of this name.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"the name of a job has letters, digits, - and _, not {name!r}")
    if name.isdecimal():
        raise ValueError(f"the name {name} would be taken for the id of a job")
    if os.path.lexists(os.path.join(jobs_folder(), name)):
        raise FileExistsError(
            f"there is a job called {name!r}: take another name, or remove that one once it has "
            f"ended: hpcdist jobs --clear {name}"
        )
    return name


def jobs_folder() -> str:
    """Return the folder that knows of all runs of this user."""
    return os.path.join(os.path.abspath(_config.setting("dir")), "jobs")


def run_folder(base: str | None, name: str) -> str:
    """Make the folder of a run, for nobody but its user.

    Args:
        base: Where to make it; by default in `jobs_folder()`. The compute nodes must see it too,
            so it is never the temporary folder.
        name: The run's name.
    """
    known = jobs_folder()
    for part in (os.path.dirname(known), known):
        os.makedirs(part, mode=0o700, exist_ok=True)
    folder = os.path.join(known if base is None else os.path.abspath(base), name)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    os.mkdir(folder, 0o700)
    os.chmod(folder, 0o700)  # whatever the umask
    if base is not None:
        os.symlink(folder, os.path.join(known, name))  # so that `read_manifests` finds it
    return folder


def write_script(folder: str, text: str, name: str = "script.sh") -> str:
    """Write a job script into its run's folder; return its path."""
    path = os.path.join(folder, name)
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, 0o700)
    return path


def remove(folder: str) -> None:
    """Remove the folder of a job; its script may be about to write its exit file there."""
    folders.remove(folder, _WRITING)


def forget(folder: str) -> None:
    """Remove the folder of a run, and what points to it."""
    remove(folder)
    link = os.path.join(jobs_folder(), os.path.basename(folder))
    if os.path.islink(link):
        os.unlink(link)


def write_manifest(folder: str, facts: Mapping[str, object]) -> None:
    """Write down what a run is. Nothing in it is secret.

    Args:
        facts: `name`, `scheduler`, `jobs` (a list of [id, cluster]), `array` (the id of the array
            whose tasks the jobs are, in their order), `what`, …
    """
    path = os.path.join(folder, MANIFEST)
    with open(path + ".new", "w") as file:
        file.write(manifest(folder, facts))
    os.replace(path + ".new", path)


def manifest(folder: str, facts: Mapping[str, object]) -> str:
    """Return the text of a run's manifest."""
    made = {"folder": folder, "when": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    return json.dumps({**made, **facts}, indent=1)


def read_manifest(folder: str) -> dict[str, Any]:
    """Return what a run's manifest says; of none, or of none that is whole, nothing."""
    try:
        with open(os.path.join(folder, MANIFEST)) as file:
            facts = json.load(file)
    except (OSError, ValueError):
        return {}
    if not isinstance(facts, dict):
        return {}
    facts["jobs"] = [JobId(*job) for job in facts.get("jobs", ())]
    return facts


def read_manifests() -> list[dict[str, Any]]:
    """Return the manifests of all runs whose folders are still there, the oldest first."""
    known = jobs_folder()
    found = []
    for name in sorted(os.listdir(known)) if os.path.isdir(known) else ():
        path = os.path.join(known, name)
        if facts := read_manifest(path):
            found.append(facts)
        elif os.path.islink(path) and not os.path.exists(path):
            os.unlink(path)  # a run elsewhere that has been cleared away
    return sorted(found, key=lambda facts: float(facts.get("when", 0)))
