"""Schedulers of other packages, written to `hpcdist.managers` alone: Flux and HTCondor.

Their programs are ones of ours, which run jobs on this host.
"""

import ast
import doctest
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from hpcdist import managers
from hpcdist._keeper.installed_mpi import scrubbed
from hpcdist._schedulers.commands import environment
from tests.conftest import ROOT
from tests.helpers import eventually
from tests.plugins import installed
from tests.plugins.conftest import Site, options

pytestmark = pytest.mark.any_mpi

# What API.md promises by name is in there; the rest is for annotations.
PROMISED = {
    *("Scheduler", "BatchManager", "JobSpec", "JobId", "JobState", "Verdict", "Settings"),
    *("WorldLauncher", "run", "SubmitError", "CommandFailed", "CommandLate", "CommandMissing"),
}


@pytest.mark.each_mpi
def test_a_world_from_its_start_to_its_end(site: Site) -> None:
    done = site.run(f"""
pids = addprocs(manager(2), {site.kind.good}, setup="export A='1 2'", keep=True)
rows = [(row.job_id, row.rank) for row in h.status() if row.pid in pids]
assert rows == [("{site.number(0)}", 0), ("{site.number(0)}", 1)], rows
seen = remotecall_fetch(lambda: (os.environ["A"], "{site.kind.job}" in os.environ), pids[1])
assert seen == ("1 2", True), seen
assert spmd(lambda: h.comm().allreduce(h.comm().rank), pids=pids) == [1, 1]
remotecall_fetch(print, pids[1], "hello")
until(lambda: h.time_left(pids[1]) is not None)
assert 1500 < h.time_left(pids[1]) <= 1800, h.time_left(pids[1])
rmprocs(pids)
""")
    assert "From worker 3:\thello\n" in done.out
    (folder,) = site.runs()
    name, words = site.kind.script
    assert words in (folder / name).read_text()
    eventually(lambda: not site.living(), 30, "it stays")


def test_jobs_apart(site: Site) -> None:
    site.run(f"""
going = launch(manager(3), split=2, isolation="process")
pids = going.wait()
assert sorted(going.jobs) == ["{site.number(0)}", "{site.number(1)}"], going.jobs
try:
    remotecall_fetch(lambda: os.kill(os.getpid(), signal.SIGKILL), pids[0])
except ProcessExitedException as exc:
    assert "SIGKILL" in exc.why, exc.why
assert [remotecall_fetch(h.myid, pid) for pid in pids[1:]] == pids[1:]
rmprocs(h.workers())
""")
    eventually(lambda: not site.living() and not site.runs(), 30, "it stays")


def test_what_is_refused_is_told_in_its_words(site: Site) -> None:
    site.run(f"""
refused({site.kind.refusal!r}, {site.kind.bad})
refused("setup failed on", "at: false", "one\\n", setup=["echo one", "false"])
""")
    assert site.living() == []


def test_an_answer_that_gets_lost(site: Site) -> None:
    site.run("pids = addprocs(manager(1))\nrmprocs(pids)\n", fault="garbage")
    assert len(site.jobs()) == 1
    eventually(lambda: not site.living(), 30, "it stays")


@pytest.mark.parametrize("fault", ["pending", "down"])
def test_a_job_that_does_not_start(site: Site, fault: str) -> None:
    said = site.kind.waits if fault == "pending" else "ERROR"
    site.run(f"refused({said!r}, queue_timeout=4)\n", fault=fault)
    eventually(lambda: not site.living(), 30, "it was not cancelled")


def test_a_killed_job_is_told(site: Site) -> None:
    site.run(f"""
pids = addprocs(manager(2))
future = remotecall(time.sleep, pids[1], 600)
subprocess.run({[*site.kind.cancel, site.number(0)]!r}, check=True)
def why():
    try:
        future.fetch()
    except ProcessExitedException as exc:
        return exc.why
until(lambda: "its job {site.number(0)} ended: {site.kind.cancelled}" in why())
""")


@pytest.mark.each_mpi
def test_the_job_ends_with_its_driver(site: Site) -> None:
    done = site.start("""
pids = addprocs(manager(2))
h.remote_do(time.sleep, pids[1], 600)
os.kill(os.getpid(), signal.SIGKILL)
""")
    assert done.rc == -signal.SIGKILL, done
    eventually(lambda: not site.living(), 60, "the job goes on")


DRIVER = """
import os, sys
import hpcdist as h
h.init()
print(sorted(h.everywhere.call(h.myid).values()), sys.argv[1:])
name = sys.argv[1]  # of a variable of the job, which is none of the worker's that it adds
(pid,) = h.addprocs(1, isolation="process")
print(name in os.environ, h.remotecall_fetch(lambda: os.environ.get(name), pid))
sys.exit(5)
"""


