"""The data folders are found in a checkout, in an editable install, and in a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hpcdist import _resources

ROOT = Path(__file__).resolve().parents[2]

SHOW_FOLDERS = """
import sys
sys.path.insert(0, sys.argv[1])
from hpcdist import _resources
for folder in (_resources.templates(), _resources.jobscripts()):
    print(folder)
    print(folder.joinpath("README.md").read_text().splitlines()[0])
"""


def pip_wheel(project: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build a project's wheel into `target`, as anyone who installs it does."""
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", target, project],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    built = pip_wheel(ROOT, target)
    if built.returncode != 0:
        skip_if_pip_cannot_build(tmp_path_factory.mktemp("stub"))
        pytest.fail(f"no wheel:\n{built.stdout}\n{built.stderr}", pytrace=False)
    (path,) = target.glob("hpcdist-*.whl")
    return path


def skip_if_pip_cannot_build(stub: Path) -> None:
    """Skip when pip cannot build the smallest project either: no network, no build backend."""
    (stub / "stub.py").touch()
    (stub / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "stub"\nversion = "0"\n'
    )
    built = pip_wheel(stub, stub)
    if built.returncode != 0:
        pytest.skip(f"pip cannot build here: {built.stderr.strip()[-300:]}")


def test_a_checkout_has_them_beside_the_package() -> None:
    for name, folder in (
        ("templates", _resources.templates()),
        ("jobscripts", _resources.jobscripts()),
    ):
        assert folder.is_dir()
        assert folder.joinpath("README.md").is_file()
        assert Path(str(folder)) == ROOT / name


@pytest.mark.timeout(600)
def test_a_wheel_has_them_inside_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hpcdist"}
    for folder in ("templates", "jobscripts"):
        expected = {
            f"hpcdist/_data/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        packed = {name for name in names if name.startswith(f"hpcdist/_data/{folder}/")}
        assert packed == expected


@pytest.mark.timeout(600)
def test_an_installed_wheel_finds_its_own(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shown = subprocess.run(
        [sys.executable, "-c", SHOW_FOLDERS, site],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=tmp_path,
    )
    data = site / "hpcdist" / "_data"
    assert shown.stdout.splitlines() == [
        str(data / "templates"),
        "# Templates",
        str(data / "jobscripts"),
        "# Job scripts",
    ]


def test_a_missing_folder_is_an_error_that_says_where_it_was_looked_for() -> None:
    with pytest.raises(FileNotFoundError, match=r"'attic'.*_data.*install the package again"):
        _resources._folder("attic")
