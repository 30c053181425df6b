"""The architecture, as far as a machine can check it: imports run downward, modules stay short.

The package is a house. Each room stands on a floor and may import from its own floor and from those
below. What it needs from above, it is given as an argument.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hpcdist"

FLOORS = {
    "_config": 1,
    "_error_parts": 1,
    "_errors": 1,
    "_frames": 1,
    "_hints": 1,
    "_log": 1,
    "_numbers": 1,
    "_pickler": 1,
    "_public": 1,
    "_resources": 1,
    "_typing": 1,
    "_version": 1,
    "_wire": 2,
    "_transport": 3,
    "_keeper": 4,
    "_runtime": 4,
    "_contract": 5,
    "_remote": 5,
    "_checkpoints": 6,
    "_items": 6,
    "_monitor": 6,
    "_collective": 7,
    "_maps": 8,
    "_events": 9,
    "_worker": 9,
    "_cluster": 10,
    "_dashboard": 11,
    "_managers": 11,
    "_schedulers": 11,
    "_integrations": 11,
    "_jobs": 11,
    "_cli": 12,
    "_notebook": 12,
    # The façade and the module for schedulers hold public names, the other starts the command line.
    "__init__": 13,
    "managers": 13,
    "__main__": 13,
    # Programs of its own use the public names, as those of users do.
    "testing": 13,
}
LONGEST_MODULE = 600
LARGEST_ROOM = 1 / 5  # of the house
MODULE_NAME = re.compile(r"hpcdist\._\w+(\.\w+)*")


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
            if isinstance(node, ast.stmt | ast.expr) and name[0] == "hpcdist":
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
        case ast.Constant(value=str(text)) if MODULE_NAME.fullmatch(text):
            # For `import_module`, `python -m`, or a table of what is imported later.
            yield tuple(text.split("."))


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


def test_no_room_is_above_a_fifth_of_the_house() -> None:
    sizes: dict[str, int] = {}
    for path in modules():
        room = room_of(path.relative_to(PACKAGE).parts[:1])
        sizes[room] = sizes.get(room, 0) + len(path.read_text().splitlines())
    assert max(sizes.values()) <= LARGEST_ROOM * sum(sizes.values()), sizes


def imported_modules(tree: ast.AST, package: tuple[str, ...], known: set[str]) -> set[str]:
    """Return the modules of the package that a module names in imports, types and strings too."""
    found = set()
    for node in ast.walk(tree):
        for name in imported_names(node, package):
            module = ".".join(name[1:])
            found |= {module, module.rpartition(".")[0]} & known
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules that import each other, directly or round about (Tarjan)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in arrows[module]:
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in arrows:
        if module not in order:
            visit(module)
    return found


def test_no_modules_import_each_other() -> None:
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in modules()}
    arrows = {}
    for name, path in names.items():
        package = ("hpcdist", *path.relative_to(PACKAGE).parent.parts)
        tree = ast.parse(path.read_text())
        arrows[name] = imported_modules(tree, package, set(names)) - {name}
    assert circles(arrows) == []


def test_a_circle_is_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(arrows) == [["b", "c"]]


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
        ("_wire/codec.py", "HOME = 'hpcdist._remote.calls'"),
        ("_cli/main.py", "from hpcdist import addprocs"),
        ("_schedulers/slurm.py", "from .._cli import run"),
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
        ("_schedulers/slurm.py", "from .._contract import managers\nfrom . import job"),
        ("__init__.py", "from ._remote.calls import remotecall\nfrom ._errors import HpcdistError"),
        ("__main__.py", "from hpcdist._cli.main import main"),
    ],
)
def test_a_downward_import_is_allowed(where: str, text: str) -> None:
    assert upward_imports(PACKAGE / where, text) == []


def statements(kind: type[ast.stmt]) -> list[str]:
    """Return where the house has statements of a kind."""
    return [
        f"{name_of(path)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kind)
    ]


def test_state_belongs_to_objects() -> None:
    """No module keeps what a process knows: no `global`, no handler registered by an import."""
    assert statements(ast.Global) == []
    for path in modules():
        for statement in ast.parse(path.read_text()).body:
            calls = ast.unparse(statement) if isinstance(statement, ast.Expr) else ""
            assert not re.match(r"(here\.)?node\b|atexit\.", calls), f"{name_of(path)}: {calls}"


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            named = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            yield from (a.annotation for a in named if a is not None and a.annotation is not None)
            yield from [] if node.returns is None else [node.returns]
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def test_few_annotations_give_up() -> None:
    """`Any` switches the checker off. It stands where a user's values pass through."""
    found = [each for path in modules() for each in annotations(ast.parse(path.read_text()))]
    vague = [each for each in found if re.search(r"\bAny\b", ast.unparse(each))]
    assert len(vague) <= 0.09 * len(found), f"{len(vague)} of {len(found)}"
