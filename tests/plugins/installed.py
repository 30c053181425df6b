"""Packages with schedulers, as pip would install them; nothing is built for it."""

import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def install(name: str, folder: Path) -> None:
    """Put a package of this folder, its data and its entry points into a folder on the path."""
    source = HERE / name
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    about = folder / f"{name}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project["entry-points"]
    (about / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
            for group, entries in groups.items()
        )
    )


def sources(name: str) -> list[Path]:
    """Return the modules of a package of this folder."""
    return sorted((HERE / name / name).rglob("*.py"))


PACKAGES = tuple(sorted(path.parent.name for path in HERE.glob("*/pyproject.toml")))
