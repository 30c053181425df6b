"""The sites of the tests in this folder: a replayed scheduler, and the package that knows it."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Finished
from tests.helpers import eventually
from tests.plugins import installed, replay


@dataclass(frozen=True)
class Kind:
    """A scheduler of another package, as the tests that are the same for all see it.

    Attributes:
        name: As the command line knows it.
        manager: Makes its manager; `n` is the number of workers.
        good: Options of a job that runs.
        bad: Options of one that is refused.
        refusal: What is said then.
        script: What its jobs have in their script, or in a file beside it.
        number: How it writes a job's number.
        job: The variable by which its jobs know that they are its.
        waits: Why a job waits.
        cancelled: How the end of one is told that was cancelled.
    """

    name: str
    package: str
    programs: tuple[str, ...]
    manager: str
    good: str
    bad: str
    refusal: str
    script: tuple[str, str]
    number: str
    cancel: tuple[str, ...]
    job: str
    waits: str
    cancelled: str


KINDS = {
    "flux": Kind(
        name="flux",
        package="hpcdist_flux",
        programs=("flux",),
        manager="hpcdist_flux.FluxManager(n)",
        good="queue='debug', t='30m'",
        bad="queue='nope'",
        refusal="Invalid queue 'nope'",
        script=("script.sh", "#flux: --queue=debug\n#flux: -t 30m\n"),
        number="f{}x",
        cancel=("flux", "cancel"),
        job="FLUX_JOB_ID",
        waits="insufficient resources",
        cancelled="CANCELED",
    ),
    "htcondor": Kind(
        name="htcondor",
        package="hpcdist_htcondor",
        programs=("condor_submit", "condor_q", "condor_history", "condor_rm"),
        manager="BatchManager(hpcdist_htcondor.HTCondor(), n)",
        good="accounting_group='physics', allowed_job_duration='1800'",
        bad="accounting_group='nope'",
        refusal="Invalid accounting group",
        script=("job.sub", "accounting_group = physics\nallowed_job_duration = 1800\n"),
        number="{}.0",
        cancel=("condor_rm",),
        job="_CONDOR_SCRATCH_DIR",
        waits="queue_timeout=4",
        cancelled="REMOVED",
    ),
}
PRELUDE = """
import os, signal, subprocess, sys, time
import hpcdist as h
import {package}
from hpcdist import LaunchError, ProcessExitedException
from hpcdist import addprocs, launch, remotecall, remotecall_fetch, rmprocs, spmd
from hpcdist.managers import BatchManager

def manager(n):
    return {manager}

def until(look, timeout=60):
    end = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < end, ("did not come true", found)
        time.sleep(0.1)
    return found

def refused(*words, n=1, **params):
    try:
        pids = addprocs(manager(n), **params)
    except LaunchError as exc:
        missing = [word for word in words if word not in str(exc)]
        assert not missing, (missing, params, str(exc))
        return exc
    raise AssertionError(f"{{params}} gave {{pids}}")

"""


class Site:
    """A replayed scheduler, seen from outside, and programs that use it."""

    def __init__(self, kind: Kind, folder: Path, script: Callable[..., Finished]) -> None:
        self.kind = kind
        self.folder = folder
        self._script = script
        self._jobs, self.home = folder / "replayed", folder / "home"
        packages, self.programs = folder / "packages", folder / "bin"
        for made in (self._jobs, self.home, packages, self.programs):
            made.mkdir()
        installed.install(kind.package, packages)
        replay.install(self.programs, *kind.programs)
        self._env = {
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}",
            "REPLAY_JOBS": str(self._jobs),
            "HPCDIST_DIR": str(self.home),
        }

    def start(self, text: str, *args: str, fault: str = "", **env: str) -> Finished:
        """Run a driver to its end."""
        first = PRELUDE.format(**vars(self.kind)) if not text.startswith("import") else ""
        env = self._env | {"REPLAY_FAULT": fault, **env}
        return self._script(first + text, args=args, env=env, timeout=120)

    def run(self, text: str, *, fault: str = "") -> Finished:
        """Run a driver to its good end."""
        done = self.start(text, fault=fault)
        assert done.rc == 0, f"{done.out}\n{done.err}"
        return done

    def hpcdist(self, *args: str, fault: str = "", **env: str) -> Finished:
        """Run the command line."""
        text = "import sys; from hpcdist._cli.main import main; sys.exit(main())"
        return self.start(text, *args, fault=fault, **env)

    def number(self, which: int) -> str:
        """Return the number of the job that was submitted as number 0, 1, …"""
        return self.kind.number.format(17 + which)

    def jobs(self) -> list[Mapping[str, Any]]:
        """Return all jobs, the oldest first."""
        found = [json.loads(path.read_text()) for path in self._jobs.glob("*.json")]
        return sorted(found, key=lambda job: int(job["id"]))

    def living(self) -> list[int]:
        """Return the jobs that have not ended."""
        return [job["id"] for job in self.jobs() if job["state"] != "ended"]

    def runs(self) -> list[Path]:
        """Return the folders of runs that are still there."""
        return list((self.home / "jobs").glob("*"))

    def stop(self) -> list[int]:
        """End what is left of the jobs; return what was."""
        left = self.living()
        for number in left:
            (self._jobs / f"{number}.kill").touch()
        running = [job["id"] for job in self.jobs() if job["state"] == "running"]
        eventually(lambda: not {*running} & {*self.living()}, 30, "jobs will not end")
        return left


@pytest.fixture(params=list(KINDS))
def site(
    request: pytest.FixtureRequest, tmp_path: Path, script: Callable[..., Finished]
) -> Iterator[Site]:
    """A site; a test that leaves a job behind fails."""
    made = Site(KINDS[request.param], tmp_path, script)
    yield made
    left = made.stop()
    assert not left, f"jobs left behind: {left}"


def options(text: str) -> list[str]:
    """Write keywords of `addprocs` as options of the command line."""
    return [f"--{name}={value}" for name, value in re.findall(r"(\w\w+)='(.*?)'", text)]
