"""What fails side by side runs once more, and what passes then is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAKY = """
from pathlib import Path

def test_sound():
    with open("sound", "a") as file:
        file.write("x")

def test_shaky():
    seen = Path("seen")
    if not seen.exists():
        seen.touch()
        raise AssertionError
"""


def run(folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_these.py").write_text(text)
    command = [sys.executable, "-m", "tests._once_more", "-q", "--", *arguments, "test_these.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_what_passes_alone_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, SHAKY)
    assert done.returncode == 1, done.stdout  # named, not excused
    assert "PASSED ONLY ALONE test_these.py::test_shaky" in done.stdout
    assert (tmp_path / "sound").read_text() == "x"  # not run again


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def test_it():\n    assert False", 1),
        ("import no_such_module", 2),
        ("def test_it():\n    pass", 0),
    ],
)
def test_what_fails_alone_fails(text: str, code: int, tmp_path: Path) -> None:
    done = run(tmp_path, text)
    assert done.returncode == code, done.stdout
    assert "PASSED ONLY ALONE" not in done.stdout
