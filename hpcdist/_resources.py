"""The data folders that are installed with the package.

In a wheel they lie inside the package, under `_data`. In a checkout, and so in an editable install,
they stand beside the package at the top of the repository.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

__all__ = ["jobscripts", "templates"]


def templates() -> Traversable:
    """Return the folder of the built-in job templates."""
    return _folder("templates")


def jobscripts() -> Traversable:
    """Return the folder of the ready-made job scripts."""
    return _folder("jobscripts")


def _folder(name: str) -> Traversable:
    # The installed copy goes first: beside an installed package lies all of site-packages, where a
    # folder of the same name would be somebody else's.
    installed = files(__package__) / "_data" / name
    if installed.is_dir():
        return installed
    beside = Path(__file__).resolve().parent.parent / name
    if beside.is_dir():
        return beside
    raise FileNotFoundError(
        f"the folder '{name}' of hpcdist is neither at {installed} nor at {beside}: "
        "install the package again"
    )
