"""The controls: each has a number of its own, a sender, a handler, and survives its journey."""

import ast
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from hpcdist._wire import messages
from hpcdist._wire.frames import HEAD, HEAD_SIZE

PACKAGE = Path(__file__).resolve().parents[2] / "hpcdist"
RAW = ("RELEASE", "ACKNOWLEDGE", "PUT_ITEM", "TAKE_ITEM", "INVOKE", "VIA")
KINDS = sorted(messages.NUMBERS, key=lambda kind: messages.NUMBERS[kind])
SOURCES = "\n".join(
    path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "messages.py"
)


def test_no_two_controls_share_a_number() -> None:
    numbers = [*messages.NUMBERS.values(), *(getattr(messages, name) for name in RAW)]
    assert [number for number, times in Counter(numbers).items() if times > 1] == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_control_is_sent_and_handled(kind: type[NamedTuple]) -> None:
    name = kind.__name__
    assert re.search(rf"\bon\({name}\)", SOURCES), "nobody handles it"
    assert re.search(rf"(?<!on)\b{name}\(", SOURCES), "nobody sends it"
    assert inspect.getdoc(kind)
    assert not kind.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("name", RAW)
def test_every_raw_control_has_a_handler(name: str) -> None:
    assert re.search(rf"on_raw\({name}\)", SOURCES)


def test_a_control_arrives_as_it_was_sent() -> None:
    sent = messages.SectionGo(7, comm=3, fresh=True)
    data, buffers = messages.packed(sent, 42, b"behind", [b"beside"])
    _, _, count, _, ident, number = HEAD.unpack_from(data)
    assert (ident, number, [bytes(b) for b in buffers]) == (42, 62, [b"beside"])
    got, rest = messages.decode(messages.SectionGo, data[HEAD_SIZE + 8 * count :])
    assert got == sent
    assert type(got) is messages.SectionGo
    assert bytes(rest) == b"behind"


def test_handlers_are_registered_nowhere_by_number() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                assert not (
                    isinstance(node.value, ast.Attribute)
                    and node.value.attr == "handlers"
                    and path.name not in ("node.py", "descriptors.py")
                ), f"{path.name}:{node.lineno}"