@pytest.mark.each_mpi
def test_the_command_line(site: Site) -> None:
    (site.folder / "job.py").write_text(DRIVER)
    which = ("--scheduler", site.kind.name)
    submit = ("submit", "job.py", "-n", "2", *which, *options(site.kind.good))
    done = site.hpcdist(*submit, "--wait", "--", site.kind.job, "b")
    assert (done.rc, done.out) == (5, f"{site.number(0)}\n"), done
    assert "FAILED, exit code 5" in done.err, done
    (log,) = (site.home / "jobs").glob("*/log")
    assert f"[1, 2] ['{site.kind.job}', 'b']\nTrue None\n" in log.read_text(), log.read_text()

    (site.folder / "sleeper.py").write_text(
        "import time; import hpcdist as h; h.init(); time.sleep(600)\n"
    )
    done = site.hpcdist("submit", "sleeper.py", "-n", "1", *which)
    assert done.out == f"{site.number(1)}\n", done
    eventually(lambda: site.jobs()[1]["state"] == "running", 30)
    assert "RUN" in site.hpcdist("jobs").out
    done = site.hpcdist("cancel", site.number(1))
    assert done.rc == 0, done
    eventually(lambda: not site.living(), 60, "it goes on")
    done = site.hpcdist("cancel", site.number(1))
    assert site.kind.cancelled in done.err, done


def test_files_of_settings_and_templates(site: Site) -> None:
    name = site.kind.name
    (site.folder / "hpcdist.toml").write_text(f'[{name}]\nsetup = ["echo of the site"]\n')
    template = {"flux": "flux.sh.j2", "htcondor": "base.sh.j2"}[name]
    (site.folder / "templates").mkdir()
    (site.folder / "templates" / template).write_text(
        f'{{% extends "builtin/{template}" %}}\n{{% block end %}}\necho bye\n{{{{ super() }}}}\n'
        "{% endblock %}\n"
    )
    done = site.hpcdist("script", "-n", "2", "--scheduler", name, "--isolation=process")
    assert done.rc == 0, done
    assert "\necho of the site\n" in done.out
    assert "\necho bye\n" in done.out
    assert ("trap 'told=HUP" in done.out) == (name == "flux")
    (site.folder / "hpcdist.toml").write_text("[fluxx]\na = 1\n")
    done = site.hpcdist("script", "-n", "2", "--scheduler", name)
    assert "unknown table 'fluxx'" in done.err, done


@pytest.mark.each_mpi
def test_the_doctor(site: Site) -> None:
    flux = site.kind.name == "flux"
    which = ("doctor", "--scheduler", site.kind.name)
    done = site.hpcdist(*which, "--run")
    assert "all is well" in done.out, done
    assert ("Flux answers" in done.out) == flux, done
    assert [job["limit"] for job in site.jobs()] == [60.0]  # a minute
    if flux:
        done = site.hpcdist(*which, fault="down")
        assert done.rc == 1, done
        assert "no Flux instance answers" in done.out, done


def test_it_is_known_by_its_command(site: Site) -> None:
    done = site.hpcdist("script", "-n", "2", PATH=str(site.programs))
    assert done.rc == 0, done
    assert ("#flux: --nslots=2\n" in done.out) == (site.kind.name == "flux")
    assert "#SBATCH" not in done.out


# What they are made of


@pytest.mark.parametrize("package", installed.PACKAGES)
def test_they_import_public_names_alone(package: str) -> None:
    named = set()
    for path in installed.sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.ImportFrom(module=str(module), names=names, level=0):
                    named |= {f"{module}.{alias.name}" for alias in names}
                case ast.Import(names=names):
                    named |= {alias.name for alias in names}
                case ast.ImportFrom():
                    raise AssertionError(f"{path}: a relative import")
    ours = {name for name in named if name.partition(".")[0] == "hpcdist"}
    assert ours <= {f"hpcdist.managers.{name}" for name in managers.__all__}
    assert all(f"hpcdist.managers.{name}" in ours for name in ("Scheduler", "JobId", "Verdict"))


def test_what_was_promised_is_there() -> None:
    assert set(managers.__all__) >= PROMISED
    for name in managers.__all__:
        assert getattr(managers, name).__module__ == "hpcdist.managers"
        assert getattr(managers, name).__doc__


