"""Managers that other packages bring along, as the command line finds them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from tests.helpers import patient

pytestmark = pytest.mark.any_mpi

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., "subprocess.CompletedProcess[str]"]

MANAGERS = """
from pathlib import Path

import hpcdist
from hpcdist.managers import BatchManager, Scheduler


class Site(hpcdist.SlurmManager):
    scheduler = "site"
    program = "site-submit"

    def job_script(self, **params):
        return f"# for {self.n} workers on {params['partition']}\\n"


class Other(Scheduler):
    name = "other"
    bare = frozenset({"--now"})
    defaults = hand_in = find = poll = cancel = None


class OtherManager(BatchManager):
    def __init__(self, n):
        super().__init__(Other(), n)

    def job_script(self, **params):
        return f"# {self.n} {params}\\n"


class Picky(OtherManager):
    def __init__(self, n, account):
        super().__init__(n)


class Half(Scheduler):
    name = "half"
    defaults = poll = None


nobody = object()
Path(__file__).with_suffix(".read").touch()
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder on the path in which a package with four managers is installed; two are broken."""
    folder = tmp_path / "installed"
    about = folder / "sites_managers-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "sites_managers.py").write_text(MANAGERS)
    (folder / "broken_manager.py").write_text("raise OSError('no licence')")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sites-managers\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        dedent("""\
            [hpcdist.managers]
            broken = broken_manager:Manager
            nobody = sites_managers:nobody
            site = sites_managers:Site
            other = sites_managers:OtherManager
            half = sites_managers:Half
            picky = sites_managers:Picky
            slurm = broken_manager:Manager
            """)
    )
    return folder


@pytest.fixture
def run(package: Path, tmp_path: Path) -> Run:
    """`run(*args, programs=())`: run the command line with that package and these programs."""

    def start(*args: str, programs: tuple[str, ...] = (), flags: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
        bin_ = tmp_path / "bin"
        bin_.mkdir(exist_ok=True)
        for name in programs:
            (bin_ / name).touch(0o755)
        return subprocess.run(
            [sys.executable, *flags, "-m", "hpcdist", *args],
            capture_output=True,
            text=True,
            timeout=patient(50),
            cwd=tmp_path,
            env={
                **{n: v for n, v in os.environ.items() if n.startswith(("HPCDIST_TEST", "TMPDIR"))},
                "PATH": str(bin_),
                "HOME": str(tmp_path),
                "HPCDIST_DIR": str(tmp_path / "state"),
                "PYTHONPATH": f"{ROOT}{os.pathsep}{package}",
            },
        )

    return start


def test_a_manager_is_known_by_its_name(run: Run) -> None:
    done = run("script", "-n", "4", "--scheduler", "site", "--partition", "debug")
    assert (done.returncode, done.stdout) == (0, "# for 4 workers on debug\n"), done.stderr


def test_a_manager_is_known_by_its_command(run: Run) -> None:
    done = run("script", "-n", "4", "--partition=debug", programs=("site-submit",))
    assert (done.returncode, done.stdout) == (0, "# for 4 workers on debug\n"), done.stderr


def test_ours_go_first(run: Run) -> None:
    args = ("script", "-n", "4", "--mpi", "pmi2", "--partition=debug")
    done = run(*args, programs=("site-submit", "sbatch"))
    assert "#SBATCH --partition=debug" in done.stdout, done.stderr
    assert run(*args, "--scheduler", "slurm").stdout.startswith("#!")


def test_options_without_a_value(run: Run) -> None:
    done = run("script", "-n", "4", "--scheduler", "other", "--now", "--queue", "long")
    assert done.stdout == "# 4 {'now': True, 'queue': 'long'}\n", done.stderr
    # Those of the scheduler whose manager it extends are known too.
    done = run("script", "--scheduler=site", "--exclusive", "-n", "4", "--partition", "debug")
    assert (done.returncode, done.stdout) == (0, "# for 4 workers on debug\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "broken_manager:Manager of sites-managers, cannot be loaded: OSError: no lic"),
        ("nobody", "sites_managers:nobody of sites-managers, is neither a Scheduler"),
        (
            "picky",
            "sites_managers:Picky of sites-managers, cannot be made: TypeError: Picky.__init",
        ),
        ("half", "sites_managers:Half of sites-managers, is abstract: it has no cancel, find, ha"),
        ("cron", "no scheduler 'cron' is known: slurm"),
    ],
)
def test_a_manager_that_cannot_be_had(name: str, said: str, run: Run) -> None:
    done = run("script", "-n", "4", "--scheduler", name)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    if name == "cron":
        assert "site" in done.stderr


def test_without_any_scheduler_the_broken_ones_are_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "driver.py").touch()
    done = run("submit", "driver.py", "-n", "2")
    assert done.returncode == 1
    assert "no scheduler was found here" in done.stderr
    assert "no licence" in done.stderr


def test_they_are_read_only_when_needed(run: Run, package: Path) -> None:
    done = run("jobs", flags=("-X", "importtime"))
    assert "argparse" in done.stderr
    assert "importlib.metadata" not in done.stderr
    read = package / "sites_managers.read"
    script = ("script", "-n", "1", "--mpi", "pmi2")
    assert run(*script, programs=("sbatch",)).returncode == 0
    assert not read.exists()
    assert run(*script, "--scheduler", "cron").returncode == 1
    assert not read.exists()
    assert run(*script, "--scheduler", "nobody").returncode == 1
    assert read.exists()
