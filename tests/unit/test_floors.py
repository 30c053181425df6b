"""The architecture, as far as a machine can check it: imports run downward, modules stay short.

The package is a house. Each room stands on a floor and may import from its own floor and from those
below. What it needs from above, it is given as an argument.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hpcdist"

FLOORS = {
    "_config": 1,
    "_errors": 1,
    "_log": 1,
    "_resources": 1,
    "_wire": 2,
    "_transport": 3,
    "_runtime": 4,
    "_remote": 5,
    "_parallel": 6,
    "_managers": 7,
    "_monitor": 6,
    "_integrations": 8,
    "_cli": 9,
    # The façade holds the public names, the other starts the command line.
    "__init__": 10,
    "__main__": 10,
}
LONGEST_MODULE = 600


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(parts: tuple[str, ...]) -> str:
    """Return the room that a dotted name below `hpcdist` lies in; the façade for a public name."""
    if parts and (parts[0].startswith("_") or (PACKAGE / parts[0]).is_dir()):
        return parts[0]
    return "__init__"


def imported_rooms(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield line and room of every import of the package, wherever it stands in the module.

    Args:
        tree: the module's syntax tree.
        package: dotted name of the package the module lies in, `("hpcdist", "_wire")`.
    """
    for node in ast.walk(tree):
        for name in imported_names(node, package):
            if name[0] == "hpcdist":
                yield node.lineno, room_of(name[1:])


def imported_names(node: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    match node:
        case ast.Import(names=names):
            for alias in names:
                yield tuple(alias.name.split("."))
        case ast.ImportFrom(module=module, names=names, level=level):
            start = package[: len(package) - level + 1] if level else ()
            base = (*start, *module.split(".")) if module else start
            for alias in names:
                # With the name: `from hpcdist import _wire` is about the room, not the façade.
                yield (*base, alias.name)
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            if not name.startswith("."):
                yield tuple(name.split("."))


def upward_imports(path: Path, text: str) -> list[str]:
    """Return a sentence for each import of this module that goes up."""
    inside = path.relative_to(PACKAGE)
    package = ("hpcdist", *inside.parent.parts)
    own_room = inside.parts[0].removesuffix(".py")
    if own_room not in FLOORS:
        return [f"{name_of(path)}: the room '{own_room}' has no floor: give it one in FLOORS"]
    sentences = []
    for line, room in imported_rooms(ast.parse(text), package):
        if room not in FLOORS:
            sentences.append(f"{name_of(path)}:{line} imports '{room}', which has no floor")
        elif FLOORS[room] > FLOORS[own_room]:
            sentences.append(
                f"{name_of(path)}:{line} (floor {FLOORS[own_room]}) imports '{room}' "
                f"(floor {FLOORS[room]}): take what it needs as an argument"
            )
    return sentences


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_run_downward(path: Path) -> None:
    assert upward_imports(path, path.read_text()) == []


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_modules_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST_MODULE, f"{name_of(path)} has {lines} lines: split it by concept"


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("_wire/codec.py", "from hpcdist._remote import calls"),
        ("_wire/codec.py", "import hpcdist._remote.calls as calls"),
        ("_wire/codec.py", "from hpcdist import _remote"),
        ("_wire/codec.py", "from .. import _remote"),
        ("_wire/codec.py", "from .._remote.calls import x"),
        ("_wire/codec.py", "def f():\n    from .._remote import calls"),
        ("_wire/codec.py", "import importlib\nimportlib.import_module('hpcdist._remote')"),
        ("_wire/codec.py", "import hpcdist"),
        ("_cli/main.py", "from hpcdist import addprocs"),
        ("_managers/batch/slurm.py", "from ..._cli import run"),
        ("_errors.py", "from ._wire import codec"),
        ("_attic/x.py", ""),
    ],
)
def test_an_upward_import_is_found(where: str, text: str) -> None:
    assert len(upward_imports(PACKAGE / where, text)) == 1


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("_remote/calls.py", "from .futures import Future"),
        ("_remote/calls.py", "from . import futures"),
        ("_remote/calls.py", "from .._wire.codec import encode\nimport os, numpy.linalg"),
        ("_integrations/joblib.py", "from hpcdist._integrations import executor"),
        ("_managers/batch/slurm.py", "from ..base import ClusterManager\nfrom . import job"),
        ("__init__.py", "from ._remote.calls import remotecall\nfrom ._errors import HpcdistError"),
        ("__main__.py", "from hpcdist._cli.main import main"),
    ],
)
def test_a_downward_import_is_allowed(where: str, text: str) -> None:
    assert upward_imports(PACKAGE / where, text) == []