@pytest.mark.parametrize("name", managers.__all__)
def test_the_examples_of_public_names_run(name: str) -> None:
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    thing = getattr(managers, name)
    for test in finder.find(thing, name, module=False, globs=dict(vars(managers))):
        runner.run(test)
    assert not runner.failures


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """`package(name)`: import a package of this folder, for one test."""
    names = []

    def load(name: str) -> Any:
        names.append(name)
        monkeypatch.syspath_prepend(str(installed.HERE / name))
        return import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("f2WHnHnK3|FAILED|7|n[1-2]|||||", "FAILED, exit code 7"),
        ("ƒ2WHnHnK3|FAILED|-9|n1|||||a | b", "FAILED (a | b), killed by SIGKILL"),
        ("f2WHnHnK3|CANCELED|-128||||||", "CANCELED"),
        (
            "f2WHnHnK3|TIMEOUT|142|n1|||||resource allocation expired",
            "TIMEOUT (resource allocation",
        ),
        ("f2WHnHnK3|SCHED||||2030-01-07T13:31:00||insufficient resources|", "SCHED (insufficient"),
        ("f2WHnHnK3|PENDING", "PENDING"),
        ("f2WHnHnK3|NEW|||||||", "NEW"),
    ],
)
def test_what_flux_prints_is_read(package: Callable[[str], Any], line: str, said: str) -> None:
    ((job, verdict),) = package("hpcdist_flux").parse_jobs(f"{line}\n").items()
    assert job == line.partition("|")[0]
    assert verdict.describe().startswith(said)
    assert (verdict.start is not None) == ("2030" in line)


def test_times_of_flux_are_read(package: Callable[[str], Any]) -> None:
    module = package("hpcdist_flux")
    line = "f2WHnHnK3|RUN||n1|2026-01-07T13:00:00||2026-01-07T13:30:00||\n"
    verdict = module.parse_jobs(line)["f2WHnHnK3"]
    assert (verdict.end - verdict.start).total_seconds() == 1800
    times = {"90s": 90, "30m": 1800, "1.5h": 5400, "2d": 172800, "5": 300, 5: 300}
    for text, seconds in times.items():
        asked = module.FluxManager(1).scheduler.read({"t": text})
        assert module.Flux().walltime(asked) == seconds
    assert module.Flux().walltime(module.Flux().read({"t": "soon"})) is None


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ('"JobStatus": 4, "ExitCode": 3', "FAILED, exit code 3"),
        ('"JobStatus": 4, "ExitCode": 0', "COMPLETED"),
        ('"JobStatus": 4, "ExitSignal": 9', "FAILED, killed by SIGKILL"),
        ('"JobStatus": 5, "HoldReason": "no file"', "HELD (no file)"),
        ('"JobStatus": 9', "UNKNOWN"),
    ],
)
def test_what_htcondor_prints_is_read(package: Callable[[str], Any], facts: str, said: str) -> None:
    module = package("hpcdist_htcondor")
    found = module.parse_ads(f'[{{"ClusterId": 7, "ProcId": 0, {facts}}}]', "condor_q")
    assert found["7.0"].describe() == said
    assert module.parse_ads("\n", "condor_q") == {}


def test_the_page_begins_with_the_package() -> None:
    page = (ROOT / "docs" / "own-scheduler.md").read_text()
    shown = re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert shown is not None
    (source,) = installed.sources("hpcdist_flux")
    assert shown[1] == source.read_text()
    for name in managers.__all__:
        assert f"`{name}" in page, f"{name} is not explained"


def test_a_job_says_what_variables_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"HPCDIST_SCRUBBED": "FLUX_JOB_ _X_", "FLUX_JOB_ID": "1", "_X_Y": "2", "FLUX_URI": "3"}
    assert scrubbed(left) == {"HPCDIST_SCRUBBED": "FLUX_JOB_ _X_", "FLUX_URI": "3"}
    assert not {"FLUX_JOB_ID", "_X_Y"} & environment(left).keys()


NAMES = ("slurm", "pbs", "sge", "lsf", "flux", "htcondor")


def of_schedulers() -> list[Path]:
    """Return the modules that are of no scheduler: of the room, and of the command line."""
    package = Path(managers.__file__).parent
    found = [*package.glob("_schedulers/*.py"), *package.glob("_cli/*.py")]
    return [path for path in found if not path.name.startswith(NAMES)]


@pytest.mark.parametrize(
    "path", of_schedulers(), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_no_general_module_knows_a_scheduler(path: Path) -> None:
    """The four are written to the contract: nobody asks which of them one is.

    The table of `_cli/schedulers` says where they are; `allocation` is a part of Slurm's.
    """
    tree = ast.parse(path.read_text())
    table = {f"hpcdist._schedulers.{name}" for name in NAMES[:4]}
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module in table:
                found.append(f"line {node.lineno} imports {module}")
            case ast.Constant(value=str(text)) if text in NAMES and path.stem != "schedulers":
                found.append(f"line {node.lineno} names {text!r}")
            case ast.Name(id=name) | ast.Attribute(attr=name) if name.endswith(
                ("SlurmManager", "PBSManager", "SGEManager", "LSFManager")
            ):
                found.append(f"line {node.lineno} asks for {name}")
    assert found == []


def test_the_four_are_schedulers_by_the_contract() -> None:
    import hpcdist

    for name in ("SlurmManager", "PBSManager", "SGEManager", "LSFManager"):
        manager = getattr(hpcdist, name)(3)
        assert isinstance(manager, managers.BatchManager)
        assert isinstance(manager.scheduler, managers.Scheduler)
        assert repr(manager) == f"{name}(3)"
    assert os.path.basename(managers.__file__) == "managers.py"
